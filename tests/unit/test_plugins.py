"""Plugins: found, checked and asked at start-up; whatever is wrong names the plugin."""

from __future__ import annotations

import sys
import textwrap
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import structlog

from pd import hookspecs
from pd.errors import PluginError
from pd.plugins import BUILT_IN, Plugins, load_plugins

Make = Callable[[str, str], EntryPoint]
BACKEND = """
    from pd import hookimpl
    from pd.abc import BackendInfo

    @hookimpl
    def pd_register_transfer_backends(register):
        register(BackendInfo({name!r}, factory=object, accepts=frozenset({{"ib_device"}}), unavailable=lambda: {why!r}))
"""


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A plugin from source text: its entry point."""

    def plugin(name: str, source: str) -> EntryPoint:
        module = ModuleType(f"plugin_{name}")
        exec(textwrap.dedent(source), module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return EntryPoint(name, module.__name__, "pd")

    return plugin


def backend(name: str, why: str | None = None) -> str:
    return BACKEND.format(name=name, why=why)


def test_what_plugins_register_is_found_by_name(make: Make) -> None:
    everything = make(
        "everything",
        """
        from pd import hookimpl

        @hookimpl
        def pd_register_routing_policies(register):
            register("first", factory=lambda context: "a policy", summary="always the first", prefer="decode")

        @hookimpl
        def pd_register_models(register):
            register("LlamaForCausalLM", "somewhere:build")

        @hookimpl
        def pd_register_cli(register):
            register("hello", help="greet", add_arguments=lambda parser: None, run=lambda args: 7)
        """,
    )
    plugins = load_plugins([make("fast", backend("fast")), everything])
    assert plugins.backends()["fast"].accepts == {"ib_device"}
    policy = plugins.policies()["first"]
    assert (policy.summary, policy.prefer, policy.origin) == ("always the first", "decode", "plugin_everything")
    assert plugins.models() == {"LlamaForCausalLM": "somewhere:build"}
    assert plugins.commands()["hello"].run(None) == 7  # type: ignore[arg-type]


def test_a_hook_is_asked_once_however_often_its_table_is_read(make: Make) -> None:
    entry = make(
        "counting",
        """
        from pd import hookimpl
        calls = []

        @hookimpl
        def pd_register_models(register):
            calls.append(1)
            register("A", "a:b")
        """,
    )
    plugins = load_plugins([entry])
    calls = sys.modules["plugin_counting"].calls
    assert calls == []
    plugins.models()
    plugins.models()
    plugins.describe()
    assert calls == [1]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_library", "does not load: ModuleNotFoundError.*no_such_library"),
        ("def pd_register_models(register): pass", "pd_register_models is not marked with @pd.hookimpl"),
        ("from pd import hookimpl\n@hookimpl\ndef pd_no_such(x): pass", "unknown hook 'pd_no_such'"),
        ("from pd import hookimpl\n@hookimpl\ndef another_name(x): pass", "unknown hook 'another_name'"),
        ("from pd import hookimpl\n@hookimpl\ndef pd_register_models(record): pass", "record"),
        ("x = 1", "implements no hook"),
    ],
)
def test_a_faulty_plugin_stops_the_start_up_with_its_name_and_reason(make: Make, source: str, reason: str) -> None:
    good = make("good", backend("good"))
    try:
        faulty = make("faulty", source)
    except ModuleNotFoundError:
        faulty = EntryPoint("faulty", "no_such_library.plugin", "pd")
    with pytest.raises(PluginError, match=reason) as caught:
        load_plugins([good, faulty])
    assert caught.value.plugin == "faulty"
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("hook", "call", "reason"),
    [
        ("models", "register('A', 'no colon')", "module:function"),
        ("models", "register('', 'a:b')", "needs a name"),
        ("models", "1 / 0", "ZeroDivisionError"),
        ("models", "register('A', 'a:b'); register('A', 'a:b')", "already registered by plugin faulty"),
        ("routing_policies", "register('x', None)", "not callable"),
        ("routing_policies", "register('x', print, prefer='both')", "'both'"),
        ("transfer_backends", "register('x')", "BackendInfo"),
        ("cli", "register('x')", "TypeError"),
    ],
)
def test_a_wrong_registration_is_reported_with_the_plugins_name(make: Make, hook: str, call: str, reason: str) -> None:
    entry = make("faulty", f"from pd import hookimpl\n@hookimpl\ndef pd_register_{hook}(register):\n    {call}\n")
    with pytest.raises(PluginError, match=reason) as caught:
        load_plugins([entry]).describe()
    assert caught.value.plugin == "faulty"


def test_two_plugins_cannot_register_the_same_name(make: Make) -> None:
    plugins = load_plugins([make("one", backend("fast")), make("two", backend("fast"))])
    with pytest.raises(PluginError, match="transfer backend fast is already registered by plugin one") as caught:
        plugins.backends()
    assert caught.value.plugin == "two"


def test_a_check_finds_what_is_wrong_with_any_registration_before_it_is_needed(make: Make) -> None:
    load_plugins([make("one", backend("fast"))]).check()
    for hook in ("transfer_backends", "routing_policies", "models", "cli"):
        source = f"from pd import hookimpl\n@hookimpl\ndef pd_register_{hook}(register):\n    register()\n"
        with pytest.raises(PluginError, match=f"faulty: pd_register_{hook}"):
            load_plugins([make("faulty", source)]).check()


def test_two_plugins_cannot_have_the_same_name_and_one_cannot_have_two(make: Make) -> None:
    one = make("one", backend("a"))
    with pytest.raises(PluginError, match="two plugins have this name"):
        load_plugins([one, EntryPoint("one", "plugin_one", "pd")])
    with pytest.raises(PluginError, match="already loaded as one"):
        load_plugins([one, EntryPoint("again", "plugin_one", "pd")])


def test_a_plugin_may_be_an_object_of_a_module(make: Make) -> None:
    make(
        "holder",
        """
        from pd import hookimpl

        class Plugin:
            @hookimpl
            def pd_register_models(self, register):
                register("A", "a:b")

        plugin = Plugin()
        """,
    )
    assert load_plugins([EntryPoint("object", "plugin_holder:plugin", "pd")]).models() == {"A": "a:b"}


OBSERVER = """
    from pd import hookimpl
    seen = []

    @hookimpl
    def pd_process_started(role, config):
        seen.append(("started", role, config))
        {started}

    @hookimpl
    def pd_process_stopping(role):
        seen.append(("stopping", role))
        {later}

    @hookimpl
    def pd_request_finished(summary):
        seen.append(("finished", summary))
        {later}
