"""Property tests of whole schedulers: two roles, simulated network, one-sided writes, deaths, freezes, restarts.

One seed is one interleaving of a few dozen requests and faults. The fake runners read all of a request's KV back before
each token, every write is checked against its grant, and the block pools are audited after every event; so what these
tests assert at the end is only the rest: every client got an end, every token was right, nobody holds anything.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pd import messages as m
from pd.errors import PdError
from pd.scheduler import choices
from pd.scheduler.batch import Batcher
from pd.scheduler.prefill_side import PrefillSide
from pd.scheduler.request import Request
from pd.testing.fake_runner import reference_tokens
from pd.testing.sim_cluster import Node, SimCluster, SimConfig
from pd.types import Role, SamplingParams

SCENARIOS = int(os.environ.get("PD_TEST_SCENARIOS", "400"))
#: Examples within which a mutant must be found out.
MUTANT_BUDGET = 500


def _config(rnd: random.Random) -> SimConfig:
    return SimConfig(
        prefills=rnd.choice([1, 2]),
        decodes=rnd.choice([1, 2]),
        num_blocks=rnd.choice([33, 65]),
        revocable=rnd.random() < 0.5,
        write_delay=rnd.choice([(0.0002, 0.005), (0.001, 0.3)]),
        scheduler={
            "chunked_prefill_size": rnd.choice([4, 8, 16]),
            "max_prefill_tokens": rnd.choice([16, 32, 64]),
            "max_running_requests": 8,
            "local_prefill": rnd.choice(["never", "fallback", "short:6"]),
        },
        control={"heartbeat_interval": 0.5},
    )


def _fault(world: SimCluster, rnd: random.Random) -> None:
    """Perhaps something goes wrong."""
    draw, node = rnd.random(), rnd.choice(list(world.nodes.values()))
    if draw < 0.08:
        world.kill(node)

        def restart() -> None:
            if not node.alive and world.nodes[node.name] is node:
                world.restart(node)

        world.later(rnd.random() * 2, restart)
    elif draw < 0.16 and node.alive and not node.frozen:
        world.freeze(node)
        world.later(rnd.random() * 4, lambda: world.thaw(node))
    elif draw < 0.24 and world.sessions:
        world.lose(rnd.choice(list(world.sessions.values())))
    elif draw < 0.32:
        running = [c for c in world.clients.values() if not c.ended]
        if running:
            client = rnd.choice(running)
            world.abort(client, rnd.choice([-1, rnd.randrange(len(client.choices))]))


def _ask(world: SimCluster, rnd: random.Random, decode: Node, prompt: list[int], seed: int, **more: Any) -> None:
    """A request of one choice or several, which may have a stop token that one of them meets."""
    several, most = rnd.choice([1, 1, 2, 3, 4]), rnd.randrange(1, 20)
    stop: tuple[int, ...] = ()
    if rnd.random() < 0.3:
        sampling = SamplingParams(seed=seed, choice=rnd.randrange(several))
        stop = (rnd.choice(reference_tokens(prompt, sampling, most)),)
    world.submit(decode, prompt, most, seed=seed, stop=stop, choices=several, **more)


def scenario(seed: int, faults: bool = True) -> SimCluster:
    """Run one interleaving to its end and check what must hold there."""
    rnd = random.Random(seed)
    world = SimCluster(seed, _config(rnd))
    if faults and rnd.random() < 0.1:
        world.corruption = 0.05
    shared = [rnd.randrange(100) for _ in range(24)]
    for number in range(rnd.randrange(2, 14)):
        prompt = shared[: rnd.randrange(24)] + [rnd.randrange(100) for _ in range(rnd.randrange(1, 20))]
        decode = rnd.choice([n for n in world.nodes.values() if n.role is Role.DECODE])
        timeout = rnd.choice([None, None, 3.0]) if faults else None
        _ask(world, rnd, decode, prompt, number, timeout=timeout)
        world.run(world.now + rnd.random() * 0.02)
        if faults:
            _fault(world, rnd)
    assert world.settle(60), "a request never ended"
    world.check_answers()
    world.check_digests()
    world.run(world.now + 40)  # expel, redial and reconciliation have their time
    world.check_rest()
    return world


def crowd(seed: int) -> None:
    """More requests than memory, and clients that leave: every block that comes free is another's at once."""
    rnd = random.Random(seed)
    config = replace(_config(rnd), prefills=1, decodes=1, num_blocks=rnd.choice([17, 25]), write_delay=(0.0002, 0.002))
    world = SimCluster(seed, config)
    [decode] = [n for n in world.nodes.values() if n.role is Role.DECODE]
    for number in range(16):
        prompt = [rnd.randrange(100) for _ in range(rnd.randrange(4, 20))]
        _ask(world, rnd, decode, prompt, number)
    while (left := [c for c in world.clients.values() if not c.ended]) and world.now < 60:
        if rnd.random() < 0.5:
            client = rnd.choice(left[:6])
            world.abort(client, rnd.choice([-1, rnd.randrange(len(client.choices))]))
        world.run(world.now + rnd.random() * 0.01)
    assert world.settle(60), "a request never ended"
    world.check_answers()
    world.check_digests()
    world.run(world.now + 5)
    world.check_rest()


