"""Prefill and decode schedulers behind a router that sends the request to both: the leg of the prefill instance."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pd import messages as m
from pd.scheduler import events as ev
from pd.testing.fake_runner import reference_tokens
from pd.testing.instance import Client, Instance
from pd.testing.instance import settings as instance_settings
from pd.testing.sim_cluster import Node, SimCluster, SimConfig
from pd.types import FinishReason, Role, SamplingParams

SCENARIOS = int(os.environ.get("PD_TEST_SCENARIOS", "400")) // 4
TIMEOUT = 3.0


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def world(prefills: int = 1, decodes: int = 1, local: str = "never", **scheduler: object) -> SimCluster:
    options = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": local, **scheduler}
    control: dict[str, object] = {"heartbeat_interval": 0.5, "bootstrap_timeout": TIMEOUT}
    return SimCluster(1, SimConfig(prefills, decodes, scheduler=options, control=control))


def both(sim: SimCluster, length: int = 19, count: int = 6, room: int = 7, **more: object) -> tuple[Client, Client]:
    """A request's two legs, sent at once: (prefill's, decode's)."""
    leg = sim.submit_leg(sim.nodes["p0"], prompt(length), count, room, **more)  # type: ignore[arg-type]
    return leg, sim.submit(sim.nodes["d0"], prompt(length), count, room=room, prefills=["tcp://p0:1"], **more)  # type: ignore[arg-type]


def finish(sim: SimCluster, rest: float = 1.0) -> None:
    assert sim.settle(20), "a request never ended"
    sim.check_answers()
    sim.check_digests()
    sim.run(sim.now + rest)
    sim.check_rest()


def ended(client: Client) -> tuple[FinishReason, int]:
    assert client.finish is not None, client
    return client.finish.reason, client.finish.status


def rooms(sim: SimCluster, name: str = "p0") -> int:
    side = sim.nodes[name].scheduler.prefill
    assert side is not None
    return len(side.rooms)


OK = (FinishReason.LENGTH, 200)


# --- joining --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["leg", "decode", "leg, long", "decode, long"])
def test_the_leg_gets_the_first_token_whichever_leg_comes_first(first: str) -> None:
    sim = world()
    pause = 1.0 if "long" in first else 0.0

    def leg() -> Client:
        return sim.submit_leg(sim.nodes["p0"], prompt(19), 6, 7)

    if first.startswith("leg"):
        at_prefill = leg()
        sim.run(pause)
    client = sim.submit(sim.nodes["d0"], prompt(19), 6, room=7, prefills=["tcp://p0:1"])
    if first.startswith("decode"):
        sim.run(pause)
        at_prefill = leg()
    finish(sim)
    assert ended(at_prefill) == ended(client) == OK
    want = reference_tokens(prompt(19), SamplingParams(), 6)
    assert (at_prefill.tokens, client.tokens) == (want[:1], want)
    assert rooms(sim) == 0
    core = sim.nodes["p0"].scheduler.core
    assert core is not None and core.stats.computed == 19, "the prompt is computed once"


def test_the_leg_is_answered_at_the_first_token_not_when_the_blocks_have_landed() -> None:
    sim = world()
    sim.config.write_delay = (2.0, 2.0)
    leg, client = both(sim)
    sim.run(0.5)
    assert leg.ended and not client.ended
    finish(sim, rest=4.0)


def test_a_leg_that_ends_with_its_first_token_says_why() -> None:
    sim = world()
    (stop,) = reference_tokens(prompt(19), SamplingParams(), 1)
    leg, client = both(sim, stop=(stop,))
    finish(sim)
    assert leg.finish == client.finish == m.Finish(FinishReason.STOP, stop_id=stop)


def test_the_leg_has_the_cached_count_of_the_hand_off() -> None:
    sim = world()
    both(sim)
    finish(sim)
    leg, client = both(sim, room=8)
    finish(sim)
    assert leg.started is not None and client.started is not None
    assert leg.started.cached_tokens == client.started.cached_tokens == 16


def test_a_room_is_never_prefilled_on_decode_for_being_short() -> None:
    sim = world(local="short:100")
    leg, client = both(sim)
    finish(sim)
    assert ended(leg) == ended(client) == OK
    core = sim.nodes["d0"].scheduler.core
    assert core is not None and core.stats.computed == 0


# --- a leg alone ----------------------------------------------------------------------------------------------------


