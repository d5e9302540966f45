"""Penalties, biases, `min_tokens`, grammars, several choices and other tokens' logprobs: the same from both workers.

The GPU's computes with its kernels' references here, at once and one step ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pd.api import grammar
from pd.kernels.shaping import MOST_COUNTED, unpack_bits
from pd.messages import StepOrder
from pd.runner.device_sampler import DeviceSampler
from pd.runner.device_state import DeviceState
from pd.runner.device_worker import DeviceWorker
from pd.runner.grammar import Grammars
from pd.runner.inputs import Growing, Request
from pd.runner.shaping import asks_more
from pd.runner.warm_up import warm_sampler
from pd.types import SamplingParams
from tests.oracle import Oracle, tiny_model
from tests.shaping_kit import (
    ALL,
    FEATURES,
    GREEDY,
    NARROW,
    WARM,
    Answer,
    Server,
    ShapedOracle,
    prompt_of,
    said_alike,
    traffic,
)
from tests.worker_driver import KIND, Driver, Track, f32

CPU = torch.device("cpu")
PAGE = 16
SAYS = {"logprobs", "top_logprobs", "token_ids_logprob"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its tokens are the bytes."""
    return tiny_model(tmp_path_factory.mktemp("models"), "llama", tokenizer=True)


def make_driver(path: str, kind: str = "device", **options: Any) -> Driver:
    token = KIND.set(kind)
    driver = Driver(path, page_size=PAGE, num_blocks=1200, **options)
    KIND.reset(token)
    return driver


@pytest.fixture(scope="module")
def hosts(llama: str) -> list[Answer]:
    """The whole traffic by the CPU's worker."""
    return Server(make_driver(llama, "host"), traffic(), False).run()


@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "one step ahead"])
def test_all_kinds_of_requests_together_get_what_the_cpus_worker_gives(
    llama: str, hosts: list[Answer], ahead: bool
) -> None:
    asks = traffic()
    found = Server(make_driver(llama), asks, ahead).run()
    for number, (ask, one, other) in enumerate(zip(asks, found, hosts, strict=True)):
        assert len(one.tokens) == ask.count
        assert one.tokens == other.tokens, f"request {number}: {ask}"
        said_alike(one.said, other.said)


@pytest.mark.parametrize("features", [*FEATURES.values(), ALL], ids=[*FEATURES, "all"])
def test_greedy_tokens_are_the_best_of_transformers_logits_after_shaping(llama: str, features: dict[str, Any]) -> None:
    """A short prompt whose output goes in circles without penalties, and a longer one."""
    sampling, oracle = SamplingParams(**GREEDY, **features), ShapedOracle(llama)
    drivers = [make_driver(llama, kind) for kind in ("host", "device")]
    for number in (9, 16):
        prompt = prompt_of(traffic(), number, 256, PAGE)
        expected, plain = (oracle.greedy(prompt, 24, one) for one in (sampling, SamplingParams(**GREEDY)))
        assert (expected != plain) == bool(features.keys() - SAYS), "what shapes logits must show"
        for driver in drivers:
            driver.admit(number, prompt, sampling)
            driver.generate(24, chunk=20)
            assert driver.tracks[number].emitted == expected


@pytest.mark.parametrize("way", [GREEDY, WARM, NARROW], ids=["greedy", "warm", "narrow"])
@pytest.mark.parametrize("features", [*FEATURES.values(), ALL], ids=[*FEATURES, "all"])
def test_a_replay_from_any_token_goes_on_with_the_same_ones(
    llama: str, features: dict[str, Any], way: dict[str, Any]
) -> None:
    """Counted from the prompt's end, and whether or not the prompt is cached."""
    sampling = SamplingParams(**way, **features, seed=11)
    prompt = prompt_of(traffic(), 5, 256, PAGE)
    whole = make_driver(llama)
    track = whole.admit(0, prompt, sampling)
    whole.generate(10)
    others = make_driver(llama)
    first = others.admit(0, prompt)
    others.generate(1)
    for cut in range(1, 10):
        shared = first.blocks[:2] if cut % 2 else ()
        others.admit(cut, prompt + track.emitted[:cut], sampling, prompt_len=len(prompt), shared=shared)
        rest = others.tracks[cut]
        assert rest.computed == (32 if cut % 2 else 0)
        while len(rest.emitted) < 10 - cut:
            others.step({cut: min(13, len(rest.tokens) - rest.computed)})
        assert rest.emitted == track.emitted[cut:], cut


