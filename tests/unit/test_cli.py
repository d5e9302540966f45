"""The command line: what it hands over, what it answers, how it fails."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

import pd
from pd.cli import main
from pd.config import RouteConfig, ServeConfig, UpConfig
from pd.errors import ConfigError, ModelError, PluginError
from pd.plugins import load_plugins


class Part(ModuleType):
    """Stands where a part's module is imported from; remembers the settings that it was run with."""

    def __init__(self, name: str, result: int | Exception = 0) -> None:
        super().__init__(name)
        self.result = result
        self.config: Any = None

    def run(self, config: Any) -> int:
        self.config = config
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("line", "module", "config_type"),
    [
        (["up", "/m", "--prefill", "2"], "pd.cluster", UpConfig),
        (["serve", "/m", "--role", "decode"], "pd.instance", ServeConfig),
        (["route", "--decode", "http://127.0.0.1:1"], "pd.router.service", RouteConfig),
    ],
)
def test_a_command_hands_its_settings_over_and_returns_the_parts_exit_code(
    monkeypatch: pytest.MonkeyPatch, line: list[str], module: str, config_type: type
) -> None:
    part = Part(module, result=7)
    monkeypatch.setitem(sys.modules, module, part)
    monkeypatch.setenv("PD_PORT", "4321")
    assert main(line) == 7
    assert isinstance(part.config, config_type)
    http = part.config.route.http if config_type is UpConfig else part.config.http
    log = part.config.serve.log if config_type is UpConfig else part.config.log
    assert http.port == 4321
    assert log.log_format in ("human", "json")


def test_a_gpus_number_is_refused_on_a_machine_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Part("pd.instance", result=7)
    monkeypatch.setitem(sys.modules, "pd.instance", part)
    line = ["serve", "/m", "--role", "decode", "--port", "30001", "--base-gpu-id", "1"]
    monkeypatch.setattr("pd.cli.has_accelerator", lambda: True)
    assert main(line) == 7 and part.config.model.base_gpu_id == 1
    monkeypatch.setattr("pd.cli.has_accelerator", lambda: False)
    assert main(line) == 2
    assert capsys.readouterr().err == "pd: --base-gpu-id: this machine has no GPU: the CPU computes; leave it out\n"


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("--port", "taken"), 2), (ModelError("/m", "no config.json"), 1)]
)
def test_an_error_of_a_part_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    monkeypatch.setitem(sys.modules, "pd.instance", Part("pd.instance", result=error))
    assert main(["serve", "/m"]) == code
    assert capsys.readouterr().err == f"pd: {error}\n"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("serve /m --no-such-flag 1", "--no-such-flag"),
        ("serve /m --port x", "--port"),
        ("serve /m --tp-size 2 --nnodes 2", "--tp-size 2, --nnodes 2"),
        ("serve", "MODEL"),
        ("serve /m --role prefill --local-prefill never", "--local-prefill"),
        ("serve /m --base-gpu-id 1 --device cpu", "--base-gpu-id"),
        ("up /m --unified 1 --transfer-memory shm", "--transfer-memory"),
        ("serve /m --transfer nixl-of-another-time", "--transfer"),
        ("route", "--decode"),
        ("route --decode http://d:1 --policy no_such_policy", "--policy"),
        ("no-such-command", "no-such-command"),
        ("bench", "BENCHMARK"),
        ("bench no-such-benchmark", "no-such-benchmark"),
        ("plugins --yaml", "--yaml"),
        ("--frobnicate", "--frobnicate"),
    ],
)
def test_a_wrong_call_exits_2_with_one_line_that_names_what_is_wrong(
    capsys: pytest.CaptureFixture[str], line: str, named: str
) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("pd: ") and named in captured.err


def test_the_version_needs_no_plugins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pd.cli.load_plugins", lambda: pytest.fail("loaded"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pd {pd.__version__}\n"


def test_without_a_command_the_help_is_shown_and_the_call_was_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().err
    assert all(word in text for word in ("up", "serve", "route", "plugins", "bench"))


def test_a_faulty_plugin_is_named_and_stops_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        raise PluginError("shiny", "does not load: no module named shiny")

    monkeypatch.setattr("pd.cli.load_plugins", load)
    assert main(["plugins"]) == 1
    assert capsys.readouterr().err == "pd: plugin shiny: does not load: no module named shiny\n"


def test_plugins_are_listed_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    table = capsys.readouterr().out
    assert main(["plugins", "--json"]) == 0
    listed = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    assert "direct" in listed["direct"]["backends"] and "random" in listed["random"]["policies"]
    for plugin in listed.values():
        (row,) = [line for line in table.splitlines() if line.startswith(plugin["name"] + " ")]
        assert plugin["origin"] in row and all(hook in row for hook in plugin["hooks"])


def test_a_plugin_adds_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import EntryPoint

    module = ModuleType("plugin_hello")
    exec(
        "from pd import hookimpl\n"
        "@hookimpl\n"
        "def pd_register_cli(register):\n"
        "    def add(parser): parser.add_argument('--times', type=int, default=1)\n"
        "    def run(args): print('hello' * args.times); return 3\n"
        "    register('hello', help='greet', add_arguments=add, run=run)\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "plugin_hello", module)
    plugins = load_plugins([EntryPoint("hello", "plugin_hello", "pd")])
    monkeypatch.setattr("pd.cli.load_plugins", lambda: plugins)
    assert main(["hello", "--times", "2"]) == 3
    assert capsys.readouterr().out == "hellohello\n"
    assert main(["hello", "--tiems", "2"]) == 2
    assert "did you mean --times?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "says"),
    [("pd.bench.transfer", "not part of this installation"), ("matplotlib", "pip install 'pd-serve[bench,engine]'")],
)
def test_a_benchmark_that_lacks_something_says_what_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str, says: str
) -> None:
    def run(args: Any) -> int:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    benchmark = ModuleType("pd.bench.transfer")
    benchmark.__dict__.update(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "pd.bench.transfer", benchmark)
    assert main(["bench", "transfer"]) == 1
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and missing in captured and says in captured