@settings(max_examples=SCENARIOS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_whatever_fails_every_request_ends_and_no_answer_is_wrong(seed: int) -> None:
    scenario(seed)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_a_crowd_for_too_little_memory_comes_to_an_end(seed: int) -> None:
    crowd(seed)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_without_faults_every_request_is_answered(seed: int) -> None:
    world = scenario(seed, faults=False)
    for client in world.clients.values():
        for choice in client.choices:
            assert choice.finish is not None
            assert choice.finish.reason in (m.FinishReason.STOP, m.FinishReason.LENGTH), choice.finish


def test_scenarios_reach_what_they_are_meant_to_test() -> None:
    """Otherwise the properties above would hold for want of trouble."""
    outcomes: dict[str, int] = {}
    retractions = late = landed = replays = 0
    for seed in range(150):
        world = scenario(seed)
        rids = [str(dict(log.fields).get("rid")) for _, log in world.logs if log.event == "handoff_asked"]
        replays += sum("-" in rid for rid in rids)
        for node in world.lives:
            core = node.scheduler.core
            assert core is not None
            retractions += core.batcher.retractions
            late += core.stats.late_tokens
            landed += core.stats.landed
            for side in (node.scheduler.decode, node.scheduler.prefill):
                for name, count in side.handoffs.outcomes.items() if side is not None else ():
                    outcomes[name] = outcomes.get(name, 0) + count
    assert landed > 0 and retractions > 0 and late > 0
    assert replays > 0, "no choice was replayed alone"
    assert {"landed", "cancelled", "lost", "refused"} <= set(outcomes), outcomes


# --- mutants: without a rule the suite must fail --------------------------------------------------------------------


def _is_found_out(run: Callable[[int], object]) -> bool:
    found = False

    @settings(
        max_examples=MUTANT_BUDGET,
        deadline=None,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def hunt(seed: int) -> None:
        run(seed)

    try:
        hunt()
    except (AssertionError, PdError, LookupError, ExceptionGroup):
        found = True
    return found


def test_mutant_blocks_are_reused_while_a_step_may_still_write_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batcher.give_blocks

    def at_once(self: Batcher, request: Request) -> None:
        inflight, self.inflight = self.inflight, type(self.inflight)()
        original(self, request)
        self.inflight = inflight

    monkeypatch.setattr(Batcher, "give_blocks", at_once)
    assert _is_found_out(crowd)


def test_mutant_late_tokens_are_not_dropped_by_their_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Batcher, request: Request) -> None:
        self._drop_rows(request)

    monkeypatch.setattr(Batcher, "forget", forget)
    assert _is_found_out(scenario)


def test_mutant_blocks_are_pushed_before_the_step_that_writes_them_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def early(self: PrefillSide, request: Request, page: int, blocks: list[int]) -> None:
        skip = max(0, request.first_block - page)
        if skip < len(blocks):
            assert request.remote is not None
            first = page + skip - request.first_block
            self.handoffs.push(request.remote, blocks[skip:], first, after_step=False)

    original = PrefillSide.__init__

    def init(self: PrefillSide, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        self.core.batcher.pusher = lambda r, p, b: early(self, r, p, b)

    monkeypatch.setattr(PrefillSide, "__init__", init)
    assert _is_found_out(scenario)


def test_mutant_the_partial_block_is_not_copied_for_other_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "copy", lambda self, request, source, tokens: None)
    assert _is_found_out(scenario)


def test_mutant_a_choice_whose_kv_does_not_come_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "scatter", choices._forget)
    assert _is_found_out(scenario)


def test_mutant_source_blocks_are_given_back_before_their_pushes_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefillSide._stop

    def stop(self: PrefillSide, id: object) -> None:
        original(self, id)  # type: ignore[arg-type]
        request = self._requests.pop(id, None)  # type: ignore[call-overload]
        if request is not None:
            self.core.batcher.leave(request)
            self.core.remove(request)

    monkeypatch.setattr(PrefillSide, "_stop", stop)
    assert _is_found_out(scenario)