def test_a_slots_counts_are_those_of_the_request_that_has_it_now(llama: str) -> None:
    """Penalised requests follow each other, and plain ones, in few slots while steps are under way."""
    penalised = SamplingParams(**GREEDY, frequency_penalty=1.0, presence_penalty=1.0, repetition_penalty=1.5)
    prompts = [np.random.default_rng(seed).integers(0, 256, 20).tolist() for seed in range(3)]
    expected = [ShapedOracle(llama).greedy(prompt, 3, penalised) for prompt in prompts]
    driver, orders = make_driver(llama), []
    for key in range(20):
        track = driver.admit(key, prompts[key % 3], penalised if key % 4 else SamplingParams(**GREEDY))
        for _ in range(3):
            orders.append(driver.order({key: len(track.tokens) - track.computed}))
            driver.worker.launch(orders[-1])
        driver.release(key)
    for order in orders:
        driver.take(order)
    for key in range(20):
        if key % 4:
            assert driver.tracks[key].emitted == expected[key % 3]


@pytest.mark.parametrize("way", [WARM, NARROW], ids=["warm", "narrow"])
@pytest.mark.parametrize("count", [3, 200])  # 200 are not drawn at once
def test_every_choice_draws_what_it_would_alone(llama: str, way: dict[str, Any], count: int) -> None:
    driver, prompt = make_driver(llama), prompt_of(traffic(), 3, 256, PAGE)
    neighbour = driver.admit(1, prompt, SamplingParams(**WARM, seed=4))
    sampling = SamplingParams(**way, **ALL, seed=9)
    track = driver.admit(2, prompt, sampling, choices=count)
    driver.generate(4, chunk=9)
    assert [len(some) for some in track.choices] == [count, 1, 1, 1]
    alone = make_driver(llama, "host")
    hosts = alone.admit(2, prompt, sampling, choices=count)
    alone.generate(4)
    assert track.choices == hosts.choices
    said_alike(track.said, hosts.said)
    plain = make_driver(llama)
    other = plain.admit(1, prompt, SamplingParams(**WARM, seed=4))
    plain.generate(4)
    assert neighbour.emitted == other.emitted


def test_a_sampled_token_has_the_very_logprob_that_it_has_among_the_alternatives(llama: str) -> None:
    driver = make_driver(llama)
    plain = driver.admit(1, [5, 6, 7], SamplingParams(**WARM, seed=3, logprobs=True))
    track = driver.admit(2, [5, 6, 7], SamplingParams(**WARM, seed=3, logprobs=True, top_logprobs=256))
    only = driver.admit(3, [5, 6, 7], SamplingParams(**WARM, seed=3, top_logprobs=2))
    driver.generate(5)
    for token, said in zip(track.emitted, track.said, strict=True):
        assert said.tops is not None
        ids = np.frombuffer(said.tops.ids_i32, np.int32).tolist()
        assert f32(said.chosen_f32)[0] == f32(said.tops.logprobs_f32)[ids.index(token)]
    assert plain.emitted == track.emitted == only.emitted
    assert plain.logprobs == pytest.approx(track.logprobs, abs=1e-5)
    assert only.logprobs == track.logprobs