def test_a_leg_that_no_decode_instance_asks_for_fails_within_the_bootstrap_timeout() -> None:
    sim = world()
    leg = sim.submit_leg(sim.nodes["p0"], prompt(9), 4, 7)
    sim.run(TIMEOUT - 0.1)
    assert not leg.ended
    sim.run(TIMEOUT + 0.1)
    assert ended(leg) == (FinishReason.ERROR, 504)
    finish(sim)
    assert rooms(sim) == 0


def test_without_a_room_a_prefill_instance_sends_the_client_elsewhere() -> None:
    one = Instance(instance_settings(Role.PREFILL))
    client = one.submit(1, [1, 2, 3])
    assert client.rejected is not None and client.rejected.status == 400
    assert "decode instance or the router" in client.rejected.message


def test_legs_are_checked_and_counted_before_they_wait() -> None:
    one = Instance(instance_settings(Role.PREFILL, max_queued_requests=2))
    strange, long = one.submit(1, [70_000], room=1), one.submit(2, [1] * 256, room=2)
    assert [(c.rejected.status, c.rejected.param) for c in (strange, long) if c.rejected] == [(400, "prompt")] * 2
    many = one.submit(3, [1] * 200, max_tokens=3000, room=3)
    assert not many.ended, "decode alone knows how much it can hold"
    one.submit(4, [1], room=4)
    third = one.submit(5, [1], room=5)
    assert third.rejected is not None and third.rejected.status == 503


def test_a_draining_prefill_instance_fails_legs_that_nobody_has_asked_for() -> None:
    sim = world()
    leg = sim.submit_leg(sim.nodes["p0"], prompt(9), 4, 7)
    sim.nodes["p0"].event(lambda now: ev.DrainRequested(now, 5.0))
    assert ended(leg) == (FinishReason.ERROR, 503)
    assert sim.nodes["p0"].exit is not None and sim.nodes["p0"].exit.code == 0


def test_a_leg_whose_hand_off_runs_is_answered_while_the_instance_drains() -> None:
    sim = world()
    leg, client = both(sim)
    sim.run(0.01)
    sim.nodes["p0"].event(lambda now: ev.DrainRequested(now, 5.0))
    sim.settle(10)
    assert ended(leg) == ended(client) == OK


def test_a_leg_whose_client_waits_as_long_as_its_room_ends_once() -> None:
    sim = world()
    leg = sim.submit_leg(sim.nodes["p0"], prompt(9), 4, 7, timeout=TIMEOUT)
    sim.run(TIMEOUT + 0.1)
    assert ended(leg) == (FinishReason.ERROR, 504)
    finish(sim)
    assert rooms(sim) == 0


def test_a_leg_may_have_more_choices_than_a_prefill_instance_runs_requests() -> None:
    sim = SimCluster(1, SimConfig(control={"bootstrap_timeout": TIMEOUT}))
    prefill = sim.nodes["p0"].scheduler
    limits = replace(prefill.settings.scheduler, max_running_requests=1)
    prefill.settings = replace(prefill.settings, scheduler=limits)
    leg, client = both(sim, choices=4)
    finish(sim)
    assert [ended(choice) for choice in (*leg.choices, *client.choices)] == [OK] * 8


# --- decode answers without this instance ---------------------------------------------------------------------------


def test_after_a_local_fallback_the_leg_gets_what_decode_computed() -> None:
    sim = world(local="fallback")
    both(sim)
    finish(sim)
    side = sim.nodes["p0"].scheduler.prefill
    assert side is not None
    sim.config.step_time = (1.0, 1.0)
    leg, client = both(sim, room=8)
    sim.run(sim.now + 0.1)
    (id,) = side._requests
    side.handoffs.fail(sim.now, id, "a push failed", retryable=True)
    sim.config.step_time = (0.001, 0.001)
    finish(sim, rest=4.0)
    assert ended(leg) == ended(client) == OK
    assert leg.tokens == client.tokens[:1]
    core = sim.nodes["d0"].scheduler.core
    assert core is not None and core.stats.computed > 0


def test_between_a_hand_off_that_failed_and_decodes_own_answer_the_leg_waits() -> None:
    sim = world(local="fallback")
    both(sim)
    finish(sim)
    sim.config.step_time = (0.3, 0.3)
    leg, client = both(sim, room=8)
    sim.run(sim.now + 0.1)
    side = sim.nodes["p0"].scheduler.prefill
    assert side is not None
    (id,) = side._requests
    sim.freeze(sim.nodes["d0"])
    side.handoffs.fail(sim.now, id, "a push failed", retryable=True)
    sim.run(sim.now + 0.6)
    assert side.handoffs.quiet and not leg.ended, "the hand-off is over, and its label with it"
    sim.thaw(sim.nodes["d0"])
    finish(sim, rest=TIMEOUT)
    assert ended(leg) == ended(client) == OK


