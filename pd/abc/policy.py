"""What a routing policy is. Called once per request and pool by the router, on its event loop: it must not block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from pd.types import Load


@dataclass(frozen=True)
class RouteRequest:
    """What a policy may look at. `text` is the prompt text or the concatenated message contents; `token_ids` is set
    instead when the prompt came as ids. Both are parsed from the body only when a policy with `wants_prompt` is in use.
    """

    id: int
    path: str
    text: str | None = None
    token_ids: Sequence[int] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerView:
    """One healthy candidate. `in_flight` counts this router's own requests; `load` is its last word or None."""

    url: str
    role: str  # "prefill", "decode" or "unified"
    in_flight: int
    load: Load | None = None
    load_age: float = 0.0  # seconds since `load` was heard


@dataclass(frozen=True)
class PolicyContext:
    """Handed to a policy's factory: the pool it serves, its own options, a seeded source of randomness, a clock."""

    pool: str
    options: Mapping[str, str] = field(default_factory=dict)
    random: Callable[[], float] = lambda: 0.0
    now: Callable[[], float] = lambda: 0.0


@runtime_checkable
class RoutingPolicy(Protocol):
    """One instance per pool."""

    wants_prompt: bool

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        """`workers` is never empty and holds healthy workers only, in a stable order."""

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        """The request left this worker, for any reason. Called once per successful choose."""
