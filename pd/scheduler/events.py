"""Facts that reach the scheduler. Every event carries `now`, a monotonic time in seconds: the machine has no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pd import messages as m


@dataclass(frozen=True, slots=True)
class RequestSubmitted:
    now: float
    submit: m.Submit


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """`choice` -1: all of them."""

    now: float
    key: int
    reason: str
    choice: int = -1


@dataclass(frozen=True, slots=True)
class Asked:
    now: float
    worker: int
    ask: m.Ask


@dataclass(frozen=True, slots=True)
class Commanded:
    """An operator's wish, from an api worker: abort by id, pause, continue."""

    now: float
    worker: int
    command: m.Command


@dataclass(frozen=True, slots=True)
class ProfileAsked:
    """An operator's wish that the runner is to carry out."""

    now: float
    worker: int
    command: m.ProfileCommand


@dataclass(frozen=True, slots=True)
class ApiLost:
    """An api worker died: its requests have no client any more."""

    now: float
    worker: int


@dataclass(frozen=True, slots=True)
class DrainRequested:
    now: float
    bound: float


@dataclass(frozen=True, slots=True)
class RunnerUp:
    now: float
    ready: m.RunnerReady


@dataclass(frozen=True, slots=True)
class StepFinished:
    now: float
    done: m.StepDone


@dataclass(frozen=True, slots=True)
class GrammarCompiled:
    now: float
    number: int
    problem: str


@dataclass(frozen=True, slots=True)
class ProfileSaid:
    now: float
    message: m.ProfileAnswer | m.ProfileBusy


@dataclass(frozen=True, slots=True)
class RunnerDied:
    now: float
    reason: str


@dataclass(frozen=True, slots=True)
class TransferSaid:
    now: float
    event: m.TransferEvent


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """Prefill side: a decode instance introduces itself on connection `conn` of the listening socket."""

    now: float
    conn: int
    hello: m.Hello


@dataclass(frozen=True, slots=True)
class SessionUp:
    """Decode side: `endpoint` answered the Hello; messages may be sent on `session`."""

    now: float
    endpoint: str
    welcome: m.Welcome


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """Decode side: no session with `endpoint`: unreachable, no answer in time, or a mismatch (`permanent`)."""

    now: float
    endpoint: str
    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class SessionDown:
    """Both sides: the session's connection closed, had a gap, or its pipe was full. Nothing more comes from it."""

    now: float
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerSaid:
    now: float
    session: int
    message: m.PeerMessage


@dataclass(frozen=True, slots=True)
class Tick:
    """`lag`: how much later than due the shell's loop came to it, seconds."""

    now: float
    lag: float = 0.0


Event: TypeAlias = (
    RequestSubmitted
    | AbortRequested
    | Asked
    | Commanded
    | ProfileAsked
    | ApiLost
    | DrainRequested
    | RunnerUp
    | StepFinished
    | GrammarCompiled
    | ProfileSaid
    | RunnerDied
    | TransferSaid
    | HelloReceived
    | SessionUp
    | SessionRefused
    | SessionDown
    | PeerSaid
    | Tick
)
