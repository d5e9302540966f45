"""The engine and its exchanges, driven by messages; no loop, no sockets."""

import array

import pytest

from pd.api.completions import best
from pd.api.engine import GRACE_S, Engine
from pd.api.exchange import Exchange, Prompt
from pd.api.metrics import Histogram, Latencies
from pd.errors import ChannelFull, RequestError
from pd.messages import Abort, Finish, Finished, InstanceInfo, Rejected, Started, StepOutputs, Submit
from pd.testing.scripted_scheduler import row, token_logprobs
from pd.types import FinishReason, InstanceState, Load, SamplingParams

LENGTH = Finish(FinishReason.LENGTH)


class Recorder:
    """A channel that keeps what is sent."""

    def __init__(self):
        self.sent = []
        self.room = 1000

    def send_nowait(self, message):
        if len(self.sent) >= self.room:
            raise ChannelFull("recorder")
        self.sent.append(message)

    def of(self, kind):
        return [message for message in self.sent if isinstance(message, kind)]


class Letters:
    """Token n is the n-th letter."""

    def feed(self, ids):
        return "".join(chr(96 + token) for token in ids)

    def flush(self):
        return ""


class World:
    def __init__(self, **options):
        self.now = 100.0
        self.channel = Recorder()
        self.latencies = Latencies()
        self.engine = Engine(self.channel, lambda prompt: Letters(), self.latencies, clock=lambda: self.now, **options)
        self.engine.handle(InstanceInfo(InstanceState.READY, Load()))

    def exchange(self, *prompts, stream=True, **options):
        exchange = Exchange("rid", self.now, stream=stream, **options)
        self.engine.submit(exchange, prompts or (prompt(),))
        return exchange


def prompt(stop=(), min_tokens=0, include=False, **options):
    sampling = SamplingParams(max_tokens=50, min_tokens=min_tokens)
    return Prompt([1, 2, 3], sampling, "rid", tuple(stop), include, **options)


def letters(text):
    return [ord(letter) - 96 for letter in text]


def test_keys_carry_the_worker_and_are_never_reused():
    world = World(worker=5)
    world.exchange(prompt(), prompt())
    world.exchange()
    keys = [submit.key for submit in world.channel.of(Submit)]
    assert len(set(keys)) == 3 and {key >> 40 for key in keys} == {5}


def test_one_message_feeds_every_request_it_concerns():
    world = World()
    first, second = world.exchange(), world.exchange()
    keys = [exchange.generations[0].key for exchange in (first, second)]
    world.engine.handle(
        StepOutputs(
            array.array("q", [keys[1], 999, keys[0]]).tobytes(),
            bytes([2, 1, 1]),
            array.array("i", letters("bcza")).tobytes(),
            started=[Started(keys[0], 7, "http://p")],
        )
    )
    assert first.choices()[0].take_text() == "a" and second.choices()[0].take_text() == "bc"
    assert first.cached_tokens() == 7 and first.prefills_used() == "http://p"


def test_text_and_finish_in_one_message():
    world = World()
    exchange = world.exchange()
    world.engine.handle(row(exchange.generations[0].key, letters("abc"), finish=LENGTH))
    choice = exchange.choices()[0]
    assert exchange.over and choice.take_text() == "abc" and choice.finish is LENGTH and choice.count == 3
    assert world.engine.open_exchanges == 0 and not world.channel.of(Abort)


def test_a_stop_tokens_text_stays_out_and_it_counts():
    world = World()
    for include, text in ((False, "ab"), (True, "abc")):
        exchange = world.exchange(prompt(include=include))
        world.engine.handle(
            row(exchange.generations[0].key, letters("abc"), finish=Finish(FinishReason.STOP, stop_id=3))
        )
        choice = exchange.choices()[0]
        assert choice.take_text() == text and choice.count == 3 and choice.matched == 3


def test_a_stop_string_in_the_middle_of_a_row_cuts_ids_logprobs_and_text():
    world = World()
    exchange = world.exchange(prompt(stop=["cd"]))
    key = exchange.generations[0].key
    outputs = row(key, letters("abcdef"), logprobs=True, top=2)
    world.engine.handle(outputs)
    choice = exchange.choices()[0]
    assert choice.take_text() == "ab" and choice.matched == "cd" and choice.finish.reason is FinishReason.STOP
    assert choice.ids == letters("abcd") and choice.count == 4
    assert len(choice.logprobs.chosen) == len(choice.logprobs.tops) == 4
    assert [abort.key for abort in world.channel.of(Abort)] == [key]
    world.engine.handle(row(key, letters("gh"), finish=LENGTH))  # what was in flight
    assert choice.count == 4 and choice.take_text() == "" and exchange.over


