"""Assembly of plugins at start-up: found by entry points, checked, asked what they register.

Everything that can be wrong with a plugin is found here, before anything serves, and names the plugin. Afterwards only
plain objects run: no hook is called per token or per step.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from types import ModuleType
from typing import Any, TypeVar

import pluggy

from pd import hookspecs
from pd.abc import BackendInfo, PolicyContext, RoutingPolicy
from pd.errors import PluginError
from pd.logs import get_logger

GROUP = "pd"
DISTRIBUTION = "pd-serve"

#: pd's own entry points, for a checkout whose distribution is not installed. The same as in pyproject.toml.
BUILT_IN = {"direct": "pd.transfer.plugin", "random": "pd.router.plugin", "dense": "pd.models.plugin"}

T = TypeVar("T")


@dataclass(frozen=True)
class PolicyEntry:
    """A registered routing policy. `prefer` is the pool ("prefill", "decode" or "") whose default it offers to be."""

    name: str
    factory: Callable[[PolicyContext], RoutingPolicy]
    summary: str
    prefer: str
    origin: str


@dataclass(frozen=True)
class CommandEntry:
    """A subcommand of `pd`."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    origin: str


@dataclass(frozen=True)
class PluginDescription:
    """One line of `pd plugins`. `unavailable` maps a transfer backend to the reason why it cannot be used here."""

    name: str
    distribution: str
    version: str
    origin: str
    hooks: tuple[str, ...]
    backends: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """A plugin to load: its entry point and the distribution that brought it, if any."""

    entry: metadata.EntryPoint
    distribution: str = ""
    version: str = ""


def load_plugins(entry_points: Iterable[metadata.EntryPoint] | None = None) -> Plugins:
    """Import and check every plugin. Raises PluginError for the first that is wrong.

    `entry_points` replaces what is installed (for tests); pd's own come from its distribution's metadata or, in a
    checkout without it, from `BUILT_IN`.
    """
    found = metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    sources = [_source(entry) for entry in found]
    if entry_points is None and not any(source.distribution == DISTRIBUTION for source in sources):
        sources = [_Source(metadata.EntryPoint(name, value, GROUP)) for name, value in BUILT_IN.items()] + sources
    sources.sort(key=lambda source: source.distribution not in ("", DISTRIBUTION))  # who takes pd's names is at fault
    manager = pluggy.PluginManager("pd")
    manager.add_hookspecs(hookspecs)
    loaded: dict[str, _Source] = {}
    for source in sources:
        name = source.entry.name
        if name in loaded:
            raise PluginError(name, f"two plugins have this name: {_origin(loaded[name])} and {_origin(source)}")
        _register(manager, name, _import(source))
        loaded[name] = source
    return Plugins(manager, loaded)


