"""What operators ask of a running instance: abort by id, pause, continue."""

from __future__ import annotations

from collections.abc import Callable

from pd.messages import AbortMatching, Answer, Command, Continue, Finish, Pause
from pd.scheduler.actions import Action, Reply
from pd.scheduler.admission import Admission
from pd.scheduler.core import Core
from pd.scheduler.events import Commanded
from pd.scheduler.report import Reporter
from pd.scheduler.request import Request, State
from pd.types import FinishReason

_ABORTED = Finish(FinishReason.ABORT, message="aborted by the operator")


class Operator:
    """`paused`: nothing is admitted and no step is ordered. Steps under way end, peers are heard, deadlines count.

    `end` ends a client's request. Before `attach` there are no requests.
    """

    def __init__(self, out: list[Action], end: Callable[[float, Request, Finish], None]) -> None:
        self.paused = False
        self._out, self._end = out, end
        self._draining = False
        self._parts: tuple[Core, Reporter, Admission] | None = None

    def attach(self, core: Core, reporter: Reporter, admission: Admission) -> None:
        """The runner is up."""
        self._parts = core, reporter, admission
        reporter.paused = self.paused

    def command(self, event: Commanded) -> None:
        """Carry it out and answer it."""
        command = event.command
        core = self._parts[0] if self._parts is not None else None
        ended = _meant(core, command) if core is not None else []
        for request in ended:
            if request.state is not State.GONE:  # not ended together with another one
                self._end(event.now, request, _ABORTED)
        if isinstance(command, Pause):
            self._set(not self._draining)
            if core is not None and command.mode == "retract":
                _retract_all(core)
        elif isinstance(command, Continue):
            self._set(False)
        data: dict[str, object] = {"aborted": len({request.client_key for request in ended}), "paused": self.paused}
        self._out.append(Reply(event.worker, Answer(command.token, data)))

    def drain(self) -> None:
        """What runs is to end before the instance does: a pause is over, and there will be none."""
        self._draining = True
        self._set(False)

    def _set(self, paused: bool) -> None:
        if paused is self.paused:
            return
        self.paused = paused
        if self._parts is not None:
            core, reporter, admission = self._parts
            core.log("paused" if paused else "continued", requests=len(core.requests))
            reporter.paused = paused  # published with the next tick
            admission.look_again()


def _meant(core: Core, command: Command) -> list[Request]:
    """The clients' requests that this command ends. What is computed for others is theirs to cancel."""
    mine = [request for request in core.requests.values() if request.remote is None]
    match command:
        case AbortMatching(_, rid):
            return [request for request in mine if not rid or _is_called(request.rid, rid)]
        case Pause(_, "abort"):
            return mine
        case _:
            return []


def _is_called(name: str, rid: str) -> bool:
    """ID-7 is a prompt of ID or a choice of its only prompt, ID-7-1 a choice of a prompt."""
    if name == rid:
        return True
    numbers = name.removeprefix(f"{rid}-").split("-") if name.startswith(f"{rid}-") else []
    return 1 <= len(numbers) <= 2 and all(number.isdecimal() for number in numbers)


def _retract_all(core: Core) -> None:
    """Every request that is computed here goes back to the queue; it is replayed with the tokens that it has emitted.

    A prompt that is computed for a decode instance stays: its blocks are being pushed.
    """
    for request in list(core.requests.values()):
        if request.remote is None and request.state in (State.PREFILL, State.RUNNING):
            core.batcher.retract(request)
