"""The hand-off against a hostile world: random interleavings of instances that die, freeze and come back.

`pd.testing.handoff_world` says what is checked. The mutants below leave out one rule each; that the world finds every
one of them within 500 interleavings shows that the checks bite.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pd import messages as m
from pd.scheduler.decode_peers import Peer, Sender
from pd.scheduler.decode_table import Attempt, DecodeState
from pd.scheduler.handoff import DECODE_TABLE, PREFILL_TABLE, DecodeHandoffs, PrefillHandoffs
from pd.scheduler.prefill_table import LIVE, Handoff, PrefillEvent
from pd.testing.handoff_data import Violation
from pd.testing.handoff_world import World
from pd.types import HandoffId

WORLDS = 20  # interleavings per example
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # a smaller seed is not a simpler world


def run(seed: int) -> World:
    try:
        return World(seed).run()
    except Violation:
        return World(seed, trace=True).run()  # the same again, with the story


@settings(phases=NO_SHRINKING)
@given(st.integers(0, 1 << 48))
def test_every_interleaving_keeps_its_books_and_comes_to_rest(seed: int) -> None:
    for i in range(WORLDS):
        run(seed * WORLDS + i)


@pytest.mark.parametrize("part", range(10))
def test_five_thousand_interleavings_keep_their_books(part: int) -> None:
    for seed in range(500 * part, 500 * (part + 1)):
        run(seed)


def test_the_same_seed_is_the_same_story() -> None:
    stories = []
    for _ in range(2):
        world = World(7, trace=True).run()
        assert world.log is not None
        stories.append(list(world.log))
    assert stories[0] == stories[1]


def test_the_world_gets_everywhere() -> None:
    """Every transition that a run can reach is reached, or the checks say less than they seem to."""
    seen: set[tuple[Any, Any]] = set()

    def watched(kind: type[Any]) -> type[Any]:
        class Watched(kind):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                inner = self._handler

                def handler(state: Any, event: Any) -> Any:
                    seen.add((state, event))
                    return inner(state, event)

                self._handler = handler

        return Watched

    decode, prefill = watched(DecodeHandoffs), watched(PrefillHandoffs)
    outcomes: dict[str, int] = {}
    for seed in range(400):
        world = World(seed, decode_machine=decode, prefill_machine=prefill).run()
        for outcome, count in world.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    assert outcomes["served"] > sum(outcomes.values()) / 3
    assert {"client left", "deadline", "failed", "local", "instance died"} <= set(outcomes)
    names = {f"{state.name} {event.name}" for state, event in seen}
    for state, events in {
        "ASKED": "FIRST_TOKEN REFUSED FAILED LOST LEFT EXPIRED",
        "LANDING": "LANDED FAILED LOST LEFT",
        "VERIFYING": "VERIFIED LOST",
        "DRAINING": "FIRST_TOKEN FAILED LANDED CANCELLED OVER LOST REVOKED",
        "QUARANTINED": "CANCELLED OVER REVOKED EXPELLED",
        "CLOSED": "FIRST_TOKEN CANCELLED REVOKED PREFILL CANCEL ACK",
        "QUEUED": "CANCEL FAIL LOST STARTED",
        "RUNNING": "PREFILL CANCEL FIRST_TOKEN FAIL PUSHED LOST COMPUTED",
        "COMPUTED": "CANCEL FAIL PUSHED LOST",
        "LANDED": "ACK CANCEL LOST",
        "STOPPING": "CANCEL LOST FAIL PUSHED DROPPED RESET BROKEN",
    }.items():
        for event in events.split():
            assert f"{state} {event}" in names


class CountedDecode(DecodeHandoffs):
    """Compares its figures with what it was asked."""

    asked = 0

    def _ask(self, *args: Any) -> HandoffId:
        self.asked += 1
        return super()._ask(*args)

    def audit(self) -> Any:
        pending = (DecodeState.ASKED, DecodeState.LANDING, DecodeState.VERIFYING)
        left = self.asked - sum(a.state in pending for a in self._open.values())
        if sum(self.outcomes.values()) != left:
            raise Violation(f"{left} hand-offs have left their requests, counted: {self.outcomes}")
        return super().audit()


class CountedPrefill(PrefillHandoffs):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[HandoffId] = set()

    def _asked(self, now: float, session: Any, message: m.Prefill) -> None:
        if message.id not in self._closed:  # cancelled before it came
            self.asked.add(message.id)
        super()._asked(now, session, message)

    def audit(self) -> Any:
        over = len(self.asked) - sum(h.state in LIVE for h in self._open.values())
        if sum(self.outcomes.values()) != over:
            raise Violation(f"{over} hand-offs are over, counted: {self.outcomes}")
        return super().audit()


def test_every_hand_off_is_counted_once_by_how_it_ended() -> None:
    for seed in range(150):
        World(seed, decode_machine=CountedDecode, prefill_machine=CountedPrefill).run()


def test_no_transition_is_left_undefined() -> None:
    assert DECODE_TABLE.undefined() == [] and PREFILL_TABLE.undefined() == []


# --- mutants ---


class WithoutIds(DecodeHandoffs):
    """A message about any attempt of a request is taken for the current one; generations are not compared."""

    def _find(self, id: HandoffId, peer: Peer) -> Attempt | None:
        for attempt in self._open.values():
            if attempt.id.counter == id.counter and attempt.state in (DecodeState.ASKED, DecodeState.LANDING):
                return attempt
        return super()._find(id, peer)

    def _verified(self, now: float, a: Attempt, event: m.TransferVerified) -> None:
        a.generations = [self.pool.generation[b] for b in a.blocks]
        super()._verified(now, a, event)


class WithoutQuarantine(DecodeHandoffs):
    """Blocks are free when their sender's session is lost."""

    def _lost_draining(self, now: float, a: Attempt, reason: str) -> None:
        a.unquiet.clear()
        self._release_if_quiet(a)


