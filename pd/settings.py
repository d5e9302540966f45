"""From argv and environment to settings: every field of `pd.config` made by `setting()` gets its flag and variable.

Precedence: flag, PD_* variable, other variables of the field, default. A flag either acts or is an error that names
it as it was typed. Nothing reads the environment afterwards.
"""

from __future__ import annotations

import argparse
import difflib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pd import rules
from pd.config import ROLES, LogConfig, RouteConfig, ServeConfig, UpConfig
from pd.errors import ConfigError

C = TypeVar("C")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_WORDS = {int: "a whole number", float: "a number", bool: "a switch (1 or 0)"}
#: Other spellings of a value, by field.
_SPELLINGS = {
    "role": {"null": "unified"},
    "dtype": {"half": "float16", "float": "float32"},
    "kv_cache_dtype": {"fp8": "fp8_e4m3"},
    "tool_call_parser": {"qwen": "hermes", "qwen25": "hermes", "llama3_json": "llama3"},
    "reasoning_parser": {"deepseek_r1": "deepseek-r1"},
}


@dataclass(frozen=True)
class Option:
    """One setting of one command: where it lives and all that its field says of it."""

    path: tuple[str, ...]
    flag: str  # "--port", or an upper-case word for a positional
    aliases: tuple[str, ...]
    variables: tuple[str, ...]
    kind: Any  # str, int, float, bool, tuple[str, ...] or tuple[int, ...]
    default: Any
    meta: Mapping[str, Any]
    computed: bool  # the default depends on the machine

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def positional(self) -> bool:
        return not self.flag.startswith("-")

    @property
    def repeats(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def flags(self) -> tuple[str, ...]:
        return self.aliases if self.positional else (self.flag, *self.aliases)

    @property
    def dest(self) -> str:
        return "setting:" + self.flag

    @property
    def help(self) -> str:
        """What it means, after the roles for which it does not mean nothing."""
        roles = self.meta["roles"]
        return self.meta["help"] if roles == ROLES else f"{' and '.join(roles)}: {self.meta['help']}"


class Parser(argparse.ArgumentParser):
    """Reports every mistake as a ConfigError that names the flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        name, colon, problem = message.removeprefix("argument ").partition(": ")
        raise ConfigError(name, problem) if colon else ConfigError(self.prog, message)

    def refuse_unknown(self, extras: Sequence[str]) -> None:
        """Raise for what `parse_known_args` left over, with the nearest flag that exists."""
        for extra in extras:
            flag = extra.split("=", 1)[0]
            if not flag.startswith("-"):
                continue
            shown = [
                name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings
            ]
            near = difflib.get_close_matches(flag, shown, n=1)
            raise ConfigError(flag, "unknown flag", f"did you mean {near[0]}?" if near else f"see {self.prog} --help")
        if extras:
            raise ConfigError(extras[0], "unexpected argument", f"see {self.prog} --help")


# --- describing -----------------------------------------------------------------------------------------------------


def options(config_type: type) -> list[Option]:
    """Every setting of a command, nested dataclasses flattened, in order."""
    return list(_walk(config_type(), (), frozenset()))


def _walk(config: Any, path: tuple[str, ...], omitted: frozenset[str]) -> Iterator[Option]:
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        meta = item.metadata
        if is_dataclass(value):
            yield from _walk(value, (*path, item.name), omitted | frozenset(meta.get("omit", ())))
        elif meta.get("setting") and item.name not in omitted:
            yield Option(
                path=(*path, item.name),
                flag=meta["flag"] or "--" + item.name.replace("_", "-"),
                aliases=meta["aliases"],
                variables=("PD_" + item.name.upper(), *meta["env"]),
                kind=hints[item.name],
                default=value,
                meta=meta,
                computed=item.default_factory is not MISSING,
            )


def add_settings(parser: argparse.ArgumentParser, config_type: type) -> None:
    """Give the parser every flag of this command. Values are kept as typed; `resolve` converts them."""
    seen: set[str] = set()
    for option in options(config_type):
        if option.dest in seen:  # the same flag in two parts of a command sets both
            continue
        seen.add(option.dest)
        meta = option.meta
        hidden = option.default in ("", (), False) or meta["secret"] or option.computed
        default = "" if hidden else _plain(option.default)
        help = option.help + (f" (default: {default})" if default else "")
        metavar = meta["metavar"] or ("{" + ",".join(meta["choices"]) + "}" if meta["choices"] else None)
        common: dict[str, Any] = {
            "action": _Remember,
            "help": help.replace("%", "%%") if meta["readme"] else argparse.SUPPRESS,
        }
        if option.positional:
            parser.add_argument(option.dest + ":positional", nargs="?", metavar=option.flag, **common)
        if option.kind is bool:
            off = tuple("--no-" + flag.removeprefix("--") for flag in option.flags)
            parser.add_argument(*option.flags, dest=option.dest, nargs=0, const="1", **common)
            parser.add_argument(*off, dest=option.dest, nargs=0, const="0", **{**common, "help": argparse.SUPPRESS})
        else:
            nargs = "+" if option.repeats else None
            word = metavar or option.name.upper()
            parser.add_argument(*option.flags, dest=option.dest, nargs=nargs, metavar=word, **common)
    rules.add_foreign_flags(parser, config_type)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Remember(argparse.Action):
    """Keeps the flag as it was typed and its raw values; a repeatable one adds up, of others the last counts."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values is None:  # an absent positional
            return
        raw = [self.const] if self.nargs == 0 else list(values) if isinstance(values, list) else [values]
        before = getattr(namespace, self.dest, None)
        if self.nargs == "+" and before is not None:
            raw = before[1] + raw
        setattr(namespace, self.dest, (option or str(self.metavar), raw))


# --- resolving ------------------------------------------------------------------------------------------------------


def parse(
    config_type: type[C],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    backends: Mapping[str, rules.Backend] | None = None,
    policies: Collection[str] | None = None,
    accelerator: bool | None = None,
) -> C:
    """`argv` (without program and command) and environment to settings. Raises ConfigError."""
    parser = Parser(prog="pd")
    add_settings(parser, config_type)
    namespace, extras = parser.parse_known_args(argv)
    parser.refuse_unknown(extras)
    return resolve(config_type, namespace, environ, backends=backends, policies=policies, accelerator=accelerator)


def resolve(
    config_type: type[C],
    namespace: argparse.Namespace,
    environ: Mapping[str, str],
    *,
    backends: Mapping[str, rules.Backend] | None = None,
    policies: Collection[str] | None = None,
    accelerator: bool | None = None,
) -> C:
    """Settings from what `add_settings` had the parser collect. Raises ConfigError.

    `backends` and `policies` are what the plugins registered, `accelerator` is whether this machine has one; nothing is
    checked against what is None.
    """
    rules.refuse_foreign_flags(namespace)
    config = config_type()
    given: dict[tuple[str, ...], str] = {}
    bad: list[tuple[Option, ConfigError]] = []
    for option in options(config_type):
        found = _find(option, namespace, environ)
        if found is not None:
            source, raw = found
            try:
                config = _set(config, option.path, _convert(option, source, raw))
            except ConfigError as problem:
                if source.startswith("-") or option.meta["roles"] == ROLES:
                    raise
                bad.append((option, problem))  # a variable matters only where it acts
                continue
            given[option.path] = source
    config = typing.cast(C, rules.apply(config, given, backends, policies))
    rules.refuse_gpu(config, given, accelerator)
    working = rules.roles_at_work(config)
    for option, error in bad:
        if not working or not working.isdisjoint(option.meta["roles"]):
            raise error
    for option in options(config_type):
        source = given.get(option.path, "")
        if working and source.startswith("-"):
            rules.refuse_idle(source, option.meta, working)
    return config


def with_log_format(config: C, *, terminal: bool) -> C:
    """Decide `--log-format auto` once, where it is known whether people read stderr: children inherit the decision."""
    changes: dict[str, Any] = {}
    for item in fields(typing.cast(Any, config)):
        value = getattr(config, item.name)
        if isinstance(value, LogConfig):
            if value.log_format == "auto":
                changes[item.name] = replace(value, log_format="human" if terminal else "json")
        elif is_dataclass(value):
            changes[item.name] = with_log_format(value, terminal=terminal)
    return typing.cast(C, replace(typing.cast(Any, config), **changes))


def _find(option: Option, namespace: argparse.Namespace, environ: Mapping[str, str]) -> tuple[str, list[str]] | None:
    """The source by its typed name, and the raw values. An empty variable counts as unset."""
    typed = getattr(namespace, option.dest, None)
    positional = getattr(namespace, option.dest + ":positional", None)
    if typed is not None and positional is not None and typed[1] != positional[1]:
        raise ConfigError(typed[0], f"{typed[1][0]} contradicts the argument {positional[1][0]}")
    if typed is not None or positional is not None:
        return typed or positional
    for variable in option.variables:
        text = environ.get(variable, "")
        if text:
            return variable, text.replace(",", " ").split() if option.repeats else [text]
    return None


def _convert(option: Option, source: str, raw: list[str]) -> Any:
    if option.repeats:
        if typing.get_args(option.kind)[0] is int:
            return tuple(_number(option, int, source, "0" if text == "none" else text) for text in raw)
        return tuple(raw)
    text = raw[-1]
    if option.kind is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise ConfigError(source, f"{text!r} is not {_WORDS[bool]}")
        return text.lower() in _TRUE
    if option.kind in (int, float):
        return _number(option, option.kind, source, text)
    text = _SPELLINGS.get(option.name, {}).get(text, text)
    choices = option.meta["choices"]
    if choices and text not in choices:
        raise ConfigError(source, f"{text!r} is not one of {', '.join(choices)}")
    return text


def _number(option: Option, kind: type, source: str, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(source, f"{text!r} is not {_WORDS[kind]}") from None
    bounds = option.meta["bounds"]
    low, above, high, below = (bounds[name] for name in ("at_least", "above", "at_most", "below"))
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(source, f"{text!r} is not {_WORDS[kind]}")
    if low is not None and value < low:
        raise ConfigError(source, f"{text} is less than {low:g}")
    if above is not None and value <= above:
        raise ConfigError(source, f"{text} is not more than {above:g}")
    if high is not None and value > high:
        raise ConfigError(source, f"{text} is more than {high:g}")
    if below is not None and value >= below:
        raise ConfigError(source, f"{text} is not less than {below:g}")
    return value


def _set(config: Any, path: tuple[str, ...], value: Any) -> Any:
    if len(path) > 1:
        value = _set(getattr(config, path[0]), path[1:], value)
    return replace(config, **{path[0]: value})


# --- the README's tables --------------------------------------------------------------------------------------------

BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def settings_table(*config_types: type) -> str:
    """One Markdown table per command. A setting that an earlier table has in the same way is not repeated."""
    seen: set[tuple[str, ...]] = set()
    tables: list[str] = []
    for config_type in config_types:
        rows = dict.fromkeys(_row(option) for option in options(config_type) if option.meta["readme"])
        fresh = [row for row in rows if row not in seen]
        seen.update(rows)
        title = f"`pd {config_type.__name__.removesuffix('Config').lower()}`"
        tables.append(
            (f"Also for {title}:" if tables else f"{title}:")
            + "\n\n| flag | aliases | variable | default | meaning |\n|---|---|---|---|---|\n"
            + "".join("| " + " | ".join(row) + " |\n" for row in fresh)
        )
    return "\n".join(tables)


def _row(option: Option) -> tuple[str, ...]:
    meta = option.meta
    meaning = option.help.replace("|", "\\|")
    if meta["choices"]:
        words = [word for word in meta["choices"] if word not in meta["help"]]
        meaning += f": {', '.join(meta['choices'])}" if words else ""
    if meta["unit"] and meta["unit"] not in meaning.split():
        meaning += f" ({meta['unit']})"
    if option.computed:
        default = "computed"
    elif isinstance(option.default, bool):
        default = "on" if option.default else "off"
    else:
        default = "" if option.default in ("", ()) else f"`{_plain(option.default)}`"
    return (
        f"`{option.flag}`",
        " ".join(f"`{alias}`" for alias in option.aliases),
        " ".join(f"`{variable}`" for variable in option.variables),
        default,
        meaning,
    )


def update_readme(text: str) -> str:
    """`text` with the tables between its markers made new. Raises ValueError when the markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{settings_table(ServeConfig, RouteConfig, UpConfig)}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pd.settings [--write README.md]`: print the tables, or put them into a file."""
    parser = argparse.ArgumentParser(prog="python -m pd.settings", description=main.__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    path = parser.parse_args(argv).write
    if path is None:
        print(settings_table(ServeConfig, RouteConfig, UpConfig))
    else:
        path.write_text(update_readme(path.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