def test_a_stop_string_that_completes_with_the_finish_wins_and_nothing_is_aborted_twice():
    world = World()
    exchange = world.exchange(prompt(stop=["bc"]))
    world.engine.handle(row(exchange.generations[0].key, letters("abc"), finish=LENGTH))
    choice = exchange.choices()[0]
    assert choice.take_text() == "a" and choice.finish.reason is FinishReason.STOP
    assert len(world.channel.of(Abort)) <= 1


def test_text_held_for_a_stop_string_comes_out_at_the_end():
    world = World()
    exchange = world.exchange(prompt(stop=["cdx"]))
    key = exchange.generations[0].key
    world.engine.handle(row(key, letters("abcd")))
    assert exchange.choices()[0].take_text() == "ab"
    world.engine.handle(StepOutputs(b"", b"", b"", finished=[Finished(key, 0, LENGTH)]))
    assert exchange.choices()[0].take_text() == "cd"


def test_stop_strings_count_only_beyond_min_tokens():
    world = World()
    exchange = world.exchange(prompt(stop=["b"], min_tokens=3))
    world.engine.handle(row(exchange.generations[0].key, letters("abcabc")))
    assert exchange.choices()[0].take_text() == "abca" and exchange.over


def test_a_rejected_prompt_ends_its_exchange_and_its_siblings():
    world = World()
    exchange = world.exchange(prompt(), prompt(), prompt())
    keys = [generation.key for generation in exchange.generations]
    world.engine.handle(Rejected(keys[1], 400, "too long", param="prompt", code="c"))
    assert exchange.failure.status == 400 and exchange.failure.param == "prompt"
    assert [abort.key for abort in world.channel.of(Abort)] == [keys[0], keys[2]]
    world.engine.handle(row(keys[0], letters("a")))
    assert exchange.choices()[0].count == 0


def test_an_error_keeps_its_status_and_an_abort_is_a_finish():
    world = World()
    failed, aborted = world.exchange(), world.exchange()
    for exchange, finish in (
        (failed, Finish(FinishReason.ERROR, message="died", status=502)),
        (aborted, Finish(FinishReason.ABORT, message="why")),
    ):
        key = exchange.generations[0].key
        world.engine.handle(StepOutputs(b"", b"", b"", finished=[Finished(key, 0, finish)]))
    assert failed.failure.status == 502 and failed.failure.kind == "server_error"
    assert aborted.failure is None and aborted.choices()[0].finish.message == "why"
    assert not world.channel.of(Abort) and world.engine.open_exchanges == 0


def test_nothing_is_taken_before_ready_while_draining_or_after_the_end():
    world = World()
    for state in (InstanceState.STARTING, InstanceState.DRAINING):
        world.engine.handle(InstanceInfo(state, Load()))
        with pytest.raises(RequestError, match=state.value):
            world.exchange()
    world.engine.handle(InstanceInfo(InstanceState.READY, Load()))
    world.engine.lose("gone")
    with pytest.raises(RequestError, match="gone"):
        world.exchange()
    assert not world.channel.of(Submit)


def test_a_full_channel_refuses_the_request_and_leaves_nothing_behind():
    world = World()
    world.channel.room = 1
    with pytest.raises(RequestError) as caught:
        world.exchange(prompt(), prompt())
    assert caught.value.status == 503 and caught.value.code == "overloaded"
    assert world.engine.open_exchanges == 0


@pytest.mark.parametrize("wakes", ["the sweep", "a message", "the next request"])
def test_an_abort_that_a_full_channel_did_not_take_is_sent_when_it_takes_messages_again(wakes):
    world = World()
    gone, stays = world.exchange(prompt(), prompt()), world.exchange()
    keys = [generation.key for generation in gone.generations]
    world.channel.room = len(world.channel.sent)
    world.engine.abort(gone, "the client disconnected")
    world.engine.sweep_once()
    world.engine.handle(row(stays.generations[0].key, letters("a")))
    assert not world.channel.of(Abort)
    world.channel.room += 1
    world.engine.sweep_once()
    world.channel.room = 1000
    if wakes == "the sweep":
        world.engine.sweep_once()
    elif wakes == "a message":
        world.engine.handle(row(stays.generations[0].key, letters("b")))
    else:
        world.exchange()
    assert [(abort.key, abort.reason) for abort in world.channel.of(Abort)] == [
        (key, "the client disconnected") for key in keys
    ]
    world.engine.sweep_once()
    world.engine.abort(gone, "again")
    assert len(world.channel.of(Abort)) == 2, "each is told once"


