"""Abort by id, pause and continue, and health checks that are computed, on the pure scheduler."""

from __future__ import annotations

import random

import pytest

from pd import messages as m
from pd.scheduler import events as ev
from pd.scheduler.actions import Exit, Reply
from pd.scheduler.request import State
from pd.scheduler.state import Scheduler
from pd.testing.fake_runner import reference_tokens
from pd.testing.instance import Instance, runner_ready, settings
from pd.testing.sim_cluster import SimCluster, SimConfig
from pd.types import FinishReason, Role, SamplingParams


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def expected(tokens: list[int], count: int) -> list[int]:
    return reference_tokens(tokens, SamplingParams(), count)


def command(instance: Instance, wish: m.Command) -> dict[str, object]:
    """The answer."""
    actions = instance.handle(ev.Commanded(instance.now, 0, wish))
    (answer,) = [a.message for a in actions if isinstance(a, Reply) and isinstance(a.message, m.Answer)]
    assert answer.token == wish.token
    return answer.data


def submit(instance: Instance, key: int, rid: str, count: int = 50) -> None:
    instance.submit(key, prompt(5, key), count)
    instance.scheduler.core.requests[key].rid = rid  # type: ignore[union-attr]


def reasons(instance: Instance) -> dict[int, str | None]:
    return {key: c.finish.reason.value if c.finish is not None else None for key, c in instance.clients.items()}


def test_an_abort_ends_the_requests_of_that_id_and_the_prompts_of_its_batch_only() -> None:
    instance = Instance()
    for key, rid in enumerate(("a", "a-0", "a-1", "a-b", "ab", "b-a"), 1):
        submit(instance, key, rid)
    assert command(instance, m.AbortMatching(7, "a"))["aborted"] == 3
    ended = {1: "abort", 2: "abort", 3: "abort"}
    assert reasons(instance) == {**ended, 4: None, 5: None, 6: None}
    finish = instance.clients[1].finish
    assert finish is not None and finish.status == 200, "an end as any other, not an error"
    assert command(instance, m.AbortMatching(8, "nobody"))["aborted"] == 0
    assert command(instance, m.AbortMatching(9, ""))["aborted"] == 3
    instance.run()
    instance.audit()
    assert instance.scheduler.core is not None and instance.scheduler.core.idle


@pytest.mark.parametrize("steps", [0, 4])
def test_an_abort_by_a_choices_id_ends_that_choice_alone_whether_it_has_begun_or_not(steps: int) -> None:
    instance = Instance(settings(chunked_prefill_size=4))
    client = instance.submit(1, prompt(9), 9, choices=3)
    other = instance.submit(2, prompt(9, 2), 9)
    for _ in range(steps):
        instance.finish_step()
    assert (client.started is not None) is (steps > 0)
    assert command(instance, m.AbortMatching(1, "r1-3"))["aborted"] == 0, "there are three"
    assert command(instance, m.AbortMatching(2, "r1-" + "1" * 5000))["aborted"] == 0
    assert command(instance, m.AbortMatching(3, "r1-1"))["aborted"] == 1
    instance.run()
    assert [c.finish.reason.value for c in client.choices if c.finish] == ["length", "abort", "length"]
    assert other.tokens == expected(prompt(9, 2), 9)
    assert command(instance, m.AbortMatching(4, "r1-1"))["aborted"] == 0, "it is over"
    instance.audit()


@pytest.mark.parametrize(
    ("rid", "ended"), [("r", [3, 3]), ("r-0", [3, 0]), ("r-1", [0, 3]), ("r-1-2", [0, 1]), ("r-2", [0, 0])]
)
def test_an_abort_of_a_batch_whose_prompts_have_choices_ends_what_its_id_names(rid: str, ended: list[int]) -> None:
    instance = Instance()
    clients = []
    for key in (0, 1):
        clients.append(instance.submit(key, prompt(5, key), 50, choices=3))
        instance.scheduler.core.requests[key].rid = f"r-{key}"  # type: ignore[union-attr]
    for _ in range(5):
        instance.finish_step()
    assert all(client.started for client in clients)
    assert command(instance, m.AbortMatching(1, rid))["aborted"] == sum(count > 0 for count in ended)
    assert [sum(choice.over for choice in client.choices) for client in clients] == ended
    command(instance, m.AbortMatching(2, ""))
    instance.run()
    assert all(client.ended for client in clients) and not instance.scheduler.core.families  # type: ignore[union-attr]