def test_when_decode_gives_up_the_leg_says_why_at_once() -> None:
    sim = world(local="never")
    both(sim)
    finish(sim)
    sim.config.step_time = (1.0, 1.0)
    leg, client = both(sim, room=8)
    sim.run(sim.now + 0.1)
    side = sim.nodes["p0"].scheduler.prefill
    assert side is not None
    (id,) = side._requests
    side.handoffs.fail(sim.now, id, "out of luck", retryable=False)
    sim.run(sim.now + 0.2)
    assert ended(client)[0] is ended(leg)[0] is FinishReason.ERROR
    assert leg.finish is not None and "out of luck" in leg.finish.message
    finish(sim, rest=4.0)


def test_when_decode_does_not_even_queue_the_request_the_leg_says_so_at_once() -> None:
    sim = world(max_queued_requests=1)
    both(sim)
    finish(sim)
    decode = sim.nodes["d0"].scheduler
    limits = replace(decode.settings.scheduler, max_queued_requests=0)
    decode.settings = replace(decode.settings, scheduler=limits)
    leg, client = both(sim, room=8)
    sim.run(sim.now + 0.1)
    assert client.rejected is not None and client.rejected.status == 503
    assert ended(leg) == (FinishReason.ERROR, 503)


@pytest.mark.parametrize("first", [True, False], ids=["before there is a session", "with a session"])
def test_when_decode_cannot_use_the_grammar_the_leg_says_so_at_once(first: bool) -> None:
    sim = world()
    sim.config.unusable = frozenset({"g"})
    if not first:
        both(sim, room=6)
        finish(sim)
    leg, client = both(sim, grammar="g", choices=2)
    sim.run(sim.now + 0.1)
    assert [ended(choice) for choice in (*leg.choices, *client.choices)] == [(FinishReason.ERROR, 400)] * 4
    finish(sim, rest=TIMEOUT + 5)
    assert rooms(sim) == 0


def test_an_answer_for_a_leg_whose_instance_is_out_of_reach_is_not_kept() -> None:
    sim = world()
    sim.config.unusable = frozenset({"g"})
    sim.kill(sim.nodes["p0"])
    client = sim.submit(sim.nodes["d0"], prompt(9), 4, room=7, prefills=["tcp://p0:1"], grammar="g")
    finish(sim)
    decode = sim.nodes["d0"].scheduler.decode
    assert client.ended and decode is not None and not decode._undelivered and not decode._owed


def test_a_leg_fails_at_once_when_its_decode_instance_dies_while_it_compiles_the_grammar() -> None:
    sim = world()
    sim.config.compile_time = (1.0, 1.0)
    leg, _ = both(sim, grammar="g")
    sim.run(0.5)
    sim.kill(sim.nodes["d0"])
    sim.run(0.6)
    assert ended(leg) == (FinishReason.ERROR, 503)
    finish(sim)


def test_the_leg_of_a_request_that_an_operator_aborts_fails_with_an_error_that_is_not_tried_again() -> None:
    sim = world()
    sim.config.step_time = (0.5, 0.5)
    leg, client = both(sim)
    sim.run(0.1)
    sim.command(sim.nodes["d0"], m.AbortMatching(1, ""))
    sim.run(0.2)
    assert ended(client)[0] is FinishReason.ABORT and ended(leg) == (FinishReason.ERROR, 409)
    finish(sim)


def test_when_the_blocks_do_not_come_after_the_first_tokens_the_leg_keeps_its_answer() -> None:
    sim = world(prefills=2)
    sim.config.write_delay = (2.0, 2.0)
    leg = sim.submit_leg(sim.nodes["p0"], prompt(19), 6, 7, choices=3)
    names = ["tcp://p1:1", "tcp://p0:1"]
    client = sim.submit(sim.nodes["d0"], prompt(19), 6, room=7, prefills=names[1:], choices=3)
    sim.run(0.5)
    assert [ended(choice) for choice in leg.choices] == [OK] * 3 and not client.ended
    sim.config.write_delay = (0.001, 0.002)
    side = sim.nodes["p0"].scheduler.prefill
    assert side is not None
    (id,) = side._requests
    side.handoffs.fail(sim.now, id, "a push failed", retryable=True)
    finish(sim, rest=5.0)
    assert [choice.finish.status for choice in client.choices if choice.finish] == [503] * 3, "its one instance failed"
    assert rooms(sim) == 0 and rooms(sim, "p1") == 0


