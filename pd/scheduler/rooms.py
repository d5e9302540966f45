"""Rooms: they join the HTTP leg that a foreign router sends to a prefill instance to the hand-off that decode asks for.

Such a router sends one body to both instances, with a number, the room. Decode asks for the prompt under this number,
and the leg is answered with the first token. Either may come first; whatever came alone waits here.

    leg ────────┐                      ┌── first token, or Answered: the leg is settled
    hand-off ───┴── joined by room ────┤
    Expect ─────┘                      └── no hand-off in time, session lost, decode failed: the leg fails

A room is a label that anybody may choose. So a leg is given only what belongs to its own prompt, only the session that
spoke of a room last may settle it, and of two legs with one room the later one counts: a router that tries again uses
the same number.

Pure: no clock, no socket. Events are methods that take `now`; what follows for legs is drained with `take`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from pd.messages import FirstChoice, PromptLogprobs
from pd.types import HandoffId

#: First tokens that wait for their leg take at most so many bytes; the oldest go first.
KEEP_BYTES = 64 << 20

#: For so long a failure waits for its leg, seconds: the legs of a request come together, and a later one is a new try.
KEEP_PROBLEM = 5.0

#: What one kept result costs besides its logprobs, bytes.
_OVERHEAD = 1024


@dataclass(frozen=True, slots=True)
class Leg:
    """One prompt of a request to a prefill instance. `prompt` is its label (`label_of`)."""

    key: int
    room: int
    prompt: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """What a leg is answered with: per choice its first token."""

    choices: tuple[FirstChoice, ...]
    cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def nbytes(self) -> int:
        found = self.prompt_logprobs
        if found is None:
            return _OVERHEAD
        tops = len(found.tops.ids_i32) + len(found.tops.logprobs_f32) if found.tops is not None else 0
        return _OVERHEAD + len(found.logprobs_f32) + tops + len(found.wanted_f32)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a leg fails. `status` as in HTTP."""

    status: int
    message: str


Outcome: TypeAlias = Result | Problem


@dataclass(frozen=True, slots=True)
class Settled:
    """Leg `key` is over."""

    key: int
    outcome: Outcome


@dataclass(eq=False, slots=True)
class _Room:
    """At least one of leg, session, hand-off and outcome is there; never both a leg and an outcome.

    `session` has said that the hand-off is here or will come. `prompt` labels the hand-off's or the outcome's; before,
    it is b"". Without a hand-off it is over at the time of its live entry in the expiry heap, which `serial` tells.
    """

    leg: Leg | None = None
    session: int | None = None
    handoff: HandoffId | None = None
    prompt: bytes = b""
    outcome: Outcome | None = None
    serial: int = 0


def label_of(prompt_i32: bytes | bytearray) -> bytes:
    """Equal prompts have equal labels."""
    return hashlib.blake2b(prompt_i32, digest_size=16).digest()