def test_logprobs_are_of_the_model_and_not_of_what_was_made_of_it(llama: str) -> None:
    driver, prompt = make_driver(llama), prompt_of(traffic(), 3, 256, PAGE)
    track = driver.admit(1, prompt, SamplingParams(**WARM, **ALL, seed=2))
    driver.generate(6)
    expected = Oracle(llama).logprobs(prompt + track.emitted)
    for at, (token, said) in enumerate(zip(track.emitted, track.said, strict=True), len(prompt) - 1):
        assert f32(said.chosen_f32) == pytest.approx([float(expected[at, token])], abs=1e-5)
        assert f32(said.wanted_f32) == pytest.approx(expected[at, [7, 8]].numpy(), abs=1e-5)
        best = expected[at].topk(3)
        assert said.tops is not None
        assert np.frombuffer(said.tops.ids_i32, np.int32).tolist() == best.indices.tolist()
        assert f32(said.tops.logprobs_f32) == pytest.approx(best.values.numpy(), abs=1e-5)


# --- grammars -------------------------------------------------------------------------------------------------------

EOS = 1
REGEX = grammar.from_regex(r"[a-c]{2,9}(-[0-9]{1,3})*", "regex")


@pytest.fixture
def grammars(llama: str) -> Iterator[Grammars]:
    made = Grammars(llama, 256, [EOS])
    yield made
    made.close()


def constrained(way: dict[str, Any], seed: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**way, grammar=REGEX, seed=seed, stop_token_ids=(EOS,), **fields)


def launch_ahead(driver: Driver, steps: int) -> list[StepOrder]:
    """Each step is ordered and launched before the results of the one before it are taken."""
    orders: list[StepOrder] = []
    for _ in range(steps):
        counts = {track.key: len(track.tokens) - track.computed for track in driver.tracks.values()}
        orders.append(driver.order(counts))
        driver.worker.launch(orders[-1])
        if len(orders) > 1:
            driver.take(orders.pop(0))
    return orders


def test_grammars_hold_one_step_ahead_with_everything_else(llama: str, grammars: Grammars) -> None:
    samplings = [
        constrained(WARM, 1),
        constrained(NARROW, 2, logprobs=True, top_logprobs=2),
        constrained(GREEDY, 0, repetition_penalty=1.5, frequency_penalty=1.0, logit_bias={ord("c"): 3.0}),
        constrained(WARM, 5, min_tokens=7, logit_bias={EOS: 100.0}),
        constrained(WARM, 6, ignore_eos=True),
        SamplingParams(**WARM, seed=3, logprobs=True),
        SamplingParams(**NARROW, **ALL, seed=4),
    ]
    found: list[list[Track]] = []
    for kind in ("host", "device"):
        driver = make_driver(llama, kind, grammars=grammars)
        for key, sampling in enumerate(samplings):
            driver.admit(key, [*b"What is it? "], sampling)
        for order in launch_ahead(driver, 16):
            assert not driver.take(order).failed
        found.append(list(driver.tracks.values()))
    for one, other in zip(*found, strict=True):
        assert len(one.emitted) == 16
        assert one.emitted == other.emitted
        said_alike(one.said, other.said)
    assert found[1][3].emitted.index(EOS) >= 7


def test_all_choices_of_a_constrained_request_are_constrained(llama: str, grammars: Grammars) -> None:
    driver = make_driver(llama, grammars=grammars)
    track = driver.admit(1, [*b"?"], constrained(WARM, 1, repetition_penalty=1.2), choices=40)
    driver.generate(3)
    assert set(track.choices[0]) == {*b"abc"}
    assert set(track.emitted[:2]) <= {*b"abc"}


def test_a_request_that_cannot_go_on_fails_at_its_own_step(llama: str) -> None:
    """Though the step in which it fails has been launched when the results of the one before it are taken."""
    few = Grammars(llama, 100, [EOS])  # "a" is 97, "z" is 122
    driver = make_driver(llama, grammars=few)
    driver.admit(1, [*b"?"], SamplingParams(temperature=0.0))
    driver.admit(2, [*b"?"], SamplingParams(grammar=grammar.from_regex("az", "regex"), temperature=0.0))
    orders = [driver.order(dict.fromkeys((1, 2), 1)) for _ in range(3)]
    for order in orders:
        driver.worker.launch(order)
    failed = [[row.index for row in driver.take(order).failed] for order in orders]
    assert driver.tracks[2].emitted[0] == ord("a")
    assert failed == [[], [1], [1]]
    few.close()


