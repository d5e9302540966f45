"""Several choices of one prompt: computed and pushed once, then requests of their own."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pd import messages as m
from pd.errors import PdError
from pd.scheduler import events as ev
from pd.scheduler.actions import Action, RunStep, SendPeer, Transfer
from pd.scheduler.batch import Batcher
from pd.scheduler.choices import name_rows, of_each
from pd.scheduler.request import CHOICE_SHIFT, Family, Request, State
from pd.testing.fake_runner import reference_tokens, token_logprobs
from pd.testing.instance import Client, Instance, settings
from pd.testing.sim_cluster import Node, SimCluster, SimConfig
from pd.types import FinishReason, SamplingParams

BLOCK_BYTES = 64
LENGTH = m.Finish(FinishReason.LENGTH)


def prompt(length: int, seed: int = 0) -> list[int]:
    rnd = random.Random(seed)
    return [rnd.randrange(50_000) for _ in range(length)]


def expected(tokens: list[int], count: int, choice: int, stop: tuple[int, ...] = ()) -> list[int]:
    return reference_tokens(tokens, SamplingParams(choice=choice, stop_token_ids=stop), count)


def assert_answers(client: Client, tokens: list[int], count: int) -> None:
    for index, choice in enumerate(client.choices):
        assert choice.tokens == expected(tokens, count, index)
        assert choice.finish == LENGTH


def world(prefills: int = 1, decodes: int = 1, local: str = "never", **more: object) -> SimCluster:
    scheduler = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": local}
    config = SimConfig(prefills, decodes, scheduler=scheduler, control={"heartbeat_interval": 0.5})
    for name, value in more.items():
        setattr(config, name, value)
    return SimCluster(1, config)


def settle(sim: SimCluster) -> None:
    assert sim.settle(30), "a request never ended"
    sim.check_answers()
    sim.check_digests()
    sim.run(sim.now + 3)
    sim.check_rest()


def core_of(node: Node | Instance):  # type: ignore[no-untyped-def]
    assert node.scheduler.core is not None
    return node.scheduler.core


def said(sim: SimCluster, node: Node, kind: type) -> list[object]:
    """What `node` sends to its peers from now on, of this kind; filled as the world runs."""
    found: list[object] = []
    handle = node.scheduler.handle

    def watch(event: ev.Event) -> list[Action]:
        actions = handle(event)
        for action in actions:
            message = action.message if isinstance(action, SendPeer) else None
            command = action.command if isinstance(action, Transfer) else None
            order = action.order if isinstance(action, RunStep) else None
            found.extend(x for x in (message, command) if isinstance(x, kind))
            found.extend(x for x in (*order.pushes, *order.copies) if isinstance(x, kind)) if order else None
        return actions

    node.scheduler.handle = watch  # type: ignore[method-assign]
    return found


# --- on one instance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12])
@pytest.mark.parametrize("choices", [2, 5])
def test_every_choice_gets_the_tokens_that_are_its_own(length: int, choices: int) -> None:
    instance = Instance()
    client = instance.submit(1, prompt(length), 11, choices=choices)
    instance.run()
    assert_answers(client, prompt(length), 11)
    assert core_of(instance).stats.computed == length, "the prompt is computed once"
    assert instance.audit()["owned"] == 0


def test_the_first_choice_of_several_is_the_only_one_of_one() -> None:
    instance = Instance()
    several = instance.submit(1, prompt(9), 8, seed=5, choices=3)
    one = instance.submit(2, prompt(9), 8, seed=5)
    instance.run()
    assert several.tokens == one.tokens
    assert several.tokens != several.others[0].tokens != several.others[1].tokens


def test_full_blocks_are_shared_and_the_partial_one_is_copied_for_all_but_the_first() -> None:
    instance = Instance()
    instance.submit(1, prompt(10), 3, choices=4)  # two full blocks and two tokens in the third
    instance.finish_step()
    order = next(o for o in reversed(instance.runner.pending) if o.admit)
    tables = [np.frombuffer(admit.blocks_i32, "<i4").tolist() for admit in order.admit]
    assert len(tables) == 4 and len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4, "each writes its next token to a block of its own"
    assert [(c.src, c.dst, c.tokens) for c in order.copies] == [(tables[0][2], t[2], 2) for t in tables[1:]]
    assert {admit.computed for admit in order.admit} == {10} and {admit.choices for admit in order.admit} == {1}
    assert [admit.sampling.choice for admit in order.admit] == [0, 1, 2, 3]


def test_a_prompt_that_ends_with_a_block_needs_no_copy() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(8), 6, choices=3)
    orders = []
    while instance.runner.pending:
        orders.append(instance.runner.pending[0])
        instance.finish_step()
    assert not any(order.copies for order in orders)
    assert_answers(client, prompt(8), 6)


def test_a_stop_token_ends_the_choice_that_drew_it_and_no_other() -> None:
    stop = (expected(prompt(6), 9, 1)[3],)
    instance = Instance()
    client = instance.submit(1, prompt(6), 9, stop=stop, choices=3)
    instance.run()
    assert [len(choice.tokens) for choice in client.choices] == [9, 4, 9]
    assert [choice.finish for choice in client.choices] == [
        LENGTH,
        m.Finish(FinishReason.STOP, stop_id=stop[0]),
        LENGTH,
    ]


def test_a_choice_that_ends_with_its_first_token_leaves_the_others_running() -> None:
    stop = (expected(prompt(6), 1, 0)[0],)
    instance = Instance()
    client = instance.submit(1, prompt(6), 5, stop=stop, choices=3)
    instance.run()
    assert [len(choice.tokens) for choice in client.choices] == [1, 5, 5]
    for index, choice in enumerate(client.choices):
        assert choice.tokens == expected(prompt(6), 5, index, stop)


def test_choices_that_all_end_with_their_first_token_take_one_step() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(6), 1, choices=3)
    instance.run()
    assert_answers(client, prompt(6), 1)
    assert core_of(instance).stats.steps == 1 and instance.audit()["owned"] == 0


def test_each_choice_has_its_own_logprobs() -> None:
    wishes = {"logprobs": True, "top_logprobs": 2, "token_ids_logprob": (3, 4)}
    instance = Instance()
    client = instance.submit(1, prompt(7), 4, choices=3, sampling=wishes)
    instance.run()
    for choice in client.choices:
        assert choice.logprobs == [token_logprobs([token], SamplingParams(**wishes)) for token in choice.tokens]


def test_one_choice_can_be_ended_alone() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(7), 9, choices=3)
    other = instance.submit(2, prompt(7, 2), 9)
    for _ in range(3):
        instance.finish_step()
    instance.handle(ev.AbortRequested(0.0, 1, "a stop string matched", 1))
    instance.handle(ev.AbortRequested(0.0, 1, "a stop string matched", 1))  # it is over: nothing to end
    instance.run()
    assert [choice.finish.reason.value for choice in client.choices if choice.finish] == ["length", "abort", "length"]
    assert [len(client.choices[i].tokens) for i in (0, 2)] == [9, 9] and len(client.choices[1].tokens) < 9
    assert other.tokens == reference_tokens(prompt(7, 2), SamplingParams(), 9)


def test_a_choice_that_is_ended_before_it_has_begun_ends_with_its_first_token() -> None:
    instance = Instance(settings(chunked_prefill_size=4))
    client = instance.submit(1, prompt(14), 6, choices=3)
    instance.finish_step()
    instance.handle(ev.AbortRequested(0.0, 1, "not wanted", 1))
    assert not client.choices[1].over, "its prompt is computed for the others"
    instance.run()
    assert [len(choice.tokens) for choice in client.choices] == [6, 1, 6]
    assert [choice.finish.reason.value for choice in client.choices if choice.finish] == ["length", "abort", "length"]
    assert instance.audit()["owned"] == 0 and not core_of(instance).families


def test_a_request_of_which_no_choice_is_wanted_any_more_ends_at_once() -> None:
    instance = Instance(settings(chunked_prefill_size=4))
    client = instance.submit(1, prompt(30), 6, choices=3)
    for choice in (2, 0, 2, 7):
        instance.handle(ev.AbortRequested(0.0, 1, "not wanted", choice))
    assert not client.ended
    instance.handle(ev.AbortRequested(0.0, 1, "not wanted", 1))
    assert client.ended and not core_of(instance).requests and not core_of(instance).families
    instance.run()
    assert instance.audit()["owned"] == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_cancel_ends_every_choice_wherever_the_request_is(steps: int) -> None:
    instance = Instance()
    client = instance.submit(1, prompt(14), 9, choices=3)
    for _ in range(steps):
        instance.finish_step()
    instance.handle(ev.AbortRequested(0.0, 1, "gone"))
    assert [choice.finish.reason.value for choice in client.choices if choice.finish] == ["abort"] * 3
    instance.run()
    assert instance.audit()["owned"] == 0 and core_of(instance).idle and not core_of(instance).families


def test_a_deadline_ends_every_choice() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(7), 50, choices=2, client_timeout_ms=1000)
    for _ in range(4):
        instance.finish_step()
    instance.tick(1.5)
    assert [choice.finish.status for choice in client.choices if choice.finish] == [504, 504]


def test_a_dead_api_ends_every_choice() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(7), 50, choices=2)
    for _ in range(4):
        instance.finish_step()
    instance.handle(ev.ApiLost(0.0, 0))
    instance.run()
    assert client.ended and instance.audit()["owned"] == 0


def test_prompts_with_choices_take_as_many_running_slots() -> None:
    instance = Instance(settings(max_running_requests=4))
    clients = [instance.submit(key, prompt(6, key), 6, choices=3) for key in (1, 2)]
    single = instance.submit(3, prompt(6, 3), 6)
    most = 0
    while instance.runner.pending:
        instance.finish_step()
        most = max(most, len(instance.runner.requests))
    assert most <= 5, "four, and a prompt that hands over to its choices"
    assert single.ended
    for key, client in zip((1, 2), clients, strict=True):
        assert_answers(client, prompt(6, key), 6)


@pytest.mark.parametrize(("choices", "most"), [(0, 8), (9, 8), (129, 256)])
def test_more_choices_than_can_run_are_refused_by_name(choices: int, most: int) -> None:
    instance = Instance(settings(max_running_requests=most))
    client = instance.clients[1] = Client()
    sampling = SamplingParams(max_tokens=4)
    tokens = np.array(prompt(4), "<i4").tobytes()
    instance.handle(ev.RequestSubmitted(0.0, m.Submit(1, "r", tokens, sampling, choices)))
    assert client.rejected is not None and (client.rejected.status, client.rejected.param) == (400, "n")


def test_choices_that_do_not_fit_together_are_retracted_and_replayed_one_by_one() -> None:
    instance = Instance(num_blocks=10)  # 9 blocks: one choice needs 8 of them in the end
    client = instance.submit(1, prompt(10), 20, choices=4)
    instance.run()
    assert_answers(client, prompt(10), 20)
    assert core_of(instance).batcher.retractions > 0
    replayed = [dict(log.fields)["rid"] for log in instance.logs if log.event == "request_replayed"]
    assert set(replayed) <= {"r1-0", "r1-1", "r1-2", "r1-3"} and "r1-0" not in replayed, "the oldest goes first"


def test_a_choice_without_a_block_for_its_copy_is_replayed() -> None:
    instance = Instance(num_blocks=4)  # the prompt takes all three blocks
    client = instance.submit(1, prompt(9), 2, choices=3)
    instance.run()
    assert_answers(client, prompt(9), 2)
    assert core_of(instance).batcher.retractions == 2


def test_admission_leaves_room_for_every_choice_to_grow() -> None:
    instance = Instance(settings(reserve_blocks=2), num_blocks=13)
    first = instance.submit(1, prompt(4), 30)
    second = instance.submit(2, prompt(8, 2), 4, choices=4)
    core = core_of(instance)
    assert core.requests[2].state is State.WAITING, "12 blocks: 1 taken, 2 needed, 10 to be left"
    instance.run()
    assert first.ended
    assert_answers(second, prompt(8, 2), 4)


def test_outputs_of_one_and_of_several_choices_share_a_message() -> None:
    instance = Instance()
    clients = {1: instance.submit(1, prompt(5), 12), 2: instance.submit(2, prompt(6, 2), 12, choices=2)}
    other_worker = (1 << 40) + 3
    clients[other_worker] = instance.submit(other_worker, prompt(7, 3), 12, choices=2)
    instance.run()
    for key, size, seed in ((1, 5, 0), (2, 6, 2), (other_worker, 7, 3)):
        assert_answers(clients[key], prompt(size, seed), 12)


def test_the_runners_keys_are_named_as_the_api_knows_them() -> None:
    keys = np.array([7, (3 << 40) + 9 + (1 << CHOICE_SHIFT), 8 + (128 << CHOICE_SHIFT)], "<i8").tobytes()
    named, choices = name_rows(keys)
    assert np.frombuffer(named, "<i8").tolist() == [7, (3 << 40) + 9, 8] and choices == bytes([0, 0, 127])


def test_logprobs_of_several_tokens_are_taken_apart() -> None:
    sampling = SamplingParams(top_logprobs=3, token_ids_logprob=(9,))
    tokens = [500, 600, 700]
    assert of_each(token_logprobs(tokens, sampling), 3) == [token_logprobs([token], sampling) for token in tokens]
    assert of_each(token_logprobs(tokens, SamplingParams()), 3)[1] == token_logprobs([600], SamplingParams())
    assert of_each(None, 2) == [None, None]


# --- through a hand-off ---------------------------------------------------------------------------------------------


def pushed(sim: SimCluster, choices: int, length: int) -> tuple[int, int, int, int]:
    """(prompts asked, blocks pushed, bytes landed, tokens computed) for one request."""
    asks, pushes = said(sim, sim.nodes["d0"], m.Prefill), said(sim, sim.nodes["p0"], m.Push)
    client = sim.submit(sim.nodes["d0"], prompt(length), 9, choices=choices)
    settle(sim)
    assert_answers(client, prompt(length), 9)
    decode = sim.nodes["d0"].scheduler.decode
    assert decode is not None and decode.handoffs.outcomes == {"landed": 1}
    blocks = sum(len(push.src_i32) // 4 for push in pushes)  # type: ignore[attr-defined]
    return len(asks), blocks, decode.handoffs.landed_bytes, core_of(sim.nodes["p0"]).stats.computed


@pytest.mark.parametrize("length", [16, 19])
def test_a_prompt_is_asked_for_computed_and_pushed_once_for_all_of_its_choices(length: int) -> None:
    one, four = pushed(world(), 1, length), pushed(world(), 4, length)
    assert one == four == (1, -(-length // 4), -(-length // 4) * BLOCK_BYTES, length)


def test_first_tokens_are_answered_before_the_kv_has_landed_and_ended_choices_wait_for_nothing() -> None:
    sim = world(write_delay=(1.0, 1.0))
    stop = (expected(prompt(10), 1, 1)[0],)
    client = sim.submit(sim.nodes["d0"], prompt(10), 5, choices=3, stop=stop, sampling={"logprobs": True})
    sim.run(0.3)
    assert [len(choice.tokens) for choice in client.choices] == [1, 1, 1]
    assert [choice.over for choice in client.choices] == [False, True, False]
    settle(sim)
    for choice in client.choices:
        assert choice.logprobs == [token_logprobs([token], SamplingParams(logprobs=True)) for token in choice.tokens]


def test_a_hand_off_whose_choices_all_ended_with_their_first_token_drains() -> None:
    sim = world(write_delay=(2.0, 2.0))
    client = sim.submit(sim.nodes["d0"], prompt(10), 1, choices=3)
    sim.run(0.2)
    assert client.ended and not core_of(sim.nodes["d0"]).requests
    settle(sim)


@pytest.mark.parametrize("choice", [-1, 0, 2])
def test_what_leaves_while_the_kv_is_on_its_way_is_not_decoded(choice: int) -> None:
    sim = world(write_delay=(1.0, 1.0))
    client = sim.submit(sim.nodes["d0"], prompt(10), 5, choices=3)
    sim.run(0.3)
    sim.abort(client, choice)
    if choice < 0:
        assert client.ended and not core_of(sim.nodes["d0"]).requests, "nobody is left to wait for it"
    settle(sim)
    gone = [c.finish.reason is FinishReason.ABORT for c in client.choices if c.finish]
    assert gone == [choice in (-1, index) for index in range(3)]


def test_when_the_sender_dies_after_the_first_tokens_each_choice_goes_on_elsewhere() -> None:
    sim = world(prefills=2, write_delay=(1.0, 1.0))
    asks = said(sim, sim.nodes["d0"], m.Prefill)
    client = sim.submit(sim.nodes["d0"], prompt(10), 6, choices=3)
    sim.run(0.3)
    assert len(asks) == 1 and [len(choice.tokens) for choice in client.choices] == [1, 1, 1]
    sim.kill(sim.nodes["p0"])
    sim.config.write_delay = (0.001, 0.002)
    settle(sim)
    assert_answers(client, prompt(10), 6)
    replays = [ask for ask in asks[1:] if isinstance(ask, m.Prefill)]
    assert [(r.choices, r.sampling.choice, r.prompt_len) for r in replays] == [(1, 0, 10), (1, 1, 10), (1, 2, 10)]
    assert [np.frombuffer(r.tokens_i32, "<i4").tolist()[10:] for r in replays] == [c.tokens[:1] for c in client.choices]


def test_when_the_sender_dies_before_the_first_tokens_the_prompt_is_asked_for_again_whole() -> None:
    sim = world(prefills=2)
    asks = said(sim, sim.nodes["d0"], m.Prefill)
    sim.config.step_time = (0.5, 0.5)
    client = sim.submit(sim.nodes["d0"], prompt(10), 6, choices=3)
    sim.run(0.2)
    sim.kill(sim.nodes["p0"])
    sim.config.step_time = (0.001, 0.002)
    settle(sim)
    assert_answers(client, prompt(10), 6)
    assert [ask.choices for ask in asks if isinstance(ask, m.Prefill)] == [3, 3]


def test_choices_that_do_not_fit_are_replayed_through_the_prefill_instance() -> None:
    sim = world(num_blocks=12)
    asks = said(sim, sim.nodes["d0"], m.Prefill)
    client = sim.submit(sim.nodes["d0"], prompt(10), 24, choices=4)
    settle(sim)
    assert_answers(client, prompt(10), 24)
    assert core_of(sim.nodes["d0"]).batcher.retractions > 0
    assert {(ask.choices, ask.sampling.choice) for ask in asks[1:] if isinstance(ask, m.Prefill)} <= {
        (1, index) for index in range(4)
    }


def test_a_choice_that_cannot_be_replayed_ends_alone_and_leaves_the_others_their_hand_offs() -> None:
    sim = world(prefills=2, write_delay=(1.0, 1.0))
    client = sim.submit(sim.nodes["d0"], prompt(10), 6, choices=3)
    sim.run(0.3)
    sim.kill(sim.nodes["p0"])
    sim.config.step_time = (0.5, 0.5)
    while not (side := sim.nodes["p1"].scheduler.prefill)._requests:  # type: ignore[union-attr]
        sim.run(sim.now + 0.01)
    sim.run(sim.now + 0.1)
    assert core_of(sim.nodes["d0"]).requests and sim.nodes["d0"].scheduler.decode.asked == 3  # type: ignore[union-attr]
    (failing,) = [id for id, request in side._requests.items() if request.choice == 1]  # type: ignore[union-attr]
    side.handoffs.fail(sim.now, failing, "out of luck", retryable=False)  # type: ignore[union-attr]
    sim.config.step_time, sim.config.write_delay = (0.001, 0.002), (0.001, 0.002)
    settle(sim)
    assert [c.finish.reason.value for c in client.choices if c.finish] == ["length", "error", "length"]
    assert sim.nodes["d0"].scheduler.decode.asked == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("started", [False, True])
def test_a_prompt_whose_hand_off_fails_for_good_ends_with_all_of_its_choices(started: bool) -> None:
    sim = world()
    sim.config.write_delay = (1.0, 1.0)
    sim.config.step_time = (0.001, 0.001) if started else (0.5, 0.5)
    client = sim.submit(sim.nodes["d0"], prompt(10), 6, choices=3)
    sim.run(0.3)
    side = sim.nodes["p0"].scheduler.prefill
    assert side is not None and (client.started is not None) is started
    (id,) = side._requests
    side.handoffs.fail(sim.now, id, "out of luck", retryable=False)
    sim.run(sim.now + 0.1)
    assert [c.finish.status for c in client.choices if c.finish] == [500, 500, 500]
    assert {len(choice.tokens) for choice in client.choices} == {int(started)}
    settle(sim)


def test_a_fallback_to_local_prefill_forks_here() -> None:
    sim = world(local="fallback")
    sim.kill(sim.nodes["p0"])
    client = sim.submit(sim.nodes["d0"], prompt(10), 6, choices=3)
    settle(sim)
    assert_answers(client, prompt(10), 6)
    assert core_of(sim.nodes["d0"]).stats.computed == 10


def test_a_peer_that_answers_with_another_number_of_first_tokens_costs_one_attempt() -> None:
    sim = world(prefills=2)
    prefill = sim.nodes["p0"].scheduler.prefill
    assert prefill is not None
    original = prefill.handoffs.first_token

    def short(now, id, choices, cached, prompt_logprobs=None):  # type: ignore[no-untyped-def]
        original(now, id, choices[:-1], cached, prompt_logprobs)

    prefill.handoffs.first_token = short  # type: ignore[method-assign]
    client = sim.submit(sim.nodes["d0"], prompt(10), 6, choices=3)
    settle(sim)
    assert_answers(client, prompt(10), 6)
    assert client.started is not None and client.started.prefill == "http://p1"


# --- mutants --------------------------------------------------------------------------------------------------------


def test_mutant_the_partial_block_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "copy", lambda self, request, source, tokens: None)
    instance = Instance()
    instance.submit(1, prompt(10), 6, choices=3)
    with pytest.raises(PdError, match="damaged"):
        instance.run()


def test_mutant_choices_share_the_partial_block(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batcher.enter

    def enter(self, request, computed):  # type: ignore[no-untyped-def]
        if request.family is not None and request.choice:
            first = request.family.members[0].blocks
            request.blocks[-1:] = first[-1:]
            self.pool.retain(first[-1:])
        original(self, request, computed)

    monkeypatch.setattr(Batcher, "enter", enter)
    monkeypatch.setattr(Batcher, "copy", lambda self, request, source, tokens: None)
    instance = Instance()
    instance.submit(1, prompt(10), 6, choices=3)
    with pytest.raises(PdError, match="damaged"):
        instance.run()


def landed_beside_a_running_request(length: int, choices: int) -> tuple[Instance, Client, Family]:
    """A prompt whose KV lands while two steps are in flight, so that its choices enter with an order yet to come."""
    instance = Instance(num_blocks=33)
    instance.submit(1, prompt(6, 9), 30)
    assert len(instance.runner.pending) == 2
    core, client = core_of(instance), Client.of(choices)
    instance.clients[2] = client
    request = Request(2, "r2", np.array(prompt(length), "<i4").tobytes(), length, SamplingParams(max_tokens=6))
    request.choices = choices
    core.add(request, 0.0)
    core.waiting.discard(request)
    request.blocks = core.pool.allocate(core.batcher.pages(length))
    positions = np.array(prompt(length), np.int64) | np.arange(length, dtype=np.int64) << 32
    for page, block in enumerate(request.blocks):
        part = positions[4 * page : 4 * page + 4]
        instance.runner.memory[block, : len(part)] = part
    family = core.families[2]
    firsts = [expected(prompt(length), 1, index)[0] for index in range(choices)]
    assert instance.scheduler.choices is not None
    instance.scheduler.choices.first(0.0, request, firsts, [None] * choices)
    instance.tick(0.1)  # says what has come
    assert [choice.tokens for choice in client.choices] == [[first] for first in firsts]
    assert len(core.batcher._copies) == choices - 1
    return instance, client, family


def test_the_source_of_a_copy_is_held_until_the_step_that_copies_is_done() -> None:
    instance, client, family = landed_beside_a_running_request(10, 3)
    core, source = core_of(instance), family.members[0].blocks[-1]
    owner = core.pool.generation[source]
    instance.handle(ev.AbortRequested(0.0, 2, "a stop string matched", 0))
    instance.finish_step()
    instance.finish_step()
    assert [copy.src for copy in instance.runner.pending[0].copies] == [source] * 2
    assert (core.pool.state_of(source), core.pool.generation[source]) == ("owned", owner), "or a peer might write there"
    instance.run()
    assert [choice.tokens for choice in client.others] == [expected(prompt(10), 6, index) for index in (1, 2)]
    assert instance.audit()["owned"] == 0


@pytest.mark.parametrize("choice", [0, 1, -1])
def test_a_choice_that_leaves_before_its_copy_is_ordered_is_not_copied_to(choice: int) -> None:
    instance, client, _ = landed_beside_a_running_request(10, 2)
    core = core_of(instance)
    instance.handle(ev.AbortRequested(0.0, 2, "a stop string matched", choice))
    assert len(core.batcher._copies) == (choice == 0)
    instance.run()
    for index, one in enumerate(client.choices):
        if choice not in (-1, index):
            assert one.tokens == expected(prompt(10), 6, index)
    assert instance.audit()["owned"] == 0