def test_while_aborts_wait_no_request_is_taken_so_that_their_number_stays_bounded():
    world = World()
    exchanges = [world.exchange() for _ in range(3)]
    world.channel.room = len(world.channel.sent)
    for exchange in exchanges:
        world.engine.abort(exchange, "the client disconnected")
    world.channel.room += 2  # for two of the three
    with pytest.raises(RequestError) as caught:
        world.exchange()
    assert caught.value.status == 503 and caught.value.code == "overloaded"
    assert len(world.channel.of(Abort)) == 2 and len(world.channel.of(Submit)) == 3


def test_aborts_that_wait_are_forgotten_with_the_scheduler():
    world = World()
    exchange = world.exchange()
    world.channel.room = len(world.channel.sent)
    world.engine.abort(exchange, "the client disconnected")
    world.engine.lose("gone")
    world.channel.room = 1000
    world.engine.sweep_once()
    assert not world.channel.of(Abort)


def test_a_lost_scheduler_ends_every_exchange():
    world = World()
    exchanges = [world.exchange(), world.exchange(stream=False)]
    world.engine.lose("its connection ended")
    assert all(exchange.failure.status == 503 for exchange in exchanges)
    assert world.engine.open_exchanges == 0 and world.engine.lost.is_set()


def test_messages_that_came_before_the_connection_ended_still_count():
    world = World()
    done, open_ = world.exchange(), world.exchange()
    last = [row(done.generations[0].key, letters("ab"), finish=LENGTH)]
    world.channel.recv_nowait = lambda: last.pop() if last else None
    world.engine.disconnected()
    assert done.failure is None and done.choices()[0].take_text() == "ab"
    assert open_.failure.status == 503


def test_silence_beyond_the_schedulers_own_bound_ends_a_request():
    world = World(idle_timeout_s=10.0)
    exchange, bounded = world.exchange(), world.exchange(deadline=104.0)
    assert world.channel.of(Submit)[1].client_timeout_ms == 4000
    world.now = 104.0 + GRACE_S + 0.1
    world.engine.handle(row(exchange.generations[0].key, letters("a")))
    world.engine.sweep_once()
    assert bounded.failure.status == 504 and exchange.failure is None
    world.now += 10.0 + GRACE_S + 0.1
    world.engine.sweep_once()
    assert exchange.failure.status == 504 and len(world.channel.of(Abort)) == 2


def test_a_deadline_that_passed_while_tokenising_is_not_submitted():
    world = World()
    with pytest.raises(RequestError) as caught:
        world.exchange(deadline=99.0)
    assert caught.value.status == 504 and not world.channel.sent


def test_latencies_count_every_token_once():
    world = World()
    exchange = world.exchange()
    key = exchange.generations[0].key
    for gap, text in ((0.5, "a"), (0.02, "b"), (0.04, "cd")):
        world.now += gap
        world.engine.handle(row(key, letters(text)))
    first, rest = world.latencies.first_token, world.latencies.inter_token
    assert sum(first.cells[:-1]) == 1 and first.total == pytest.approx(0.5)
    assert sum(rest.cells[:-1]) == 3 and rest.total == pytest.approx(0.06)


def test_histogram_buckets_are_cumulative_and_inclusive():
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]


def test_logprob_rows_unpack_by_position():
    world = World()
    exchange = world.exchange()
    outputs = row(exchange.generations[0].key, [4, 5])
    outputs.logprobs = row(0, [4, 5], logprobs=True, top=3).logprobs
    assert outputs.logprobs[0].logprobs == token_logprobs([4, 5], 3)
    world.engine.handle(outputs)
    logprobs = exchange.choices()[0].logprobs
    assert logprobs.chosen == [-0.5, -0.5]
    assert logprobs.tops == [([4, 5, 6], [-1.0, -2.0, -3.0]), ([5, 6, 7], [-1.0, -2.0, -3.0])]


