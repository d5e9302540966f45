"""Orders that the scheduler gives to its shell, which carries them out in the order given and adds nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pd import messages as m

#: Of a log line. Warning: something was lost or did not work and is taken care of. Error: pd itself is wrong.
Level: TypeAlias = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class RunStep:
    order: m.StepOrder


@dataclass(frozen=True, slots=True)
class CompileGrammar:
    """To the runner, beside the steps."""

    message: m.GrammarCompile


@dataclass(frozen=True, slots=True)
class Profile:
    """To the runner, between two steps."""

    message: m.ProfileCommand


@dataclass(frozen=True, slots=True)
class Transfer:
    """To the runner's transfer socket."""

    command: m.TransferCommand


@dataclass(frozen=True, slots=True)
class Reply:
    """To one api worker."""

    worker: int
    message: m.SchedulerToApi


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Decode side: dial `endpoint` and send `hello`; reported as SessionUp or SessionRefused within `timeout` s."""

    endpoint: str
    hello: m.Hello
    timeout: float


@dataclass(frozen=True, slots=True)
class WelcomePeer:
    """Prefill side: answer connection `conn`; the shell makes the session's socket and fills in its endpoint."""

    conn: int
    welcome: m.Welcome


@dataclass(frozen=True, slots=True)
class RefusePeer:
    conn: int
    unwelcome: m.Unwelcome


@dataclass(frozen=True, slots=True)
class SendPeer:
    session: int
    message: m.PeerMessage


@dataclass(frozen=True, slots=True)
class CloseSession:
    """The machine has already forgotten it: no SessionDown follows."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Log:
    """One life-cycle line."""

    event: str
    fields: tuple[tuple[str, object], ...] = ()
    level: Level = "info"


@dataclass(frozen=True, slots=True)
class Exit:
    """The instance ends: drained (code 0) or its runner is gone (code 1)."""

    code: int
    reason: str


Action: TypeAlias = (
    RunStep
    | CompileGrammar
    | Profile
    | Transfer
    | Reply
    | OpenSession
    | WelcomePeer
    | RefusePeer
    | SendPeer
    | CloseSession
    | Log
    | Exit
)