class Rooms:
    """All rooms of one instance. `timeout`: longest wait of a leg for its hand-off, of a first token for its leg."""

    def __init__(self, timeout: float, keep_bytes: int = KEEP_BYTES) -> None:
        self.timeout, self._keep_bytes = timeout, keep_bytes
        self._rooms: dict[int, _Room] = {}
        self._handoffs: dict[HandoffId, int] = {}
        self._legs: dict[int, int] = {}  # key -> room
        self._settled: list[Settled] = []
        self._expiry: list[tuple[float, int, int]] = []  # (time, serial, room)
        self._serial = 0
        self._kept = 0  # bytes of results without a leg

    def __len__(self) -> int:
        return len(self._rooms)

    @property
    def legs(self) -> int:
        """Legs that wait."""
        return len(self._legs)

    def take(self) -> list[Settled]:
        settled, self._settled = self._settled, []
        return settled

    # --- the leg ---

    def came(self, now: float, leg: Leg) -> None:
        """A client's request; it is settled sooner or later, unless it leaves."""
        room = self._rooms.get(leg.room)
        if room is not None and room.prompt and room.prompt != leg.prompt:
            self._settle(room, Problem(409, f"bootstrap_room {leg.room} has been used for another prompt"))
            self._forget(leg.room)
            room = None
        if room is None:
            room = self._rooms[leg.room] = _Room()
        self._settle(room, Problem(409, f"another request has come with the same bootstrap_room {leg.room}"))
        room.leg = leg
        self._legs[leg.key] = leg.room
        if room.outcome is not None:
            self._settle(room, room.outcome)
            self._forget(leg.room)
        else:
            self._arm(leg.room, room, now + self.timeout)

    def left(self, now: float, key: int) -> HandoffId | None:
        """The leg is not waited for any more. Returns the hand-off that it was joined to, which has lost its label."""
        number = self._legs.pop(key, None)
        if number is None:
            return None
        room = self._rooms[number]
        room.leg, id = None, room.handoff
        if id is not None or room.session is None:
            self._forget(number)
        else:
            self._arm(number, room, now + self.timeout)
        return id

    # --- the hand-off ---

    def asked(self, now: float, number: int, id: HandoffId, session: int, prompt: bytes) -> None:
        """A decode instance asks for this room's prompt."""
        room = self._taken_over(number)
        if room.leg is not None and room.leg.prompt != prompt:
            problem = "the decode instance asked for another prompt: do both instances have the same chat template?"
            self._settle(room, Problem(409, f"bootstrap_room {number}: {problem}"))
        room.handoff, room.session, room.prompt = id, session, prompt
        self._handoffs[id] = number

    def first_token(self, now: float, id: HandoffId, result: Result) -> None:
        number = self._handoffs.pop(id, None)
        if number is None:
            return
        room = self._rooms[number]
        room.handoff = None
        self._outcome(now, number, room, result)

    def stopped(self, now: float, id: HandoffId) -> None:
        """It will have no first token. What becomes of the request its decode instance says, with `Answered`."""
        number = self._handoffs.pop(id, None)
        if number is not None:
            room = self._rooms[number]
            room.handoff = None
            self._arm(number, room, now + self.timeout)

    # --- the decode instance ---

    def expected(self, now: float, number: int, session: int) -> None:
        """It will ask, when it can."""
        known = self._rooms.get(number)
        waits = known is not None and known.leg is not None and known.handoff is None  # its bound stays what it is
        room = self._taken_over(number)
        room.session, room.prompt = session, b""
        if not waits:
            self._arm(number, room, now + self.timeout)

    def answered(self, now: float, number: int, session: int, prompt: bytes, outcome: Outcome) -> None:
        """It has the answer, or none at all, without this instance."""
        room = self._rooms.get(number)
        if room is None:
            room = self._rooms[number] = _Room()
        elif room.session not in (None, session):
            return  # an earlier try of the request, which has gone to another instance since
        elif prompt != (room.leg.prompt if room.leg is not None else room.prompt or prompt):
            return  # another request with this room
        room.session, room.prompt = session, prompt
        self._unlabel(room)
        self._outcome(now, number, room, outcome)

    def lost(self, now: float, session: int, reason: str) -> None:
        """Its session is over: it can neither ask nor answer."""
        for number, room in [(n, r) for n, r in self._rooms.items() if r.session == session]:
            room.session = None
            if not isinstance(room.outcome, Result):
                self._unlabel(room)
                self._outcome(now, number, room, Problem(503, f"the decode instance was lost: {reason}"))

    def drain(self) -> None:
        """Nobody will ask any more: legs fail of which no decode instance has spoken."""
        for number, room in list(self._rooms.items()):
            if room.leg is not None and room.session is None:
                self._settle(room, Problem(503, "the instance is draining"))
                self._forget(number)

    # --- time ---

    def tick(self, now: float) -> None:
        while self._expiry and self._expiry[0][0] <= now:
            _, serial, number = heapq.heappop(self._expiry)
            room = self._rooms.get(number)
            if room is None or room.serial != serial or room.handoff is not None:
                continue  # armed anew, or bounded by its hand-off
            self._settle(room, Problem(504, self._overdue(room)))
            self._forget(number)

    def _overdue(self, room: _Room) -> str:
        who = "no decode instance has asked" if room.session is None else "the decode instance has not asked"
        return f"{who} for this request's prompt (its bootstrap_room) within {self.timeout:g} s"

    # --- helpers ---

    def _taken_over(self, number: int) -> _Room:
        """The room, for a decode instance that begins anew: what an earlier one left there does not count."""
        room = self._rooms.get(number)
        if room is None:
            room = self._rooms[number] = _Room()
        self._unlabel(room)
        self._drop_outcome(room)
        return room

    def _outcome(self, now: float, number: int, room: _Room, outcome: Outcome) -> None:
        """To the leg, if it is there, or kept for it."""
        gone = isinstance(outcome, Problem) and outcome.status == 499
        if room.leg is not None or gone:  # the client of one leg is the client of the other
            self._settle(room, outcome)
            self._forget(number)
            return
        self._drop_outcome(room)
        room.outcome = outcome
        if isinstance(outcome, Result):
            self._kept += outcome.nbytes
            self._arm(number, room, now + self.timeout)
            self._make_space()
        else:
            self._arm(number, room, now + min(self.timeout, KEEP_PROBLEM))

    def _make_space(self) -> None:
        if self._kept > self._keep_bytes:
            kept = sorted((r.serial, n) for n, r in self._rooms.items() if isinstance(r.outcome, Result))
            for _, number in kept:
                if self._kept <= self._keep_bytes // 2:
                    break
                self._forget(number)

    def _settle(self, room: _Room, outcome: Outcome) -> None:
        leg, room.leg = room.leg, None
        if leg is not None:
            del self._legs[leg.key]
            self._settled.append(Settled(leg.key, outcome))

    def _unlabel(self, room: _Room) -> None:
        if room.handoff is not None:
            del self._handoffs[room.handoff]
            room.handoff = None

    def _drop_outcome(self, room: _Room) -> None:
        if isinstance(room.outcome, Result):
            self._kept -= room.outcome.nbytes
        room.outcome = None

    def _forget(self, number: int) -> None:
        room = self._rooms.pop(number)
        assert room.leg is None, "a leg must be settled or have left"
        self._unlabel(room)
        self._drop_outcome(room)

    def _arm(self, number: int, room: _Room, at: float) -> None:
        self._serial += 1
        room.serial = self._serial
        heapq.heappush(self._expiry, (at, self._serial, number))
        if len(self._expiry) > 64 and len(self._expiry) > 4 * len(self._rooms):
            self._expiry = [e for e in self._expiry if (r := self._rooms.get(e[2])) and r.serial == e[1]]
            heapq.heapify(self._expiry)

    def audit(self, open_handoffs: Iterable[HandoffId]) -> None:
        """Raises AssertionError when the indices disagree, or a label belongs to no open hand-off."""
        labels = {room.handoff: number for number, room in self._rooms.items() if room.handoff is not None}
        assert labels == self._handoffs, "rooms and hand-offs disagree"
        legs = {room.leg.key: number for number, room in self._rooms.items() if room.leg is not None}
        assert legs == self._legs, "rooms and legs disagree"
        kept = sum(room.outcome.nbytes for room in self._rooms.values() if isinstance(room.outcome, Result))
        assert kept == self._kept, f"{self._kept} bytes are kept, {kept} counted"
        armed = {entry[1:] for entry in self._expiry}
        for number, room in self._rooms.items():
            assert room.leg or room.session is not None or room.handoff or room.outcome, f"room {number} is empty"
            assert not (room.leg and room.outcome), f"room {number} has a leg and its answer"
            assert room.handoff is not None or (room.serial, number) in armed, f"nothing ends room {number}"
        lost = self._handoffs.keys() - set(open_handoffs)
        assert not lost, f"rooms wait for hand-offs that are over: {lost}"
