"""The command `pd`: reads settings, then hands over to the part that runs them.

Parts are imported when they are chosen. What is wrong is one line on stderr: exit code 2 for how it was called, 1 for
what went wrong while it ran.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pd import __version__
from pd.config import RouteConfig, ServeConfig, UpConfig
from pd.errors import ConfigError, PdError, PluginError
from pd.machine import has_accelerator
from pd.plugins import PluginDescription, Plugins, load_plugins
from pd.settings import Parser, add_settings, resolve, with_log_format

Run = Callable[[argparse.Namespace], int]

_BENCHMARKS = {
    "serve": "load on a running server: throughput and latencies",
    "transfer": "KV blocks from one process to another through a transfer backend",
    "scheduler": "the scheduler's own cost per step",
    "pair": "prefill and decode on two GPUs of one host: output, KV pushes, load beside two unified instances, kills",
    "engine": "one GPU: decode steps, prefill, throughput, beside what its bandwidth and rates allow",
}


@dataclass(frozen=True)
class _Command:
    """A command with settings: `target` is "module:function", called with them."""

    config_type: type
    target: str
    help: str
    needs_engine: bool


_COMMANDS = {
    "up": _Command(UpConfig, "pd.cluster:run", "a local cluster in one command", needs_engine=True),
    "serve": _Command(ServeConfig, "pd.instance:run", "one instance: prefill, decode or both", needs_engine=True),
    "route": _Command(RouteConfig, "pd.router.service:run", "the router in front of instances", needs_engine=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `pd`; returns the exit code."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        print(f"pd: {error}", file=sys.stderr)
        return 2
    except PdError as error:
        print(f"pd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `pd plugins | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"pd {__version__}")
        return 0
    plugins = load_plugins()
    plugins.check()
    parser, commands = _parser(plugins, argv)
    namespace, extras = parser.parse_known_args(argv)
    chosen = commands.get(getattr(namespace, "command", None) or "", parser)
    chosen.refuse_unknown(extras)
    if chosen is parser:
        parser.print_help(sys.stderr)
        return 2
    run: Run = namespace.run
    return run(namespace)


def _parser(plugins: Plugins, argv: list[str]) -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and the parser of each command."""
    parser = Parser(prog="pd", description="Serve large language models with prefill and decode on separate instances.")
    parser.add_argument("--version", action="version", version=f"pd {__version__}")
    add = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser).add_parser
    commands: dict[str, Parser] = {}
    for name, command in _COMMANDS.items():
        model = " [MODEL]" if command.needs_engine else ""
        sub = commands[name] = add(
            name, help=command.help, description=command.help, usage=f"pd {name}{model} [--setting VALUE ...]"
        )
        add_settings(sub, command.config_type)
        sub.set_defaults(run=_run_with_settings(command, plugins))
    sub = commands["plugins"] = add("plugins", help="what is installed, from where, which hooks")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub.set_defaults(run=lambda namespace: _show_plugins(plugins.describe(), as_json=namespace.json))
    commands["bench"] = add("bench", help="measurements")
    _add_benchmarks(commands["bench"], argv)
    commands["verify"] = add("verify", help="compare a deployment's tokens and logprobs with a reference")
    if argv[:1] == ["verify"]:
        _add_verify(commands["verify"])
    for name, entry in plugins.commands().items():
        if name in commands:
            raise PluginError(entry.origin, f"command {name} is pd's own")
        sub = commands[name] = add(name, help=entry.help, description=entry.help)
        entry.add_arguments(sub)
        sub.set_defaults(run=entry.run)
    return parser, commands


def _run_with_settings(command: _Command, plugins: Plugins) -> Run:
    def run(namespace: argparse.Namespace) -> int:
        config: Any = resolve(
            command.config_type,
            namespace,
            os.environ,
            backends=plugins.backends() if command.needs_engine else None,
            policies=plugins.policies(),
            accelerator=has_accelerator(),
        )
        if command.needs_engine and importlib.util.find_spec("torch") is None:
            raise PdError("torch is not installed: pip install 'pd-serve[engine]'")
        module, _, function = command.target.partition(":")
        target = getattr(importlib.import_module(module), function)
        return int(target(with_log_format(config, terminal=sys.stderr.isatty())))

    return run


def _add_benchmarks(parser: Parser, argv: list[str]) -> None:
    """Only the chosen benchmark is imported, so that one that lacks something does not stop the others."""
    add = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True, parser_class=Parser).add_parser
    for name, help in _BENCHMARKS.items():
        sub = add(name, help=help, description=help)
        if argv[:2] == ["bench", name]:
            module = _with_extra(name, partial(importlib.import_module, f"pd.bench.{name}"))
            module.add_arguments(sub)
            sub.set_defaults(run=partial(_with_extra, name, module.run))


def _add_verify(parser: Parser) -> None:
    from pd import verify

    verify.add_arguments(parser)
    parser.set_defaults(run=verify.run)


def _with_extra(name: str, call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("pd."):
            raise PdError(f"pd bench {name} is not part of this installation ({error.name} is missing)") from error
        raise PdError(f"pd bench {name} needs {error.name}: pip install 'pd-serve[bench,engine]'") from error


def _show_plugins(plugins: list[PluginDescription], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([asdict(plugin) for plugin in plugins], indent=2))
        return 0
    rows = [("PLUGIN", "FROM", "REGISTERS", "HOOKS", "FILE")]
    for plugin in plugins:
        origin = f"{plugin.distribution} {plugin.version}" if plugin.distribution else "(not installed: a checkout)"
        rows.append((plugin.name, origin, "; ".join(_registered(plugin)) or "-", " ".join(plugin.hooks), plugin.origin))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]))
    for plugin in plugins:
        for backend, reason in plugin.unavailable.items():
            print(f"transfer backend {backend} is unavailable: {reason}")
    return 0


def _registered(plugin: PluginDescription) -> Iterator[str]:
    for kind in ("backends", "policies", "models", "commands"):
        names = getattr(plugin, kind)
        if names:
            yield f"{kind}: {', '.join(names)}"
