"""Rooms: a leg and its hand-off find each other in any order, and nothing is waited for without end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd.messages import FirstChoice, PromptLogprobs
from pd.scheduler.rooms import KEEP_PROBLEM, Leg, Outcome, Problem, Result, Rooms, Settled, label_of
from pd.types import HandoffId

TIMEOUT = 10.0
ONE, OTHER = label_of(b"one prompt"), label_of(b"other prompt")
FIRST, SECOND = HandoffId(1, 1, 0), HandoffId(1, 2, 0)


def result(token: int = 7) -> Result:
    return Result((FirstChoice(token),))


def rooms() -> Rooms:
    return Rooms(TIMEOUT)


def settled(found: Rooms) -> dict[int, Outcome]:
    """By key; every leg at most once. Leaves a consistent state behind."""
    taken = found.take()
    outcomes = {one.key: one.outcome for one in taken}
    assert len(outcomes) == len(taken)
    return outcomes


def status(found: Rooms, key: int) -> int:
    """The status of the only leg that is settled, which is `key`."""
    ((got, outcome),) = settled(found).items()
    assert got == key and isinstance(outcome, Problem), outcome
    return outcome.status


# --- joining --------------------------------------------------------------------------------------------------------


def test_a_leg_that_came_first_is_answered_with_the_first_token() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.asked(1.0, 5, FIRST, 3, ONE)
    assert r.take() == []
    r.first_token(2.0, FIRST, result())
    assert r.take() == [Settled(1, result())]
    assert len(r) == r.legs == 0


def test_a_hand_off_that_came_first_waits_for_its_leg() -> None:
    r = rooms()
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.came(1.0, Leg(1, 5, ONE))
    r.first_token(2.0, FIRST, result())
    assert r.take() == [Settled(1, result())] and len(r) == 0


def test_a_first_token_that_came_before_its_leg_is_kept_and_given_out_once() -> None:
    r = rooms()
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.first_token(1.0, FIRST, result())
    r.tick(1.0 + TIMEOUT - 0.1)
    r.came(9.0, Leg(1, 5, ONE))
    assert r.take() == [Settled(1, result())] and len(r) == 0
    r.came(9.0, Leg(2, 5, ONE))
    assert r.take() == [] and r.legs == 1


def test_rooms_do_not_mix() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.came(0.0, Leg(2, 6, OTHER))
    r.asked(0.0, 6, SECOND, 3, OTHER)
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.first_token(1.0, FIRST, result(10))
    assert r.take() == [Settled(1, result(10))]
    r.first_token(1.0, SECOND, result(20))
    assert r.take() == [Settled(2, result(20))]


# --- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [False, True])
def test_a_leg_that_nobody_asks_for_fails_in_time(expected: bool) -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    if expected:
        r.expected(1.0, 5, 3)
    r.tick(TIMEOUT - 0.01)
    assert r.take() == []
    r.tick(TIMEOUT)
    assert status(r, 1) == 504 and len(r) == 0


def test_a_leg_whose_hand_off_runs_is_bounded_by_that_alone() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.asked(1.0, 5, FIRST, 3, ONE)
    r.tick(100 * TIMEOUT)
    assert r.take() == []
    r.stopped(100 * TIMEOUT, FIRST)
    r.tick(101 * TIMEOUT)
    assert status(r, 1) == 504


@pytest.mark.parametrize(("outcome", "wait"), [(result(), TIMEOUT), (Problem(500, "x"), KEEP_PROBLEM)])
def test_what_came_without_its_leg_is_forgotten_in_time(outcome: Outcome, wait: float) -> None:
    r = rooms()
    r.answered(0.0, 5, 3, ONE, outcome)
    r.tick(wait - 0.01)
    assert len(r) == 1
    r.tick(wait)
    assert len(r) == 0


def test_kept_first_tokens_take_bounded_memory_and_the_oldest_go_first() -> None:
    r = Rooms(TIMEOUT, keep_bytes=100_000)
    large = Result((FirstChoice(1),), 0, PromptLogprobs(0, bytes(8000)))
    for number in range(1000):
        r.answered(0.0, number, 3, ONE, large)
        assert r._kept <= 100_000
    assert 0 < len(r) <= 12
    r.came(0.0, Leg(1, 999, ONE))
    assert r.take() == [Settled(1, large)]
    r.audit([])


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
def test_a_leg_fails_at_once_when_its_decode_instance_is_lost(asked: bool) -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.came(0.0, Leg(2, 6, ONE))
    if asked:
        r.asked(1.0, 5, FIRST, 3, ONE)
    else:
        r.expected(1.0, 5, 3)
    r.expected(1.0, 6, 4)
    r.lost(2.0, 3, "killed")
    assert status(r, 1) == 503
    assert r.legs == 1, "the other decode instance lives"


def test_a_leg_that_comes_after_its_decode_instance_was_lost_fails_at_once() -> None:
    r = rooms()
    r.expected(0.0, 5, 3)
    r.lost(1.0, 3, "killed")
    r.came(1.1, Leg(1, 5, ONE))
    assert status(r, 1) == 503


def test_a_first_token_outlives_the_session_that_brought_it() -> None:
    r = rooms()
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.first_token(0.0, FIRST, result())
    r.lost(1.0, 3, "restarted")
    r.came(2.0, Leg(1, 5, ONE))
    assert r.take() == [Settled(1, result())]


def test_after_a_failed_hand_off_the_decode_instance_says_what_became_of_the_request() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.stopped(1.0, FIRST)
    assert r.take() == []
    r.answered(1.1, 5, 3, ONE, result(9))
    assert r.take() == [Settled(1, result(9))]


def test_an_answer_of_the_decode_instance_counts_although_the_hand_off_still_runs() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.answered(1.0, 5, 3, ONE, Problem(500, "no memory"))
    assert status(r, 1) == 500
    r.first_token(1.1, FIRST, result())
    assert len(r) == 0 and r.take() == []


def test_a_leg_that_leaves_names_the_hand_off_that_nobody_wants_any_more() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    assert r.left(0.0, 1) is None and len(r) == 0
    r.came(0.0, Leg(2, 5, ONE))
    r.asked(0.0, 5, FIRST, 3, ONE)
    assert r.left(1.0, 2) == FIRST and len(r) == 0
    r.first_token(1.0, FIRST, result())
    r.stopped(1.0, FIRST)
    assert r.left(1.0, 2) is None and r.take() == []


def test_that_the_client_left_decode_is_not_kept_for_a_leg() -> None:
    r = rooms()
    r.expected(0.0, 5, 3)
    r.answered(0.0, 5, 3, ONE, Problem(499, "gone"))
    assert len(r) == 0


def test_a_draining_instance_fails_the_legs_of_which_no_decode_instance_has_spoken() -> None:
    r = rooms()
    for key in (1, 2, 3):
        r.came(0.0, Leg(key, key, ONE))
    r.expected(0.0, 2, 9)
    r.asked(0.0, 3, FIRST, 9, ONE)
    r.drain()
    assert status(r, 1) == 503 and r.legs == 2


# --- a room that is used again --------------------------------------------------------------------------------------


def test_of_two_legs_with_one_room_the_later_one_counts() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.came(1.0, Leg(2, 5, ONE))
    assert status(r, 1) == 409
    r.first_token(2.0, FIRST, result())
    assert r.take() == [Settled(2, result())]


def test_a_leg_never_gets_the_first_token_of_another_prompt() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.asked(0.0, 5, FIRST, 3, OTHER)
    assert status(r, 1) == 409
    r.came(0.0, Leg(2, 5, ONE))
    r.first_token(1.0, FIRST, result())
    assert r.take() == [] and r.legs == 1
    r.asked(2.0, 5, SECOND, 3, ONE)
    r.first_token(2.0, SECOND, result(8))
    assert r.take() == [Settled(2, result(8))]


def test_an_answer_for_another_prompt_settles_no_leg() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.answered(1.0, 5, 3, OTHER, result())
    r.answered(1.0, 5, 3, OTHER, Problem(500, "no"))
    assert r.take() == [] and r.legs == 1
    r.answered(1.0, 6, 3, OTHER, result())
    r.came(1.0, Leg(2, 6, ONE))
    assert r.take() == [] and r.legs == 2


def test_a_kept_first_token_of_another_prompt_is_dropped() -> None:
    r = rooms()
    r.asked(0.0, 5, FIRST, 3, OTHER)
    r.first_token(0.0, FIRST, result())
    r.came(1.0, Leg(1, 5, ONE))
    assert r.take() == [] and r.legs == 1


def test_a_new_try_forgets_what_the_last_one_left() -> None:
    r = rooms()
    r.answered(0.0, 5, 3, ONE, Problem(500, "the first try"))
    r.expected(1.0, 5, 4)
    r.came(1.0, Leg(1, 5, ONE))
    assert r.take() == []
    r.answered(1.0, 5, 3, ONE, Problem(500, "the first try, late"))
    assert r.take() == [], "another session speaks of the room now"
    r.asked(2.0, 5, FIRST, 4, ONE)
    r.asked(2.0, 5, SECOND, 4, ONE)
    r.first_token(3.0, FIRST, result(1))
    assert r.take() == []
    r.first_token(3.0, SECOND, result(2))
    assert r.take() == [Settled(1, result(2))]


def test_a_room_that_is_expected_again_while_its_hand_off_runs_still_ends() -> None:
    r = rooms()
    r.came(0.0, Leg(1, 5, ONE))
    r.asked(0.0, 5, FIRST, 3, ONE)
    r.tick(2 * TIMEOUT)
    r.expected(2 * TIMEOUT, 5, 4)
    r.audit([])
    r.tick(3 * TIMEOUT)
    assert status(r, 1) == 504


# --- whatever happens -----------------------------------------------------------------------------------------------

STEP = st.tuples(
    st.sampled_from(["came", "left", "asked", "first", "stopped", "expected", "answered", "lost", "drain", "tick"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5, 4.0, TIMEOUT]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_every_leg_is_settled_once_with_what_belongs_to_its_prompt(steps: list[tuple[str, int, int, float]]) -> None:
    """Legs, hand-offs and sessions of few rooms, in any order: the books stay right, and time ends everything."""
    r, now, serial = rooms(), 0.0, 0
    prompts: dict[int, bytes] = {}  # leg -> prompt
    waiting: set[int] = set()
    running: dict[HandoffId, bytes] = {}  # hand-off -> prompt
    for what, a, b, pause in steps:
        now += pause
        serial += 1
        prompt, id = (ONE, OTHER)[b % 2], HandoffId(1, serial, 0)
        pick = sorted(running)[a % len(running)] if running else None
        if what == "came":
            prompts[serial] = prompt
            waiting.add(serial)
            r.came(now, Leg(serial, a, prompt))
        elif what == "left" and waiting:
            key = sorted(waiting)[a % len(waiting)]
            waiting.discard(key)
            dropped = r.left(now, key)
            assert dropped is None or running.pop(dropped) == prompts[key]
        elif what == "asked":
            running[id] = prompt
            r.asked(now, a, id, b, prompt)
        elif what == "first" and pick is not None:
            token = 1 if running.pop(pick) == ONE else 2
            r.first_token(now, pick, result(token))
        elif what == "stopped" and pick is not None:
            del running[pick]
            r.stopped(now, pick)
        elif what == "expected":
            r.expected(now, a, b)
        elif what == "answered":
            answer = result(1 if prompt == ONE else 2) if a % 2 else Problem(500 if pause else 499, "no")
            r.answered(now, a, b, prompt, answer)
        elif what == "lost":
            r.lost(now, b, "lost")
        elif what == "drain":
            r.drain()
        r.tick(now)
        for key, outcome in settled(r).items():
            waiting.remove(key)
            if isinstance(outcome, Result):
                assert outcome.choices[0].token == (1 if prompts[key] == ONE else 2)
        r.audit(running)
        assert r.legs == len(waiting)
    for id in list(running):
        del running[id]
        r.stopped(now, id)
    r.tick(now + TIMEOUT)
    assert set(settled(r)) == waiting
    assert len(r) == 0
    r.audit([])
