"""The GPU's worker one step ahead: orders whose tokens nobody on the host knows yet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pd.errors import ProtocolError
from pd.messages import StepOrder
from pd.runner.device_worker import Launched
from pd.types import SamplingParams
from tests.oracle import tiny_model
from tests.worker_driver import GREEDY, KIND, Driver, i64

WARM = SamplingParams(temperature=0.8, seed=7, logprobs=True)
NARROW = SamplingParams(temperature=0.9, seed=3, top_k=12, top_p=0.9, logprobs=True)
PENALISED = SamplingParams(temperature=0.7, seed=5, repetition_penalty=1.4, frequency_penalty=0.3, logprobs=True)
SAMPLINGS = [GREEDY, WARM, NARROW, PENALISED]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    token = KIND.set("device")
    yield
    KIND.reset(token)


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, int(rng.integers(3, 40))).tolist() for _ in range(count)]


def run(model: str, ahead: bool, samplings: list[SamplingParams], steps: int = 20) -> list[list[int]]:
    """Tokens of requests that enter one by one and leave after `steps`; step n + 1 is ordered before n's results."""
    driver = Driver(model, page_size=4)
    waiting = list(enumerate(zip(prompts(len(samplings)), samplings, strict=True)))
    orders: list[StepOrder] = []
    while True:
        if waiting:
            key, (prompt, sampling) = waiting.pop(0)
            driver.admit(key, prompt, sampling)
        counts = {}
        for key, track in list(driver.tracks.items()):
            if len(track.tokens) - len(prompts(len(samplings))[key]) <= steps:
                counts[key] = len(track.tokens) - track.computed
        if not counts:
            break
        order = driver.order(counts)
        driver.worker.launch(order)
        orders.append(order)
        if len(orders) > int(ahead):
            driver.take(orders.pop(0))
    for order in orders:
        driver.take(order)
    return [driver.tracks[key].emitted for key in sorted(driver.tracks)]


@pytest.mark.parametrize(
    "samplings", [SAMPLINGS, [GREEDY, WARM], [PENALISED, PENALISED]], ids=["mixed", "plain", "slow"]
)
def test_one_step_ahead_samples_the_same_tokens(model: str, samplings: list[SamplingParams]) -> None:
    behind, ahead = run(model, False, samplings), run(model, True, samplings)
    assert ahead == behind
    assert all(len(tokens) == 21 for tokens in ahead)


def test_a_slot_is_filled_again_while_its_last_step_is_under_way(model: str) -> None:
    driver = Driver(model, page_size=4)
    alone = Driver(model, page_size=4)
    expected = alone.admit(1, [5, 6, 7])
    alone.generate(4)
    orders = []
    for key in range(100):  # more than there are slots
        driver.admit(key, [5, 6, 7])
        order = driver.order({key: 3})
        driver.worker.launch(order)
        orders.append(order)
        order = driver.order({key: 1})
        driver.worker.launch(order)
        orders.append(order)
        driver.release(key)
        for order in orders[-2:]:
            driver.take(order)
        assert driver.tracks[key].emitted == expected.emitted[:2]


def test_more_requests_than_slots_are_an_error(model: str) -> None:
    driver = Driver(model)
    for key in range(65):
        driver.admit(key, [1, 2])
    with pytest.raises(ProtocolError, match="slots"):
        driver.step(dict.fromkeys(range(65), 2))


def test_growth_enters_the_table_of_a_request_that_is_not_in_the_step(model: str) -> None:
    driver = Driver(model, page_size=4)
    first, other = driver.admit(1, [5, 6, 7, 8]), driver.admit(2, [9, 9])
    driver.step({1: 4, 2: 2})
    block = driver.free.pop()
    first.blocks.append(block)
    order = driver.order({2: 1})
    order.grow_keys_i64, order.grow_blocks_i32 = i64([1]), np.array([block], dtype=np.int32).tobytes()
    driver.run(order)
    driver.step({1: 1})
    expected = Driver(model, page_size=4)
    alone = expected.admit(1, [5, 6, 7, 8])
    expected.generate(2)
    assert first.emitted == alone.emitted
    assert len(other.emitted) == 2


def test_the_worker_is_busy_from_when_it_begins_to_launch_until_nothing_is_under_way(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(model, page_size=4)
    driver.admit(1, [5, 6, 7])
    worker, seen = driver.worker, []
    compute, resolve = worker._compute, Launched.resolve
    monkeypatch.setattr(worker, "_compute", lambda *args: (seen.append(worker.busy), compute(*args)))
    monkeypatch.setattr(Launched, "resolve", lambda launched: (seen.append(worker.busy), resolve(launched)))
    assert not worker.busy
    first = driver.order({1: 3})
    worker.launch(first)
    assert seen == [True] and worker.busy
    driver.take(first)  # waits for the device
    assert seen == [True, True] and not worker.busy