# --- several choices of one prompt -----------------------------------------------------------------------------------


def both(key, first, second, **options):
    """One step's tokens of choices 0 and 1."""
    return StepOutputs(
        array.array("q", [key, key]).tobytes(),
        bytes([len(first), len(second)]),
        array.array("i", letters(first + second)).tobytes(),
        bytes([0, 1]),
        **options,
    )


def test_choices_are_one_submission_and_get_their_own_tokens():
    world = World()
    exchange = world.exchange(prompt(choices=2), prompt(choices=2))
    assert [submit.choices for submit in world.channel.of(Submit)] == [2, 2]
    assert [choice.place for choice in exchange.choices()] == [0, 1, 2, 3]
    key = exchange.generations[1].key
    world.engine.handle(both(key, "ab", "x", started=[Started(key, 2)]))
    world.engine.handle(row(key, letters("y"), choice=1))
    assert [choice.take_text() for choice in exchange.choices()] == ["", "", "ab", "xy"]
    assert [choice.place for choice in exchange.take_ready()] == [2, 3]
    assert (exchange.prompt_tokens(), exchange.completion_tokens(), exchange.cached_tokens()) == (6, 4, 2)


def test_an_exchange_is_over_when_its_last_choice_is():
    world = World()
    exchange = world.exchange(prompt(choices=2))
    key = exchange.generations[0].key
    world.engine.handle(both(key, "a", "b", finished=[Finished(key, 1, LENGTH)]))
    assert not exchange.over and exchange.choices()[1].finish is LENGTH
    world.engine.handle(row(key, letters("c"), finish=LENGTH))
    assert exchange.over and world.engine.open_exchanges == 0 and not world.channel.of(Abort)


def test_a_stop_string_of_one_choice_ends_it_alone_and_of_the_last_one_all():
    world = World()
    exchange = world.exchange(prompt(stop=["z"], choices=3))
    key = exchange.generations[0].key
    world.engine.handle(row(key, letters("az"), choice=1))
    assert [(abort.key, abort.choice) for abort in world.channel.of(Abort)] == [(key, 1)]
    late = StepOutputs(b"", b"", b"", finished=[Finished(key, 1, Finish(FinishReason.ABORT, status=499))])
    world.engine.handle(late)
    world.engine.handle(row(key, letters("b"), choice=1))
    assert exchange.failure is None and exchange.choices()[1].take_text() == "a" and not exchange.over
    world.engine.handle(row(key, letters("c"), finish=LENGTH))
    world.engine.handle(row(key, letters("dz"), choice=2))
    assert exchange.over and [choice.take_text() for choice in exchange.choices()] == ["c", "", "d"]
    assert [(abort.key, abort.choice) for abort in world.channel.of(Abort)] == [(key, 1), (key, -1)]


def test_a_failed_choice_fails_the_request_and_its_other_choices_are_aborted():
    world = World()
    exchange = world.exchange(prompt(choices=2))
    key = exchange.generations[0].key
    error = Finish(FinishReason.ERROR, message="died", status=502)
    world.engine.handle(StepOutputs(b"", b"", b"", finished=[Finished(key, 1, error)]))
    assert exchange.failure.status == 502
    assert [(abort.key, abort.choice) for abort in world.channel.of(Abort)] == [(key, -1)]


def test_a_cancel_is_one_abort_for_all_choices():
    world = World()
    exchange = world.exchange(prompt(choices=5))
    world.engine.abort(exchange, "the client disconnected")
    assert [(abort.key, abort.choice) for abort in world.channel.of(Abort)] == [(exchange.generations[0].key, -1)]


def test_the_best_candidates_are_those_with_the_highest_mean_logprob():
    world = World()
    exchange = world.exchange(prompt(choices=4))
    key = exchange.generations[0].key
    for choice, (text, logprob) in enumerate([("aaaa", -0.5), ("b", -0.9), ("cc", -0.2), ("d", -0.5)]):
        world.engine.handle(row(key, letters(text), finish=LENGTH, logprobs=True, choice=choice, logprob=logprob))
    candidates = exchange.choices()
    assert [choice.index for choice in best(candidates, 3)] == [2, 0, 3], "not the sum: four tokens at -0.5 beat -0.9"
    assert best(candidates, 4) == candidates