def test_an_abort_reaches_the_requests_of_other_api_workers() -> None:
    instance = Instance()
    submit(instance, (3 << 40) + 1, "a")
    assert command(instance, m.AbortMatching(1, "a"))["aborted"] == 1
    assert reasons(instance) == {(3 << 40) + 1: "abort"}


def test_a_paused_instance_queues_and_orders_nothing_and_goes_on_where_it_was() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(9), 20)
    for _ in range(6):
        instance.finish_step()
    assert command(instance, m.Pause(1, "in_place"))["paused"] is True
    late = instance.submit(2, prompt(5, 2), 5)
    instance.run()
    instance.tick(1.0)
    before = len(client.tokens)
    instance.tick(1.0)
    assert not instance.runner.pending and len(client.tokens) == before < 20 and not late.tokens
    infos = [a.message for a in instance.actions if isinstance(a, Reply) and isinstance(a.message, m.InstanceInfo)]
    assert infos[-1].paused and infos[-1].load.waiting == 1
    assert command(instance, m.Continue(2))["paused"] is False
    instance.run()
    assert client.tokens == expected(prompt(9), 20) and late.tokens == expected(prompt(5, 2), 5)
    assert instance.scheduler.core.batcher.retractions == 0  # type: ignore[union-attr]


def test_a_pause_with_retraction_gives_the_memory_back_and_changes_no_token() -> None:
    instance = Instance(settings(chunked_prefill_size=4))
    running = instance.submit(1, prompt(9), 20)
    for _ in range(6):
        instance.finish_step()
    prefilling = instance.submit(2, prompt(30, 2), 5)
    instance.finish_step()
    command(instance, m.Pause(1, "retract"))
    instance.run()
    core = instance.scheduler.core
    assert core is not None and {r.state for r in core.requests.values()} == {State.WAITING}
    instance.handle(ev.Asked(0.0, 0, m.Ask(3, "flush_cache")))
    assert core.pool.available == core.pool.total == core.pool.counts[0], "every block is free"
    command(instance, m.Continue(2))
    instance.run()
    assert running.tokens == expected(prompt(9), 20) and prefilling.tokens == expected(prompt(30, 2), 5)
    instance.audit()


def test_a_pause_ends_what_runs_unless_told_otherwise_and_keeps_what_comes() -> None:
    instance = Instance()
    instance.submit(1, prompt(9), 20)
    instance.finish_step()
    assert command(instance, m.Pause(1, "abort")) == {"aborted": 1, "paused": True}
    late = instance.submit(2, prompt(5, 2), 5)
    instance.run()
    assert reasons(instance) == {1: "abort", 2: None}
    command(instance, m.Continue(2))
    instance.run()
    assert late.tokens == expected(prompt(5, 2), 5)


def test_deadlines_count_while_an_instance_is_paused() -> None:
    instance = Instance()
    command(instance, m.Pause(1, "in_place"))
    client = instance.submit(1, prompt(5), 5, client_timeout_ms=500)
    instance.tick(0.6)
    assert client.finish is not None and client.finish.status == 504


def test_draining_ends_a_pause_so_that_what_runs_can_end() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 5)
    command(instance, m.Pause(1, "in_place"))
    instance.run()
    instance.handle(ev.DrainRequested(0.0, 10.0))
    assert command(instance, m.Pause(2, "in_place"))["paused"] is False
    instance.run()
    assert client.tokens == expected(prompt(5), 5)
    assert [a for a in instance.actions if isinstance(a, Exit)] == [Exit(0, "drained")]


def test_a_pause_before_the_runner_is_up_holds_afterwards() -> None:
    fresh = Scheduler(settings())
    fresh.handle(ev.Commanded(0.0, 0, m.Pause(1, "abort")))
    fresh.handle(ev.RunnerUp(0.0, runner_ready(65)))
    assert fresh.operator.paused