class Plugins:
    """The loaded plugins. What they register is asked for once, when first needed."""

    def __init__(self, manager: pluggy.PluginManager, sources: dict[str, _Source]) -> None:
        self._manager = manager
        self._sources = sources
        self._finished = self._observers("pd_request_finished")

    def backends(self) -> dict[str, BackendInfo]:
        """Transfer backends by name."""
        return {name: info for name, (info, _) in self._backends.items()}

    def policies(self) -> dict[str, PolicyEntry]:
        """Routing policies by name."""
        return {name: entry for name, (entry, _) in self._policies.items()}

    def models(self) -> dict[str, str]:
        """Architecture -> dotted name of its builder."""
        return {name: builder for name, (builder, _) in self._models.items()}

    def commands(self) -> dict[str, CommandEntry]:
        """Extra subcommands of `pd` by name."""
        return {name: entry for name, (entry, _) in self._commands.items()}

    def check(self) -> None:
        """Ask every plugin for all that it registers. Raises PluginError."""
        _ = self._backends, self._policies, self._models, self._commands

    def process_started(self, role: str, config: Any) -> None:
        """Tell the observers; one that fails stops the start-up: raises PluginError."""
        for plugin, observe in self._observers("pd_process_started"):
            try:
                observe(role=role, config=config)
            except Exception as error:
                raise PluginError(plugin, f"pd_process_started: {_describe(error)}") from error

    def process_stopping(self, role: str) -> None:
        """Tell the observers; one that fails is logged and stops nothing."""
        for plugin, observe in self._observers("pd_process_stopping"):
            _observe(plugin, observe, role=role)

    def request_finished(self, summary: dict[str, Any]) -> None:
        """Tell the observers; one that fails is logged and does not touch the request."""
        for plugin, observe in self._finished:
            _observe(plugin, observe, summary=summary)

    def describe(self) -> list[PluginDescription]:
        """What is installed, from where, which hooks it implements, what it registered."""
        return [self._describe(name, source) for name, source in self._sources.items()]

    def _describe(self, name: str, source: _Source) -> PluginDescription:
        plugin = self._manager.get_plugin(name)
        callers = self._manager.get_hookcallers(plugin) or []
        backends = _of_plugin(self._backends, name)
        reasons = {backend: self._backends[backend][0].unavailable() for backend in backends}
        return PluginDescription(
            name=name,
            distribution=source.distribution,
            version=source.version,
            origin=_file_of(plugin),
            hooks=tuple(sorted(caller.name for caller in callers)),
            backends=backends,
            policies=_of_plugin(self._policies, name),
            models=_of_plugin(self._models, name),
            commands=_of_plugin(self._commands, name),
            unavailable={backend: reason for backend, reason in reasons.items() if reason},
        )

    @cached_property
    def _backends(self) -> dict[str, tuple[BackendInfo, str]]:
        table: dict[str, tuple[BackendInfo, str]] = {}

        def collect(plugin: str) -> Callable[..., None]:
            def register(info: BackendInfo) -> None:
                if not isinstance(info, BackendInfo):
                    raise TypeError(f"a transfer backend is registered by a BackendInfo, not {type(info).__name__}")
                _add(table, "transfer backend", info.name, info, plugin)

            return register

        self._collect("pd_register_transfer_backends", collect)
        return table

    @cached_property
    def _policies(self) -> dict[str, tuple[PolicyEntry, str]]:
        table: dict[str, tuple[PolicyEntry, str]] = {}

        def collect(plugin: str) -> Callable[..., None]:
            def register(
                name: str, factory: Callable[[PolicyContext], RoutingPolicy], *, summary: str = "", prefer: str = ""
            ) -> None:
                if not callable(factory):
                    raise TypeError(f"the factory of policy {name} is not callable")
                if prefer not in ("", "prefill", "decode"):
                    raise ValueError(f"policy {name} prefers {prefer!r}; it may prefer 'prefill' or 'decode'")
                entry = PolicyEntry(name, factory, summary, prefer, _origin(self._sources[plugin]))
                _add(table, "routing policy", name, entry, plugin)

            return register

        self._collect("pd_register_routing_policies", collect)
        return table

    @cached_property
    def _models(self) -> dict[str, tuple[str, str]]:
        table: dict[str, tuple[str, str]] = {}

        def collect(plugin: str) -> Callable[..., None]:
            def register(architecture: str, builder: str) -> None:
                module, colon, function = builder.partition(":")
                if not (module and colon and function):
                    raise ValueError(f"builder {builder!r} of {architecture} is not of the form module:function")
                _add(table, "model architecture", architecture, builder, plugin)

            return register

        self._collect("pd_register_models", collect)
        return table

    @cached_property
    def _commands(self) -> dict[str, tuple[CommandEntry, str]]:
        table: dict[str, tuple[CommandEntry, str]] = {}

        def collect(plugin: str) -> Callable[..., None]:
            def register(
                name: str,
                *,
                help: str,
                add_arguments: Callable[[argparse.ArgumentParser], None],
                run: Callable[[argparse.Namespace], int],
            ) -> None:
                entry = CommandEntry(name, help, add_arguments, run, _origin(self._sources[plugin]))
                _add(table, "command", name, entry, plugin)

            return register

        self._collect("pd_register_cli", collect)
        return table

    def _collect(self, hook: str, collect: Callable[[str], Callable[..., None]]) -> None:
        """Call one registration hook of every plugin, each with a `register` of its own: so a fault has a name."""
        for plugin, call in self._observers(hook):
            try:
                call(register=collect(plugin))
            except PluginError:
                raise
            except Exception as error:
                raise PluginError(plugin, f"{hook}: {_describe(error)}") from error

    def _observers(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        """(plugin name, its implementation as pluggy calls it), in the order of loading."""
        everyone = self._manager.get_plugins()
        result: list[tuple[str, Callable[..., Any]]] = []
        for name in self._sources:
            plugin = self._manager.get_plugin(name)
            names = {caller.name for caller in self._manager.get_hookcallers(plugin) or []}
            if hook in names:
                result.append((name, self._manager.subset_hook_caller(hook, everyone - {plugin})))
        return result


def _source(entry: metadata.EntryPoint) -> _Source:
    if entry.dist is None:
        return _Source(entry)
    return _Source(entry, entry.dist.name, entry.dist.version)


def _import(source: _Source) -> Any:
    try:
        return source.entry.load()
    except Exception as error:
        raise PluginError(source.entry.name, f"{_origin(source)} does not load: {_describe(error)}") from error


def _register(manager: pluggy.PluginManager, name: str, plugin: Any) -> None:
    for attribute in dir(plugin):
        if not attribute.startswith("pd_"):
            continue
        function = getattr(plugin, attribute)
        if inspect.isroutine(function) and not hasattr(inspect.unwrap(function), "pd_impl"):
            raise PluginError(name, f"{attribute} is not marked with @pd.hookimpl")
    if manager.is_registered(plugin):
        raise PluginError(name, f"the same plugin is already loaded as {manager.get_name(plugin)}")
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(name, _one_line(error)) from error
    if not manager.get_hookcallers(plugin):
        raise PluginError(name, "it implements no hook of pd")


def _add(table: dict[str, tuple[T, str]], kind: str, name: str, value: T, plugin: str) -> None:
    if not name or not isinstance(name, str):
        raise PluginError(plugin, f"a {kind} needs a name, not {name!r}")
    if name in table:
        raise PluginError(plugin, f"{kind} {name} is already registered by plugin {table[name][1]}")
    table[name] = (value, plugin)


def _observe(plugin: str, observe: Callable[..., Any], **arguments: Any) -> None:
    try:
        observe(**arguments)
    except Exception:
        get_logger(plugin=plugin).exception("plugin_observer_failed")


def _of_plugin(table: dict[str, tuple[Any, str]], plugin: str) -> tuple[str, ...]:
    return tuple(name for name, (_, owner) in table.items() if owner == plugin)


def _origin(source: _Source) -> str:
    if source.distribution:
        return f"{source.entry.value} of {source.distribution} {source.version}"
    return source.entry.value


def _file_of(plugin: Any) -> str:
    module = plugin if isinstance(plugin, ModuleType) else sys.modules.get(type(plugin).__module__)
    return getattr(module, "__file__", None) or repr(plugin)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
