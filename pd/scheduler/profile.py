"""Passes what operators want of the profiler on to the runner, and its answers back."""

from __future__ import annotations

import msgspec

from pd.messages import Answer, ProfileAnswer, ProfileBusy
from pd.scheduler.actions import Action, Profile, Reply
from pd.scheduler.events import ProfileAsked, ProfileSaid

#: Seconds that a runner may take to end a recording; one that takes longer is judged like any other.
BUSY_BOUND = 600.0


class Profiling:
    """Until `attach` there is no runner. `quiet_since` says from when on its silence counts."""

    def __init__(self, out: list[Action]) -> None:
        self._out = out
        self._up = False
        self._asked: dict[int, tuple[int, int]] = {}  # our token -> api worker and its token
        self._last = 0
        self._busy = False
        self._changed = float("-inf")

    def attach(self) -> None:
        """The runner is up."""
        self._up = True

    def asked(self, event: ProfileAsked) -> None:
        command = event.command
        if not self._up:
            answer = {"problem": "the instance is starting", "param": "", "files": [], "status": 503}
            self._out.append(Reply(event.worker, Answer(command.token, answer)))
            return
        self._last += 1
        self._asked[self._last] = event.worker, command.token
        self._out.append(Profile(msgspec.structs.replace(command, token=self._last)))

    def said(self, event: ProfileSaid) -> None:
        match event.message:
            case ProfileBusy(busy):
                self._busy, self._changed = busy, event.now
            case ProfileAnswer(number, problem, param, files, status):
                worker, token = self._asked.pop(number)
                said = {"problem": problem, "param": param, "files": files, "status": status}
                self._out.append(Reply(worker, Answer(token, said)))

    def quiet_since(self, now: float) -> float:
        """The runner could not speak before this time."""
        return now if self._busy and now - self._changed < BUSY_BOUND else self._changed