# --- ends -----------------------------------------------------------------------------------------------------------


def test_a_dropped_leg_cancels_the_hand_off_and_decode_says_so() -> None:
    sim = world(local="fallback")
    both(sim)
    finish(sim)
    sim.config.step_time = (0.5, 0.5)
    leg, client = both(sim, length=40, room=8)
    sim.run(sim.now + 0.1)
    sim.abort(leg)
    sim.run(sim.now + 0.1)
    assert ended(client) == (FinishReason.ERROR, 499)
    assert client.finish is not None and "the client of its prefill leg has gone" in client.finish.message
    finish(sim, rest=TIMEOUT)
    assert rooms(sim) == 0


def test_a_leg_that_is_dropped_before_decode_asks_is_simply_forgotten() -> None:
    sim = world()
    leg = sim.submit_leg(sim.nodes["p0"], prompt(19), 6, 7)
    sim.abort(leg)
    client = sim.submit(sim.nodes["d0"], prompt(19), 6, room=7, prefills=["tcp://p0:1"])
    finish(sim, rest=TIMEOUT + 0.1)
    assert ended(client) == OK and rooms(sim) == 0


def test_when_the_client_leaves_decode_the_leg_ends_at_once() -> None:
    sim = world()
    both(sim)
    finish(sim)
    sim.config.step_time = (0.5, 0.5)
    leg, client = both(sim, room=8)
    sim.run(sim.now + 0.1)
    sim.abort(client)
    sim.run(sim.now + 0.1)
    assert ended(leg) == (FinishReason.ERROR, 499)
    finish(sim, rest=TIMEOUT)


@pytest.mark.parametrize("queued", [False, True], ids=["asked", "still queued on decode"])
def test_a_leg_fails_at_once_when_its_decode_instance_dies(queued: bool) -> None:
    sim = world(max_running_requests=1)
    both(sim)
    finish(sim)
    sim.config.step_time = (0.5, 0.5)
    legs = [both(sim, room=8)[0]]
    if queued:
        legs.append(both(sim, room=9)[0])
    sim.run(sim.now + 0.1)
    sim.kill(sim.nodes["d0"])
    sim.run(sim.now + 0.1)
    assert [ended(leg) for leg in legs] == [(FinishReason.ERROR, 503)] * len(legs)
    finish(sim, rest=2.0)


def test_a_request_that_waits_while_the_instances_meet_is_made_known_then() -> None:
    sim = world(max_running_requests=1)
    sim.config.step_time = (0.5, 0.5)
    legs = [both(sim, room=room)[0] for room in (8, 9)]
    sim.run(0.1)
    assert len(sim.sessions) == 1
    sim.kill(sim.nodes["d0"])
    sim.run(0.2)
    assert [ended(leg) for leg in legs] == [(FinishReason.ERROR, 503)] * 2
    finish(sim, rest=2.0)


def test_a_leg_fails_at_once_when_the_session_with_its_decode_instance_is_lost() -> None:
    sim = world(local="fallback")
    both(sim)
    finish(sim)
    sim.config.step_time = (0.5, 0.5)
    leg, client = both(sim, room=8)
    sim.run(sim.now + 0.1)
    (session,) = sim.sessions.values()
    sim.lose(session)
    sim.run(sim.now + 0.05)
    assert ended(leg) == (FinishReason.ERROR, 503)
    finish(sim, rest=TIMEOUT)
    assert ended(client) == OK, "decode goes on by itself"


def test_a_leg_has_its_clients_deadline() -> None:
    sim = world()
    leg = sim.submit_leg(sim.nodes["p0"], prompt(9), 4, 7, timeout=1.0)
    sim.run(1.2)
    assert ended(leg) == (FinishReason.ERROR, 504)
    finish(sim)


def test_a_replayed_request_asks_without_its_room() -> None:
    sim = SimCluster(1, SimConfig(num_blocks=13, scheduler={"local_prefill": "never"}, control={}))
    clients = []
    for room in range(4):
        sim.submit_leg(sim.nodes["p0"], prompt(8, room), 24, room)
        clients.append(sim.submit(sim.nodes["d0"], prompt(8, room), 24, room=room, prefills=["tcp://p0:1"]))
    finish(sim)
    core = sim.nodes["d0"].scheduler.core
    assert core is not None and core.batcher.retractions > 0
    assert {ended(client) for client in sim.clients.values()} == {OK}
    assert rooms(sim) == 0, "no first token is kept for a leg that has been answered"


