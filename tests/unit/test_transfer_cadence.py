"""When a backend is driven: often while something may be written, seldom otherwise, and at once after a rest."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pd.messages import Push, TransferConnect, TransferConnected, TransferGrant, TransferPush, TransferRevoke
from pd.transfer import cadence
from pd.transfer.cadence import LINGER, OFTEN, SELDOM, Cadence
from tests.transfer_kit import Engine, i32

MS = 1e-3


class Driven:
    """A cadence on a clock that goes as far as it says, and when it called."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now, self.calls, self.active = now, [], False
        self.cadence = Cadence(lambda: self.calls.append(self.now), lambda: self.active)

    def run(self, seconds: float) -> int:
        """Sleep as long as it says for so many seconds; how often it called."""
        before, end = len(self.calls), self.now + seconds
        while (due := self.now + self.cadence.turn(self.now)) < end:
            self.now = due
        self.now = end
        return len(self.calls) - before


def test_the_figures_are_those_that_the_interface_promises():
    assert (OFTEN, SELDOM) == (1 * MS, 20 * MS)


def test_while_nothing_may_be_written_it_calls_seldom():
    driven = Driven()
    assert 49 <= driven.run(1.0) <= 51


def test_while_something_may_be_written_it_calls_every_millisecond():
    driven = Driven()
    driven.active = True
    assert 990 <= driven.run(1.0) <= 1001


@pytest.mark.parametrize("rested", [1 * MS, 7 * MS, 19.9 * MS])
def test_what_begins_after_a_rest_is_driven_at_once(rested):
    driven = Driven()
    driven.run(1.0)
    start = driven.now = driven.calls[-1] + rested
    driven.active = True
    driven.cadence.turn(driven.now)
    assert driven.calls[-1] == start


def test_it_never_calls_twice_within_a_millisecond_however_often_it_is_woken():
    driven = Driven()
    driven.active = True
    for _ in range(1000):
        driven.cadence.turn(driven.now)
        driven.now += 0.1 * MS
    assert 90 <= len(driven.calls) <= 101


def test_it_goes_on_for_a_moment_when_a_hand_off_is_over():
    driven = Driven()
    driven.active = True
    driven.run(0.5)
    driven.active = False
    assert LINGER / OFTEN - 2 <= driven.run(LINGER) <= LINGER / OFTEN + 2
    driven.run(SELDOM)
    assert 49 <= driven.run(1.0) <= 51


def test_it_says_how_long_until_the_next_call():
    driven = Driven()
    assert driven.cadence.turn(driven.now) == pytest.approx(SELDOM)
    assert driven.cadence.turn(driven.now + 5 * MS) == pytest.approx(15 * MS)
    driven.active = True
    assert driven.cadence.turn(driven.now + 5 * MS) == pytest.approx(OFTEN)
    assert driven.cadence.turn(driven.now + 5.4 * MS) == pytest.approx(0.6 * MS)


# --- in the engine, where what is called seldom is never called again ---


@pytest.fixture(autouse=True)
def never(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "concurrent" in request.fixturenames:
        monkeypatch.setattr(cadence, "SELDOM", 3600.0)
        monkeypatch.setattr(cadence, "LINGER", 0.01)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(MS)


def rests(engine: Engine) -> bool:
    before = engine.backend.progressed
    time.sleep(0.1)
    return engine.backend.progressed == before


def driven_on(engine: Engine) -> Callable[[], bool]:
    count = engine.backend.progressed
    return lambda: engine.backend.progressed >= count + 20


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_receiver_is_driven_while_a_hand_off_may_be_written_there(concurrent):
    with Engine("D", needs_progress=True, concurrent_posts=concurrent) as there:
        until(lambda: there.backend.progressed == 1)
        for tag in (1, 2):
            there.port.give(TransferGrant("P", tag, i32(2)))
            until(driven_on(there))
            there.ask(TransferRevoke("P", tag, over=True))
            until(lambda: rests(there))


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_sender_is_driven_while_a_push_is_under_way(concurrent):
    network = {}
    with Engine("D", network) as there, Engine("P", network, needs_progress=True, concurrent_posts=concurrent) as here:
        here.backend.automatic = False
        assert here.ask(TransferConnect("D", there.engine.descriptor())) == TransferConnected("D")
        until(lambda: rests(here))
        for index in range(2):
            here.port.give(TransferPush(Push("D", 7, index, i32(1), i32(2))))
            until(driven_on(here))
            here.backend.apply(here.backend.tickets[-1])
            assert here.port.next().index == index
            until(lambda: rests(here))


def test_a_backend_that_drives_itself_is_never_driven():
    with Engine("D") as there:
        there.port.give(TransferGrant("P", 1, i32(2)))
        there.ask(TransferRevoke("P", 1, over=True))
        assert there.backend.progressed == 0