class WithoutIncarnations(DecodeHandoffs):
    """A restarted instance speaks for the one that it replaces."""

    def _of(self, sender: Sender) -> list[Attempt]:
        return [a for a in self._open.values() if a.sender.instance == sender.instance]


class TrustingRevoke(DecodeHandoffs):
    """A revoke that could not promise quiet is taken for one that did."""

    def _rank_quiet(self, now: float, a: Attempt, event: Any) -> None:
        event.quiet = True
        super()._rank_quiet(now, a, event)


class FailedIsRefused(DecodeHandoffs):
    """A grant is used again although something may have been written."""

    def _failed(self, now: float, a: Attempt, message: m.Failed) -> None:
        self._refused(now, a, m.Refused(message.id, "busy"))


class WithoutWriteDone(PrefillHandoffs):
    """Landed is said when everything is computed, whatever is still in flight. (It hides that from its own audit.)"""

    def _writes_left(self, h: Handoff) -> bool:
        return bool(h.missing)

    def audit(self) -> dict[str, list[HandoffId]]:
        states: dict[str, list[HandoffId]] = {}
        for h in self._open.values():
            states.setdefault(h.state.value, []).append(h.id)
        return states


class FailedIsQuiet(PrefillHandoffs):
    """A push that failed is taken for one that has ended."""

    def _reported(self, now: float, event: Any, kind: PrefillEvent) -> None:
        super()._reported(now, event, PrefillEvent.DROPPED if kind is PrefillEvent.BROKEN else kind)


class CancelledAtOnce(PrefillHandoffs):
    """Cancelled is said, and sources are given back, while writes are in flight."""

    def _close_if_quiet(self, now: float, h: Handoff, _: Any) -> None:
        for index in list(h.pushes):
            self._ended(index)
        super()._close_if_quiet(now, h, _)


class ResetEndsAll(PrefillHandoffs):
    """A reset is taken to end pushes that the runner has not got yet."""

    def _posted(self, index: int) -> bool:
        return True


class WithoutLinger(PrefillHandoffs):
    """Cancelled is said right after a reset, while the network still holds bytes."""

    def _settle(self, now: float, h: Handoff, _: Any) -> None:
        self._close_if_quiet(now, h, _)


@pytest.mark.parametrize(
    "mutant",
    [
        WithoutIds,
        WithoutQuarantine,
        WithoutIncarnations,
        TrustingRevoke,
        FailedIsRefused,
        WithoutWriteDone,
        FailedIsQuiet,
        CancelledAtOnce,
        ResetEndsAll,
        WithoutLinger,
    ],
)
def test_a_machine_that_leaves_out_one_rule_is_found_out(mutant: type[Any]) -> None:
    side = "decode_machine" if issubclass(mutant, DecodeHandoffs) else "prefill_machine"
    machines: dict[str, Any] = {side: mutant}
    with pytest.raises(Violation):
        for seed in range(500):
            World(seed, **machines).run()