# --- a room that is used again --------------------------------------------------------------------------------------


def test_a_second_try_with_the_same_room_works_whatever_became_of_the_first() -> None:
    sim = world(decodes=2)
    sim.config.step_time = (0.2, 0.2)
    first, other = both(sim)
    sim.run(0.1)
    sim.kill(sim.nodes["d0"])
    sim.run(0.3)
    assert ended(first)[0] is ended(other)[0] is FinishReason.ERROR
    client = sim.submit(sim.nodes["d1"], prompt(19), 6, room=7, prefills=["tcp://p0:1"])
    leg = sim.submit_leg(sim.nodes["p0"], prompt(19), 6, 7)
    finish(sim, rest=2.0)
    assert ended(leg) == ended(client) == OK


def test_two_requests_with_one_room_end_and_none_gets_the_others_token() -> None:
    sim = world()
    for seed in (1, 2):
        sim.submit_leg(sim.nodes["p0"], prompt(11, seed), 3, 7, seed=seed)
        sim.submit(sim.nodes["d0"], prompt(11, seed), 3, room=7, prefills=["tcp://p0:1"], seed=seed)
    finish(sim, rest=TIMEOUT + 0.1)
    assert rooms(sim) == 0


# --- whatever fails -------------------------------------------------------------------------------------------------


def _fault(sim: SimCluster, rnd: random.Random) -> None:
    draw, node = rnd.random(), rnd.choice(list(sim.nodes.values()))
    if draw < 0.08 and node.alive:
        sim.kill(node)
        sim.later(rnd.random(), lambda: sim.nodes[node.name] is node and sim.restart(node))
    elif draw < 0.16 and node.alive and not node.frozen:
        sim.freeze(node)
        sim.later(rnd.random() * 4, lambda: sim.thaw(node))
    elif draw < 0.24 and sim.sessions:
        sim.lose(rnd.choice(list(sim.sessions.values())))
    elif draw < 0.44:
        running = [c for c in sim.clients.values() if not c.ended]
        if running:
            sim.abort(rnd.choice(running))


def scenario(seed: int, faults: bool) -> SimCluster:
    """Requests of two legs each, apart in time, with rooms that are sometimes used again."""
    rnd = random.Random(seed)
    config = SimConfig(
        prefills=rnd.choice([1, 2]),
        decodes=rnd.choice([1, 2]),
        num_blocks=rnd.choice([33, 65]),
        scheduler={
            "chunked_prefill_size": rnd.choice([4, 8]),
            "max_prefill_tokens": rnd.choice([16, 32]),
            "max_running_requests": rnd.choice([2, 8]),
            "local_prefill": rnd.choice(["never", "fallback", "short:6"]),
        },
        control={"heartbeat_interval": 0.5, "bootstrap_timeout": TIMEOUT},
    )
    sim = SimCluster(seed, config)

    def nodes(role: Role) -> list[Node]:
        return [n for n in sim.nodes.values() if n.role is role]

    for number in range(rnd.randrange(2, 12)):
        tokens, count = [rnd.randrange(100) for _ in range(rnd.randrange(1, 24))], rnd.randrange(1, 12)
        room = number if not faults or rnd.random() < 0.8 else rnd.randrange(3)
        prefill = rnd.choice(nodes(Role.PREFILL))
        decode = rnd.choice(nodes(Role.DECODE))
        more = {"room": room, "seed": number}
        halves = [
            partial(sim.submit_leg, prefill, tokens, count, **more),
            partial(sim.submit, decode, tokens, count, prefills=[prefill.endpoint], **more),
        ]
        rnd.shuffle(halves)
        for half in halves:
            if faults and rnd.random() < 0.1:
                continue  # the router could not send it
            half()
            sim.run(sim.now + rnd.random() * rnd.choice([0.001, 0.02]))
            if faults:
                _fault(sim, rnd)
    assert sim.settle(60), "a request never ended"
    sim.check_answers()
    sim.check_digests()
    sim.run(sim.now + 40)
    sim.check_rest()
    for node in nodes(Role.PREFILL):
        assert not rooms(sim, node.name)
    return sim


@settings(max_examples=SCENARIOS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_whatever_fails_every_leg_ends_and_no_answer_is_wrong(seed: int) -> None:
    scenario(seed, faults=True)


@settings(max_examples=SCENARIOS // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_without_faults_both_legs_are_answered(seed: int) -> None:
    sim = scenario(seed, faults=False)
    for client in sim.clients.values():
        assert client.finish is not None and client.finish.reason is FinishReason.LENGTH, client
