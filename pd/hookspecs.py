"""The hooks. Hooks only register factories or observe; none is called per token or per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import argparse

    from pd.abc import BackendInfo, PolicyContext, RoutingPolicy

hookspec = pluggy.HookspecMarker("pd")


class RegisterBackend(Protocol):
    def __call__(self, info: BackendInfo) -> None: ...


class RegisterPolicy(Protocol):
    def __call__(
        self, name: str, factory: Callable[[PolicyContext], RoutingPolicy], *, summary: str = "", prefer: str = ""
    ) -> None:
        """`prefer`: "prefill" or "decode" makes this the pool's default where the user names none."""


class RegisterModel(Protocol):
    def __call__(self, architecture: str, builder: str) -> None:
        """`builder` is a dotted name "module:function", imported in the runner only."""


class RegisterCommand(Protocol):
    def __call__(
        self,
        name: str,
        *,
        help: str,
        add_arguments: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], int],
    ) -> None: ...


@hookspec
def pd_register_transfer_backends(register: RegisterBackend) -> None:
    """At start-up of the command line, the runner and `pd bench transfer`: name -> factory with static information."""


@hookspec
def pd_register_routing_policies(register: RegisterPolicy) -> None:
    """At start-up of the command line and the router: name -> factory."""


@hookspec
def pd_register_models(register: RegisterModel) -> None:
    """At start-up of the command line, an instance's parent and the runner: architecture -> builder."""


@hookspec
def pd_register_cli(register: RegisterCommand) -> None:
    """At start-up of the command line: extra subcommands."""


@hookspec
def pd_process_started(role: str, config: Any) -> None:
    """In the api, scheduler, runner and router, as each starts; not in their parents. Observe only."""


@hookspec
def pd_process_stopping(role: str) -> None:
    """In the api, scheduler, runner and router, before each stops. Observe only."""


@hookspec
def pd_request_finished(summary: dict[str, Any]) -> None:
    """In the api process, once per request. Observe only; runs on the event loop, so it must not block."""
