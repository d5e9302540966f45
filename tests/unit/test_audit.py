"""Instances audit themselves: when, against what, and what they say when the books do not balance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pd.api.metrics import Latencies, exposition
from pd.messages import Answer, Ask
from pd.scheduler import events as ev
from pd.scheduler.actions import Action, Log, Reply
from pd.scheduler.blocks import BlockPool
from pd.scheduler.report import AUDIT_INTERVAL
from pd.scheduler.state import Scheduler
from pd.testing.instance import Instance
from pd.testing.sim_cluster import SimCluster, SimConfig


def errors(actions: list[Action]) -> list[dict[str, Any]]:
    assert all(a.event == "audit_failed" for a in actions if isinstance(a, Log) and a.level == "error")
    return [dict(a.fields) for a in actions if isinstance(a, Log) and a.level == "error"]


def answer(scheduler: Scheduler, now: float, what: str) -> dict[str, Any]:
    actions = scheduler.handle(ev.Asked(now, 0, Ask(1, what)))
    [data] = [a.message.data for a in actions if isinstance(a, Reply) and isinstance(a.message, Answer)]
    return data


def leak(instance: Instance) -> None:
    assert instance.scheduler.core is not None
    assert instance.scheduler.core.pool.allocate(1) is not None


def work(instance: Instance, key: int) -> None:
    instance.submit(key, [1, 2, 3, 4, 5], 2)
    instance.run()


def test_an_instance_audits_itself_when_it_has_become_idle_and_counts_and_logs_what_does_not_balance() -> None:
    instance = Instance()
    instance.submit(1, [1, 2, 3, 4, 5], 2)
    leak(instance)
    assert not errors(instance.tick(1.0)), "it is not idle: whose block that is shows later"
    instance.run()
    [figures] = errors(instance.tick(2.0))
    assert figures["problem"] == "1 blocks are owned, and nothing is here to own them"
    assert (figures["owned"], figures["cached"], figures["free"], figures["total"]) == (1, 1, 62, 64)
    body, _ = exposition(answer(instance.scheduler, 2.0, "metrics"), Latencies(), "")
    assert "pd_audit_failures_total 1.0" in body.decode().splitlines()


def test_books_that_balance_are_not_worth_a_line() -> None:
    instance = Instance()
    work(instance, 1)
    before = len(instance.logs)
    instance.tick(1.0)
    assert len(instance.logs) == before
    assert answer(instance.scheduler, 1.0, "metrics")["audit_failures"] == 0


def test_an_instance_audits_itself_once_per_spell_of_work_and_at_most_every_ten_seconds() -> None:
    instance = Instance()
    work(instance, 1)
    leak(instance)
    assert len(errors(instance.tick(0.05))) == 1
    assert not errors(instance.tick(1.0) + instance.tick(100.0)), "nothing has happened since"
    work(instance, 2)
    assert len(errors(instance.tick(0.05))) == 1
    work(instance, 3)
    assert not errors(instance.tick(0.05) + instance.tick(AUDIT_INTERVAL - 0.1)), "too early"
    assert len(errors(instance.tick(0.1))) == 1, "late, but not forgotten"


def grant_for_nobody(sim: SimCluster) -> str:
    core = sim.nodes["d0"].scheduler.core
    assert core is not None and core.pool.grant(2) is not None
    return "d0"


def grant_on_the_wrong_side(sim: SimCluster) -> str:
    core = sim.nodes["p0"].scheduler.core
    assert core is not None and core.pool.grant(2) is not None
    return "p0"


def credit_that_no_prompt_has(sim: SimCluster) -> str:
    side = sim.nodes["p0"].scheduler.prefill
    assert side is not None
    next(iter(side.handoffs.peers)).queued += 7
    return "p0"


DAMAGE = {
    "0 are granted": grant_for_nobody,
    "2 blocks are granted by an instance that grants none": grant_on_the_wrong_side,
    "7 queued tokens, 0 counted": credit_that_no_prompt_has,
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_the_hand_offs_of_both_sides_are_part_of_the_books(problem: str) -> None:
    damage: Callable[[SimCluster], str] = DAMAGE[problem]
    sim = SimCluster(1, SimConfig(control={"heartbeat_interval": 0.5}, scheduler={"local_prefill": "never"}))
    sim.submit(sim.nodes["d0"], range(20), 3)
    cores = [node.scheduler.core for node in sim.nodes.values()]
    while not all(core is not None and core.added and core.idle for core in cores):
        sim.run(sim.now + 0.001)  # to the end of the work, before the next tick
    now = sim.now + 0.05
    scheduler = sim.nodes[damage(sim)].scheduler
    assert problem in answer(scheduler, now, "audit")["problem"]
    [figures] = errors(scheduler.handle(ev.Tick(now)))
    assert problem in figures["problem"] and figures["balanced"] is False
    assert answer(scheduler, now, "metrics")["audit_failures"] == 2


def test_the_answer_to_an_audit_tells_of_open_hand_offs() -> None:
    sim = SimCluster(1, SimConfig(scheduler={"local_prefill": "never"}, write_delay=(5.0, 5.0)))
    sim.submit(sim.nodes["d0"], range(20), 3)
    sim.run(0.5)
    found = [answer(sim.nodes[name].scheduler, sim.now, "audit") for name in ("d0", "p0")]
    assert [books["balanced"] for books in found] == [True, True]
    assert [books["handoffs"] for books in found] == [{"landing": 1}, {"computed": 1}]
    assert (found[0]["incoming"], found[1]["owned"]) == (5, 5)


def test_a_block_that_is_held_by_nobody_or_held_and_not_owned_is_found() -> None:
    for field, value, problem in (("_refs", 0, "block 3: 0 refs, owned"), ("_refs", 1, "block 9: 1 refs, free")):
        pool = BlockPool(17)
        assert pool.allocate(4) == [1, 2, 3, 4]
        assert pool.audit() == {"free": 12, "owned": 4, "cached": 0, "incoming": 0, "quarantined": 0}
        getattr(pool, field)[9 if value else 3] = value
        with pytest.raises(AssertionError, match=problem):
            pool.audit()
    pool.counts[0] += 1
    with pytest.raises(AssertionError, match="recount"):
        pool.audit()