@pytest.mark.parametrize("role", Role)
def test_a_health_check_is_computed_on_every_role(role: Role) -> None:
    instance = Instance(settings(role, local_prefill="never"))
    client = instance.submit(1, [1], 1, probe=True)
    instance.run()
    assert client.tokens == expected([1], 1)
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH
    instance.audit()
    assert instance.scheduler.core is not None and instance.scheduler.core.idle


@pytest.mark.parametrize("mode", ["in_place", "retract"])
@pytest.mark.parametrize("name", ["p0", "d0"])
def test_a_pause_of_either_side_of_a_hand_off_changes_no_token(name: str, mode: str) -> None:
    for pause_at in (0.002, 0.006, 0.012, 0.03):
        options = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": "never"}
        sim = SimCluster(1, SimConfig(scheduler=options))
        clients = [sim.submit(sim.nodes["d0"], prompt(19 + n, n), 9) for n in range(4)]
        sim.run(sim.now + pause_at)
        sim.nodes[name].event(lambda now: ev.Commanded(now, 0, m.Pause(1, mode)))
        sim.run(sim.now + 2)
        assert not all(client.ended for client in clients)
        sim.nodes[name].event(lambda now: ev.Commanded(now, 0, m.Continue(2)))
        assert sim.settle(20)
        sim.check_answers()
        sim.run(sim.now + 1)
        sim.check_rest()


def test_an_abort_while_a_prefill_instance_computes_cancels_there_too() -> None:
    options = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": "never"}
    sim = SimCluster(1, SimConfig(scheduler=options))
    client = sim.submit(sim.nodes["d0"], prompt(60), 9)
    sim.run(sim.now + 0.01)
    sim.nodes["d0"].event(lambda now: ev.Commanded(now, 0, m.AbortMatching(1, "")))
    assert client.finish is not None and client.finish.reason is FinishReason.ABORT
    sim.run(sim.now + 2)
    sim.check_rest()


def test_an_abort_on_a_prefill_instance_ends_nothing_that_is_computed_for_others_nor_what_has_its_number() -> None:
    sim = SimCluster(1, SimConfig(scheduler={"local_prefill": "never"}, step_time=(0.2, 0.2)))
    leg = sim.submit_leg(sim.nodes["p0"], prompt(9), 4, room=7)
    client = sim.submit(sim.nodes["d0"], prompt(30, 2), 4)
    sim.run(0.1)
    core = sim.nodes["p0"].scheduler.core
    assert core is not None and [r.client_key for r in core.requests.values()] == [1, 1], "both are the first of a kind"
    sim.command(sim.nodes["p0"], m.AbortMatching(5, "r2"))
    assert sim.nodes["p0"].answers[5]["aborted"] == 0 and not leg.ended
    sim.command(sim.nodes["p0"], m.AbortMatching(6, ""))
    assert sim.nodes["p0"].answers[6]["aborted"] == 1 and leg.ended
    assert sim.settle(20)
    assert client.tokens == expected(prompt(30, 2), 4)


def test_a_choice_that_is_over_is_not_aborted_while_the_others_wait_for_their_kv() -> None:
    sim = SimCluster(1, SimConfig(scheduler={"local_prefill": "never"}, write_delay=(1.0, 1.0)))
    stop = (reference_tokens(prompt(10), SamplingParams(choice=1), 1)[0],)
    client = sim.submit(sim.nodes["d0"], prompt(10), 5, choices=3, stop=stop)
    sim.run(0.3)
    assert [choice.over for choice in client.choices] == [False, True, False]
    for token, (rid, count) in enumerate((("r1-1", 0), ("r1-0", 1), ("r1-0", 0), ("r1-2", 1))):
        sim.command(sim.nodes["d0"], m.AbortMatching(token, rid))
        assert sim.nodes["d0"].answers[token]["aborted"] == count
    assert client.ended
    sim.run(sim.now + 3)
    sim.check_rest()
