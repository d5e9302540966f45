"""What operators ask of a running instance: abort by id, pause, continue."""

from __future__ import annotations

from pd.messages import AbortMatching, Answer, Command, Continue, Finish, Pause
from pd.scheduler.actions import Action, Reply
from pd.scheduler.admission import Admission
from pd.scheduler.choices import Choices
from pd.scheduler.core import Core
from pd.scheduler.events import Commanded
from pd.scheduler.report import Reporter
from pd.scheduler.request import State
from pd.types import FinishReason

ALL = -1  # choices

_ABORTED = Finish(FinishReason.ABORT, message="aborted by the operator")


class Operator:
    """`paused`: nothing is admitted and no step is ordered. Steps under way end, peers are heard, deadlines count.

    Before `attach` there are no requests.
    """

    def __init__(self, out: list[Action]) -> None:
        self.paused = False
        self._out = out
        self._draining = False
        self._parts: tuple[Core, Choices, Reporter, Admission] | None = None

    def attach(self, core: Core, choices: Choices, reporter: Reporter, admission: Admission) -> None:
        """The runner is up."""
        self._parts = core, choices, reporter, admission
        reporter.paused = self.paused

    def command(self, event: Commanded) -> None:
        """Carry it out and answer it."""
        command, aborted = event.command, 0
        if self._parts is not None:
            core, choices, *_ = self._parts
            meant = _meant(core, command)
            aborted = sum(choices.abort(event.now, key, choice, _ABORTED) for key, choice in meant.items())
        if isinstance(command, Pause):
            self._set(not self._draining)
            if self._parts is not None and command.mode == "retract":
                _retract_all(self._parts[0])
        elif isinstance(command, Continue):
            self._set(False)
        self._out.append(Reply(event.worker, Answer(command.token, {"aborted": aborted, "paused": self.paused})))

    def drain(self) -> None:
        """What runs is to end before the instance does: a pause is over, and there will be none."""
        self._draining = True
        self._set(False)

    def _set(self, paused: bool) -> None:
        if paused is self.paused:
            return
        self.paused = paused
        if self._parts is not None:
            core, _, reporter, admission = self._parts
            core.log("paused" if paused else "continued", requests=len(core.requests))
            reporter.paused = paused  # published with the next tick
            admission.look_again()


def _meant(core: Core, command: Command) -> dict[int, int]:
    """What of the clients' requests this command ends: key -> choice, -1 for all. What is computed for others is theirs
    to cancel.
    """
    if isinstance(command, AbortMatching):
        rid = command.rid
    elif isinstance(command, Pause) and command.mode == "abort":
        rid = ""
    else:
        return {}
    found: dict[int, int] = {}
    for request in core.requests.values():
        if request.remote is not None:
            continue
        name = request.client_rid
        if not rid or name == rid or _number(name, rid) is not None:
            found[request.client_key] = ALL
        elif (choice := _number(rid, name)) is not None:
            found[request.client_key] = choice
    return found


def _number(name: str, rid: str) -> int | None:
    """N of a name RID-N: of a prompt of the batch RID, or of a choice of RID."""
    head, dash, number = name.rpartition("-")
    if not dash or head != rid or not number.isdecimal() or len(number) > 9:
        return None
    return int(number)


def _retract_all(core: Core) -> None:
    """Every request that is computed here goes back to the queue; it is replayed with the tokens that it has emitted.

    A prompt that is computed for a decode instance stays: its blocks are being pushed.
    """
    for request in list(core.requests.values()):
        if request.remote is None and request.state in (State.PREFILL, State.RUNNING):
            core.batcher.retract(request)
