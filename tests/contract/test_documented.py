"""What pd offers is in the README, by its exact name; what the README offers is there."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from pd import hookspecs
from pd.abc import BackendContext, PolicyContext, RoutingPolicy, TransferBackend, WorkerView
from pd.api.app import App
from pd.api.metrics import Latencies, exposition
from pd.config import RouteConfig
from pd.plugins import Plugins, load_plugins
from pd.router.metrics import Exposition, Stats
from pd.router.operations import Operations
from pd.router.service import PROXIED
from pd.router.workers import Fleet
from pd.settings import update_readme

README = (Path(__file__).parents[2] / "README.md").read_text()


def section(title: str) -> str:
    text = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert text, title
    return text


def first_cells(text: str) -> list[str]:
    """Everything in backticks in the first column of every table."""
    rows = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_the_plugin_guide_documents_every_hook_with_its_arguments() -> None:
    hooks = {name: function for name, function in vars(hookspecs).items() if name.startswith("pd_")}
    signatures = {f"{name}({', '.join(inspect.signature(function).parameters)})" for name, function in hooks.items()}
    documented = [cell for cell in first_cells(section("Plugins")) if cell.startswith("pd_")]
    assert sorted(documented) == sorted(signatures)


#: What the guide calls the processes whose start-up is in these files.
PROCESSES = {
    "pd/api/service.py": "the api",
    "pd/bench/transfer_ends.py": "`pd bench transfer`",
    "pd/cli.py": "the command line",
    "pd/instance.py": "an instance's parent",
    "pd/router/service.py": "router",
    "pd/runner/service.py": "runner",
    "pd/scheduler/service.py": "scheduler",
}
#: The method of `Plugins` behind each hook.
CALLS = {
    "pd_register_transfer_backends": "backends",
    "pd_register_routing_policies": "policies",
    "pd_register_models": "models",
    "pd_register_cli": "commands",
    "pd_process_started": "process_started",
    "pd_process_stopping": "process_stopping",
    "pd_request_finished": "request_finished",
}


@pytest.mark.parametrize(("hook", "method"), CALLS.items(), ids=CALLS)
def test_the_plugin_guide_names_every_process_that_calls_a_hook_and_no_other(hook: str, method: str) -> None:
    root = Path(__file__).parents[2]
    calling = re.compile(rf"plugins(?:\(\))?\.{method}\b")
    callers = {str(path.relative_to(root)) for path in (root / "pd").rglob("*.py") if calling.search(path.read_text())}
    if hook.startswith("pd_register"):
        callers.add("pd/cli.py")  # `Plugins.check` asks for all of them
    (row,) = re.findall(rf"^\| `{hook}\([^|]*\| ([^|]*) \|", section("Plugins"), re.MULTILINE)
    assert {path for path, name in PROCESSES.items() if name in row} == callers


def test_the_settings_tables_are_those_of_the_settings() -> None:
    assert update_readme(README) == README, "run: python -m pd.settings --write README.md"


def test_every_architecture_is_in_the_table_of_models() -> None:
    assert sorted(first_cells(section("Models"))) == sorted(load_plugins().models())


def test_every_path_is_documented_for_where_it_is() -> None:
    rows = re.findall(r"^\| (`/.*?) \| ([A-Z, ]+) \| (\w+) \|", section("HTTP"), re.MULTILINE)
    documented: dict[str, dict[str, set[str]]] = {"router": {}, "instance": {}}
    for paths, methods, where in rows:
        for name in documented:
            if where in (name, "both"):
                documented[name] |= {key: set(methods.split(", ")) for key in re.findall(r"`(/[^`]+)`", paths)}
    operations = Operations(_nothing())
    local = {path: methods for path, (methods, _) in operations.table.items()}
    local["/v1/models/{model}"] = operations.find("/v1/models/a/b")[0]  # type: ignore[index]
    router = {path: {method.decode() for method in methods} for path, methods in {**PROXIED, **local}.items()}
    assert documented["router"] == {path: methods - {"HEAD"} for path, methods in router.items()}
    assert documented["instance"] == {route.path: set(route.methods) for route in App(_nothing(), print).table.routes}


def _nothing() -> Any:
    """A collaborator of which only the existence matters."""
    return MagicMock()


def test_every_metric_is_documented_by_its_exact_name() -> None:
    body, _ = exposition({}, Latencies(), "")
    fleet = Fleet(RouteConfig(decode=("http://127.0.0.1:1",)))
    exposed = families(body.decode()) | families(Exposition(Stats(), fleet).render().decode())
    documented = [cell for cell in first_cells(section("Metrics")) if cell.startswith("pd_")]
    assert sorted(documented) == sorted(exposed)


def families(text: str) -> set[str]:
    return set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def example(number: int) -> dict[str, Any]:
    code = re.findall(r"^```python\n(.*?)^```$", section("Plugins"), re.MULTILINE | re.DOTALL)[number]
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def registered(names: dict[str, Any]) -> Plugins:
    """The example as a loaded plugin."""
    module = ModuleType("readme_example")
    module.__dict__.update(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        return load_plugins([EntryPoint("example", module.__name__, "pd")])


def test_the_example_of_a_backend_has_the_whole_interface() -> None:
    names = example(0)
    info = registered(names).backends()["mine"]
    backend = info.factory(BackendContext("127.0.0.1", "cpu", _nothing()))
    assert isinstance(backend, TransferBackend)
    wanted = {name for name, _ in inspect.getmembers(TransferBackend, inspect.isfunction) if not name.startswith("_")}
    for name in wanted:
        theirs, ours = inspect.signature(getattr(TransferBackend, name)), inspect.signature(getattr(backend, name))
        assert list(ours.parameters) == list(theirs.parameters)[1:], name


def test_the_example_of_a_policy_chooses() -> None:
    entry = registered(example(1)).policies()["least_busy"]
    policy = entry.factory(PolicyContext("decode"))
    workers = [WorkerView(f"http://w{count}", "decode", count) for count in (3, 1, 2)]
    assert isinstance(policy, RoutingPolicy)
    assert policy.choose(_nothing(), workers) is workers[1]