"""


def observed(plugins: Plugins) -> None:
    plugins.process_started("api", "settings")
    plugins.request_finished({"rid": "r"})
    plugins.process_stopping("api")


EVENTS: list[tuple[Any, ...]] = [("started", "api", "settings"), ("finished", {"rid": "r"}), ("stopping", "api")]


def test_observers_see_the_life_of_a_process(make: Make) -> None:
    plugins = load_plugins([make("watch", OBSERVER.format(started="pass", later="pass"))])
    observed(plugins)
    assert sys.modules["plugin_watch"].seen == EVENTS


def test_an_observer_that_fails_later_is_logged_and_disturbs_neither_requests_nor_other_observers(
    make: Make,
) -> None:
    bad = make("bad", OBSERVER.format(started="pass", later="1 / 0"))
    good = make("good", OBSERVER.format(started="pass", later="pass"))
    with structlog.testing.capture_logs() as logged:
        observed(load_plugins([bad, good]))
    assert sys.modules["plugin_good"].seen == EVENTS
    assert [(line["event"], line["plugin"]) for line in logged] == [("plugin_observer_failed", "bad")] * 2


def test_an_observer_that_fails_at_start_stops_the_start_up(make: Make) -> None:
    plugins = load_plugins([make("bad", OBSERVER.format(started="1 / 0", later="pass"))])
    with pytest.raises(PluginError, match="bad: pd_process_started: ZeroDivisionError"):
        plugins.process_started("api", None)


def test_the_description_says_what_is_installed_from_where_and_why_it_cannot_be_used(make: Make) -> None:
    plugins = load_plugins([make("fast", backend("fast", "no such device, buy one")), make("slow", backend("slow"))])
    fast, slow = plugins.describe()
    assert (fast.name, fast.hooks, fast.backends) == ("fast", ("pd_register_transfer_backends",), ("fast",))
    assert fast.unavailable == {"fast": "no such device, buy one"}
    assert slow.unavailable == {} and slow.models == ()


def test_what_is_built_in_is_the_same_table_as_the_distributions_entry_points() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pd"] == BUILT_IN


def test_every_hook_is_documented() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("pd_")]
    assert len(hooks) == 7
    for name in hooks:
        assert getattr(hookspecs, name).__doc__, f"{name} has no docstring"


def test_pds_own_plugins_are_loaded_once_whether_its_distribution_is_installed_or_not() -> None:
    names = [description.name for description in load_plugins().describe()]
    assert sorted(name for name in names if name in BUILT_IN) == sorted(BUILT_IN)