@pytest.mark.parametrize("vocab", [40, 64, 256, 300])
def test_what_a_grammar_allows_are_bits_of_the_models_own_tokens(llama: str, vocab: int) -> None:
    made = Grammars(llama, vocab, [EOS])
    request = make_request(SamplingParams(grammar=grammar.from_regex("[!-~]{1,3}", "regex")), tokens=3)
    made.constrain(request)
    bits = made.allowed([request])[0]
    assert len(bits) == -(-vocab // 32)
    allowed = unpack_bits(torch.from_numpy(bits)[None], 32 * len(bits))[0].nonzero()[:, 0].tolist()
    assert allowed == list(range(ord("!"), min(ord("~") + 1, vocab)))
    made.close()


# --- what costs when -----------------------------------------------------------------------------------------------


def make_request(sampling: SamplingParams, tokens: int = 4, choices: int = 1) -> Request:
    known, blocks = np.arange(tokens, dtype=np.int32), np.empty(0, dtype=np.int32)
    return Request(1, 1, 3, 0, Growing(known), Growing(blocks), sampling, choices, -1, 0)


def test_only_requests_that_ask_for_more_take_the_way_behind_the_graph() -> None:
    def asks(sampling: SamplingParams, **fields: int) -> bool:
        request = make_request(sampling, **fields)
        DeviceState(1, 4, 2, 10_000, CPU).admit([request])
        return asks_more(request)

    for way, features in itertools.product((GREEDY, WARM), FEATURES.values()):
        assert asks(SamplingParams(**way, **features))
        assert not asks(SamplingParams(**way))
    assert asks(SamplingParams(**WARM), choices=2)
    assert asks(SamplingParams(**NARROW))
    assert not asks(SamplingParams(**NARROW | GREEDY))
    assert asks(SamplingParams(grammar=REGEX))
    least = SamplingParams(min_tokens=2, stop_token_ids=(1,))
    assert asks(least, tokens=4)
    assert not asks(least, tokens=5), "it may end"
    assert not asks(SamplingParams(min_tokens=9)), "nothing ends it"


def test_counts_take_memory_only_for_requests_with_penalties() -> None:
    state = DeviceState(64, 4, 2, 1000, CPU)
    plain = [make_request(SamplingParams()) for _ in range(20)]
    state.admit(plain)
    assert len(state.tokens.counts) == len(state.tokens.seen) == 0
    penalised = make_request(SamplingParams(presence_penalty=1.0))
    state.admit([penalised])
    assert penalised.slot < len(state.tokens.counts) < 64
    for request in plain:
        state.release(request)
    state.admit([make_request(SamplingParams(presence_penalty=1.0)) for _ in range(63)])
    assert len(state.tokens.counts) == 64
    assert state.tokens.counts[penalised.slot].sum() == 1, "room for more keeps what is there"
    assert state.tokens.counts.dtype == torch.int16


def test_a_replay_with_more_of_a_token_than_a_count_can_hold_is_admitted() -> None:
    state = DeviceState(2, 4000, 2, 50, CPU)
    request = make_request(SamplingParams(presence_penalty=1.0))
    request.tokens = Growing(np.array([1, 2, 3] + [7] * 40_000 + [8], dtype=np.int32))
    state.admit([request])
    assert state.tokens.counts[request.slot].nonzero()[:, 0].tolist() == [7, 8]
    assert state.tokens.counts[request.slot, 7] == MOST_COUNTED


def test_the_first_samples_leave_every_slot_free() -> None:
    state = DeviceState(32, 4, 2, 100, CPU)
    for rows in (1, 32):
        warm_sampler(DeviceSampler(state), torch.randn(rows, 100))
    state.admit([make_request(SamplingParams()) for _ in range(32)])


def test_a_worker_of_the_gpus_kind_was_tested(llama: str) -> None:
    assert isinstance(make_driver(llama).worker, DeviceWorker)
    assert not isinstance(make_driver(llama, "host").worker, DeviceWorker)
