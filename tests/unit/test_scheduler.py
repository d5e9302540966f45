"""The scheduler as a pure machine, against a fake runner that answers one step late and notices damaged memory."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pd import messages as m
from pd.errors import ProtocolError
from pd.scheduler import events as ev
from pd.scheduler.actions import Exit, Reply, RunStep
from pd.scheduler.request import State
from pd.scheduler.state import Scheduler
from pd.testing.fake_runner import FakeRunner, reference_tokens
from pd.testing.instance import Client, Instance, runner_ready, settings
from pd.types import FinishReason, InstanceState, Role, SamplingParams


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def expected(tokens: list[int], count: int, seed: int = 0, stop: tuple[int, ...] = ()) -> list[int]:
    return reference_tokens(tokens, SamplingParams(seed=seed, stop_token_ids=stop), count)


def orders(actions: list) -> list[m.StepOrder]:
    return [a.order for a in actions if isinstance(a, RunStep)]


def counts(order: m.StepOrder) -> list[int]:
    return np.frombuffer(order.counts_i32, "<i4").tolist()


def error_of(client: Client) -> m.Finish:
    assert client.finish is not None
    assert client.finish.reason is FinishReason.ERROR
    return client.finish


# --- one step ahead -------------------------------------------------------------------------------------------------


def test_the_next_order_leaves_before_the_tokens_of_the_last_are_back() -> None:
    instance = Instance()
    instance.submit(1, prompt(5), 10)
    assert [o.step for o in instance.runner.pending] == [1, 2], "order 2 waits for step 1"
    instance.finish_step()
    assert [o.step for o in instance.runner.pending] == [2, 3]


def test_no_more_than_two_steps_are_ever_in_flight() -> None:
    instance = Instance()
    for key in range(4):
        instance.submit(key, prompt(9, key), 10)
        assert len(instance.runner.pending) <= 2


def test_a_request_gets_the_tokens_of_its_whole_context() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(11), 20)
    instance.run()
    assert client.tokens == expected(prompt(11), 20)
    assert client.finish == m.Finish(FinishReason.LENGTH)


def test_the_token_after_a_stop_token_is_never_emitted() -> None:
    tokens = expected(prompt(6), 12)
    instance = Instance()
    client = instance.submit(1, prompt(6), 12, stop=(tokens[4],))
    instance.run()
    assert client.tokens == tokens[:5]
    assert client.finish == m.Finish(FinishReason.STOP, stop_id=tokens[4])
    assert instance.scheduler.core is not None
    assert instance.scheduler.core.stats.late_tokens == 1, "the surplus token was computed and dropped"


def test_a_request_that_ends_by_length_orders_no_surplus_step() -> None:
    instance = Instance()
    instance.submit(1, prompt(6), 3)
    instance.run()
    assert instance.scheduler.core is not None
    assert instance.scheduler.core.stats.steps == 3
    assert instance.scheduler.core.stats.late_tokens == 0


def test_a_late_token_of_a_cancelled_request_is_dropped() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(6), 10)
    other = instance.submit(2, prompt(6, 2), 10)
    instance.finish_step()
    instance.handle(ev.AbortRequested(0.0, 1, "gone"))
    instance.run()
    assert client.finish is not None and client.finish.reason is FinishReason.ABORT
    assert other.tokens == expected(prompt(6, 2), 10)


def test_blocks_of_a_request_that_left_are_not_reusable_while_a_step_may_write_to_them() -> None:
    instance = Instance(num_blocks=5)
    instance.submit(1, prompt(6), 9)
    assert len(instance.runner.pending) == 2
    before = instance.audit()["owned"]
    instance.handle(ev.AbortRequested(0.0, 1, "gone"))
    assert instance.audit()["owned"] == before, "two ordered steps still write there"
    instance.finish_step()
    assert instance.audit()["owned"] == before, "the second one still does"
    instance.finish_step()
    assert instance.audit()["owned"] == 0


def test_a_runner_that_answers_out_of_order_is_a_protocol_error() -> None:
    instance = Instance()
    instance.submit(1, prompt(5), 10)
    done = FakeRunner(65, 4)
    done.step(instance.runner.pending[0])
    wrong = done.finish()
    wrong.step = 2
    with pytest.raises(ProtocolError):
        instance.handle(ev.StepFinished(0.0, wrong))


# --- batching -------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_of_the_configured_size() -> None:
    instance = Instance(settings(chunked_prefill_size=8, max_prefill_tokens=64))
    client = instance.submit(1, prompt(21), 2)
    seen = [counts(o) for o in orders(instance.actions)]
    while instance.runner.pending:
        seen += [counts(o) for o in orders(instance.finish_step())]
    assert seen == [[8], [8], [5], [1]]
    assert client.tokens == expected(prompt(21), 2)


def test_prompts_share_one_budget_per_step_with_decodes_in_front() -> None:
    instance = Instance(settings(chunked_prefill_size=8, max_prefill_tokens=12))
    instance.submit(1, prompt(4), 30)
    instance.finish_step()
    instance.submit(2, prompt(20, 2), 2)
    instance.submit(3, prompt(20, 3), 2)
    made = orders(instance.finish_step())
    assert counts(made[0]) == [1, 8, 3], "one decode, then the oldest prompt, then what is left of the budget"
    instance.run()


def test_running_requests_are_bounded_and_the_rest_waits_in_order() -> None:
    instance = Instance(settings(max_running_requests=2))
    clients = [instance.submit(key, prompt(5, key), 4) for key in range(5)]
    core = instance.scheduler.core
    assert core is not None
    while instance.runner.pending:
        assert core.batcher.count <= 2
        instance.finish_step()
    assert all(c.tokens == expected(prompt(5, key), 4) for key, c in enumerate(clients))


def test_a_request_of_higher_priority_starts_first() -> None:
    instance = Instance(settings(max_running_requests=1))
    instance.submit(1, prompt(5, 1), 2)
    low = instance.submit(2, prompt(5, 2), 2)
    high = instance.submit(3, prompt(5, 3), 2, priority=5)
    while not high.ended:
        assert not low.tokens
        instance.finish_step()
    instance.run()


# --- prefix cache ---------------------------------------------------------------------------------------------------


def test_an_equal_prefix_is_taken_from_the_cache_except_its_last_token() -> None:
    instance = Instance()
    instance.submit(1, prompt(16), 1)
    instance.run()
    again = instance.submit(2, prompt(16), 3)
    instance.run()
    assert again.started is not None
    assert again.started.cached_tokens == 12, "page 4 holds the last token, which is computed"
    assert again.tokens == expected(prompt(16), 3)


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    instance = Instance()
    first = instance.submit(1, prompt(8), 9)
    instance.run()
    turn = instance.submit(2, prompt(8) + first.tokens + prompt(4, 9), 2)
    instance.run()
    assert turn.started is not None
    assert turn.started.cached_tokens == 16, "8 prompt and 8 computed output tokens; the ninth was never computed"


def test_prompt_logprobs_keep_the_cache_from_skipping_their_positions() -> None:
    instance = Instance()
    instance.submit(1, prompt(20), 1)
    instance.run()
    asking = instance.submit(2, prompt(20), 1, logprob_start=9)
    instance.run()
    assert asking.started is not None
    assert asking.started.cached_tokens == 8, "position 8 must be computed to score position 9"


def test_salts_do_not_share_blocks() -> None:
    instance = Instance()
    instance.submit(1, prompt(16), 1, salt="a")
    instance.run()
    other = instance.submit(2, prompt(16), 1, salt="b")
    instance.run()
    assert other.started is not None
    assert other.started.cached_tokens == 0


def test_concurrent_equal_prompts_keep_their_own_blocks_and_the_first_one_is_cached() -> None:
    instance = Instance()
    clients = [instance.submit(key, prompt(13), 6) for key in range(3)]
    instance.run()
    assert all(c.tokens == expected(prompt(13), 6) for c in clients)
    assert instance.audit()["cached"] == 4, "one path: 13 prompt tokens and 5 computed output tokens"


def test_flush_cache_frees_what_nobody_holds() -> None:
    instance = Instance()
    instance.submit(1, prompt(16), 1)
    instance.run()
    replies = instance.handle(ev.Asked(0.0, 0, m.Ask(7, "flush_cache")))
    assert [a.message for a in replies if isinstance(a, Reply)] == [m.Answer(7, {"freed_blocks": 4})]
    assert instance.audit()["cached"] == 0


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_youngest_is_retracted_when_memory_runs_out_and_replayed_without_a_wrong_token() -> None:
    instance = Instance(num_blocks=9)
    clients = [instance.submit(key, prompt(7, key), 18) for key in range(2)]
    instance.run()
    core = instance.scheduler.core
    assert core is not None
    assert core.batcher.retractions > 0, "the test must force a retraction"
    assert [c.tokens for c in clients] == [expected(prompt(7, key), 18) for key in range(2)]
    assert core.requests == {}


def test_two_requests_that_need_the_whole_pool_do_not_take_it_from_each_other_for_ever() -> None:
    instance = Instance(settings(reserve_blocks=0), num_blocks=17)
    clients = [instance.submit(key, prompt(8, key), 40) for key in range(3)]
    instance.run(steps=300)  # a replay that is still being computed gives way to an older one that decodes
    assert [len(client.tokens) for client in clients] == [40, 40, 40]


def test_a_retracted_request_keeps_its_age_and_starts_before_new_ones() -> None:
    instance = Instance(num_blocks=9)
    for key in range(2):
        instance.submit(key, prompt(7, key), 18)
    core = instance.scheduler.core
    assert core is not None
    while not core.batcher.retractions:
        instance.finish_step()
    late = instance.submit(9, prompt(3, 9), 1)
    retracted = core.requests[1]
    while retracted.state is State.WAITING:
        assert not late.tokens
        instance.finish_step()
    instance.run()
    assert late.tokens == expected(prompt(3, 9), 1)


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"),
    [(300, 1, "prompt"), (256, 1, "prompt"), (200, 57, "max_tokens"), (0, 4, "prompt")],
)
def test_what_can_never_fit_is_refused_at_once(length: int, max_tokens: int, param: str) -> None:
    instance = Instance(num_blocks=65)  # 256 tokens
    client = instance.submit(1, prompt(length), max_tokens)
    assert client.rejected is not None
    assert (client.rejected.status, client.rejected.param) == (400, param)


def test_the_largest_request_that_fits_is_served() -> None:
    instance = Instance(num_blocks=65)
    client = instance.submit(1, prompt(200), 56)
    instance.run()
    assert client.tokens == expected(prompt(200), 56)


def test_omitted_max_tokens_are_bounded_by_the_pool() -> None:
    instance = Instance(num_blocks=9)  # 32 tokens
    client = instance.submit(1, prompt(20), 0)
    instance.run()
    assert len(client.tokens) == 12


def test_a_token_outside_the_vocabulary_is_refused_with_its_number() -> None:
    client = Instance().submit(1, [5, 70_000], 3)
    assert client.rejected is not None
    assert "70000" in client.rejected.message


def test_a_full_queue_answers_503() -> None:
    instance = Instance(settings(max_queued_requests=1, max_running_requests=1))
    for key in range(2):
        instance.submit(key, prompt(4, key), 3)
    client = instance.submit(2, prompt(4), 3)
    assert client.rejected is not None and client.rejected.status == 503
    instance.run()


# --- waiting for memory ---------------------------------------------------------------------------------------------


def short_of_memory(blocks: int = 13, quarantined: int = 6) -> tuple[Instance, Client, Client]:
    """A pool of 20 blocks: a request that runs in one or two, and one behind it that needs `blocks`."""
    instance = Instance(num_blocks=21)
    core = instance.scheduler.core
    assert core is not None
    core.pool.quarantine(core.pool.grant(quarantined) or [])
    first = instance.submit(1, prompt(2), 6)
    waiting = instance.submit(2, prompt(4 * blocks - 2, 2), 2)
    assert core.requests[2].state is State.WAITING
    return instance, first, waiting


def test_a_request_starts_when_the_growth_reserve_that_it_waited_for_is_gone() -> None:
    instance, first, waiting = short_of_memory()
    core = instance.scheduler.core
    assert core is not None
    while not first.ended:
        assert core.requests[2].state is State.WAITING
        instance.finish_step()
    assert core.batcher.count == 1, "14 blocks are there: 13, and a reserve of one for the only one that runs"
    instance.run()
    assert waiting.tokens == expected(prompt(50, 2), 2)


def test_nobody_waits_for_the_memory_of_a_request_that_left() -> None:
    instance, first, _ = short_of_memory(blocks=16, quarantined=5)
    instance.handle(ev.AbortRequested(0.0, 2, "gone"))
    instance.submit(3, prompt(2, 3), 2)
    core = instance.scheduler.core
    assert core is not None and core.requests[3].state is not State.WAITING and not first.ended
    instance.run()


def test_a_smaller_request_of_higher_priority_does_not_wait_for_the_memory_of_a_larger_one() -> None:
    instance, first, waiting = short_of_memory()
    instance.submit(3, prompt(2, 3), 2, priority=1)
    core = instance.scheduler.core
    assert core is not None and core.requests[3].state is not State.WAITING and not first.ended
    instance.run()
    assert waiting.ended


def test_pins_of_waiting_retries_are_given_up_when_nothing_runs_and_the_first_lacks_memory() -> None:
    instance, first, waiting = short_of_memory(blocks=18, quarantined=0)
    core = instance.scheduler.core
    assert core is not None
    instance.submit(3, prompt(20, 3), 2)
    core.requests[3].blocks = core.pool.allocate(4) or []
    while not first.ended:
        instance.finish_step()
    assert core.batcher.count == 0 and not core.requests[3].blocks
    instance.tick(0.05)
    instance.run()
    assert waiting.tokens == expected(prompt(70, 2), 2)


def test_a_request_that_lacked_memory_starts_once_a_running_one_has_computed_their_common_prefix() -> None:
    instance = Instance(num_blocks=21)
    first = instance.submit(1, prompt(32), 30)
    second = instance.submit(2, prompt(32) + prompt(18, 2), 2)
    core = instance.scheduler.core
    assert core is not None and core.requests[2].state is State.WAITING, "13 blocks of its own are not there"
    for _ in range(2):
        instance.finish_step()
    instance.tick(0.05)
    assert core.requests[2].state is State.PREFILL and not first.ended
    instance.run()
    assert second.started is not None and second.started.cached_tokens == 32


def test_requests_that_wait_for_memory_cost_nothing_while_nothing_changes() -> None:
    instance = Instance(num_blocks=65)
    core = instance.scheduler.core
    assert core is not None
    instance.submit(1, prompt(2), 100)
    for key in range(2, 1000):
        instance.submit(key, prompt(248, key), 2)
    matches, match = [], core.prefix.match
    core.prefix.match = lambda *args: matches.append(args) or match(*args)  # type: ignore[method-assign,func-returns-value]
    for _ in range(50):
        instance.finish_step()
    assert not matches, "the first was looked at when it came"
    instance.tick(0.05)
    assert len(matches) == 1, "and once a tick"


# --- time, ends -----------------------------------------------------------------------------------------------------


def test_a_clients_deadline_bounds_the_whole_request() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 200, client_timeout_ms=2_000)
    for _ in range(3):
        instance.finish_step()
        instance.tick(0.9)
    assert error_of(client).status == 504
    instance.run()
    assert instance.audit()["owned"] == 0


def test_the_default_deadline_bounds_only_the_time_without_a_new_token() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 50, idle_timeout_ms=2_000)
    for _ in range(10):
        instance.finish_step()
        instance.tick(0.9)
    assert not client.ended
    instance.tick(1.5)
    assert error_of(client).status == 504


def test_a_waiting_request_expires_too() -> None:
    instance = Instance(settings(max_running_requests=1))
    instance.submit(1, prompt(5), 50)
    waiting = instance.submit(2, prompt(5, 2), 50, client_timeout_ms=1_000)
    instance.tick(1.1)
    assert error_of(waiting).status == 504
    core = instance.scheduler.core
    assert core is not None and len(core.waiting) == 0


def test_a_dead_runner_ends_every_request_and_the_instance() -> None:
    instance = Instance()
    clients = [instance.submit(key, prompt(5, key), 50) for key in range(3)]
    actions = instance.handle(ev.RunnerDied(0.0, "killed"))
    assert [error_of(c).status for c in clients] == [500, 500, 500]
    assert [a for a in actions if isinstance(a, Exit)] == [Exit(1, "killed")]
    assert instance.submit(9, prompt(5), 5).rejected is not None, "until the process has ended"


def test_a_step_that_takes_too_long_is_a_dead_runner() -> None:
    instance = Instance(settings(step_timeout=3.0))
    client = instance.submit(1, prompt(5), 50)
    instance.tick(2.9)
    assert not client.ended
    actions = instance.tick(0.2)
    assert "longer than 3 s" in error_of(client).message
    assert any(isinstance(a, Exit) and a.code == 1 for a in actions)


def test_draining_refuses_new_requests_finishes_running_ones_and_exits() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 5)
    instance.handle(ev.DrainRequested(0.0, 10.0))
    late = instance.submit(2, prompt(5), 5)
    assert late.rejected is not None and late.rejected.code == "draining"
    instance.run()
    assert client.tokens == expected(prompt(5), 5)
    assert [a for a in instance.actions if isinstance(a, Exit)] == [Exit(0, "drained")]


def test_the_drain_bound_ends_what_still_runs() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 5)
    instance.handle(ev.DrainRequested(0.0, 1.0))
    actions = instance.tick(1.1)
    assert error_of(client).status == 503
    assert any(isinstance(a, Exit) for a in actions)


def test_a_lost_api_worker_ends_its_own_requests_only() -> None:
    instance = Instance()
    mine = instance.submit((1 << 40) + 1, prompt(5), 5)
    other = instance.submit((2 << 40) + 1, prompt(5), 5)
    instance.handle(ev.ApiLost(0.0, 1))
    instance.run()
    assert mine.finish is not None and mine.finish.reason is FinishReason.ABORT
    assert other.tokens == expected(prompt(5), 5)


def test_before_the_runner_is_up_requests_get_503() -> None:
    scheduler = Scheduler(settings())
    submit = m.Submit(1, "r", b"\x01\x00\x00\x00", SamplingParams(max_tokens=1))
    replies = [a.message for a in scheduler.handle(ev.RequestSubmitted(0.0, submit)) if isinstance(a, Reply)]
    assert [(r.status, r.code) for r in replies if isinstance(r, m.Rejected)] == [(503, "starting")]
    scheduler.handle(ev.RunnerUp(0.0, runner_ready(9)))
    assert scheduler.state is InstanceState.READY


def test_a_prefill_instance_refuses_direct_requests() -> None:
    client = Instance(settings(Role.PREFILL)).submit(1, prompt(5), 5)
    assert client.rejected is not None and client.rejected.status == 400


def test_random_loads_never_damage_memory_and_leave_nothing_behind() -> None:
    for trial in range(120):
        rnd = random.Random(trial)
        config = settings(
            chunked_prefill_size=rnd.choice([4, 7, 16]),
            max_prefill_tokens=rnd.choice([8, 32]),
            max_running_requests=rnd.choice([3, 8]),
        )
        instance = Instance(config, num_blocks=rnd.choice([20, 33, 65]))
        room = (instance.num_blocks - 1) * 4
        shared = prompt(20, trial)
        wanted: dict[int, tuple[Client, list[int]]] = {}
        for key in range(rnd.randrange(1, 16)):
            tokens = shared[: rnd.randrange(20)] + prompt(rnd.randrange(1, 20), 1000 + key)
            count = min(rnd.randrange(1, 30), room - len(tokens))
            stop = (expected(tokens, count, key)[rnd.randrange(count)],) if rnd.random() < 0.5 else ()
            client = instance.submit(key, tokens, count, seed=key, stop=stop)
            wanted[key] = client, expected(tokens, count, key, stop)
            for _ in range(rnd.randrange(4)):
                if instance.runner.pending:
                    instance.finish_step()
                    instance.audit()
            victim = rnd.choice(list(wanted))
            if rnd.random() < 0.1 and not wanted[victim][0].ended:
                instance.handle(ev.AbortRequested(0.0, victim, "gone"))
                del wanted[victim]
        instance.run()
        for key, (client, tokens) in wanted.items():
            assert client.tokens == tokens, f"trial {trial}, request {key}"
        assert instance.audit()["owned"] == 0


def test_a_cached_prefix_does_not_stand_in_the_way_of_a_prompt_that_needs_the_whole_pool() -> None:
    instance = Instance(num_blocks=4)
    for key in (1, 2):
        client = instance.submit(key, prompt(9), 2)
        instance.run()
        assert client.tokens == expected(prompt(9), 2)


def test_a_prompt_that_is_computed_anew_gives_its_logprobs_once() -> None:
    instance = Instance(settings(chunked_prefill_size=4))
    client = instance.submit(1, prompt(15), 4, logprob_start=2)
    instance.finish_step()
    instance.finish_step()
    instance.handle(ev.Commanded(0.0, 0, m.Pause(1, "retract")))
    instance.run()
    instance.handle(ev.Commanded(0.0, 0, m.Continue(2)))
    instance.run()
    assert len(client.tokens) == 4
    client.check_logprobs("request", prompt(15), SamplingParams(), 2)
