"""Penalties, biases, `min_tokens`, grammars, choices and other tokens' logprobs on a GPU, as the CPU's worker has them.

float32 on both, TF32 off: the same tokens, greedy and drawn, and logprobs within TOLERANCE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from pd.api import grammar
from pd.kernels.launch import watch_compilation
from pd.messages import StepOrder
from pd.runner.device import WARM_ROWS
from pd.runner.device_sampler import DeviceSampler
from pd.runner.device_worker import DeviceWorker
from pd.runner.grammar import Grammars
from pd.runner.graphs import graph_sizes
from pd.runner.warm_up import warm_sampler
from pd.types import SamplingParams
from tests.oracle import tiny_model
from tests.shaping_kit import ALL, FEATURES, GREEDY, NARROW, WARM, Answer, Server, said_alike, traffic
from tests.worker_driver import KIND, Driver, f32

pytestmark = pytest.mark.usefixtures("without_tf32")

DEVICE = "cuda:0"
PAGE, VOCAB, EOS = 16, 4096, 1
TOLERANCE = 1e-4

#: Largest captured batch: the traffic has larger ones too.
LARGEST = 8

#: The tokens below 256 are the bytes.
SHAPE: dict[str, Any] = {
    "arch": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "spread": 0.0375,
    "tokenizer": True,
}


#: Kernels behind a graph.
SAMPLING = {
    *("pick_pass", "best_pass", "survey_pass", "cut_pass"),
    *("penalty_pass", "count_pass", "bias_pass", "mask_pass"),
    *("gather_sampling_kernel", "store_last_kernel"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(Path(tmp_path_factory.mktemp("models")), **SHAPE)


def gpu_driver(path: str, **options: Any) -> Driver:
    return Driver(path, page_size=PAGE, num_blocks=1200, device=DEVICE, dtype="float32", **options)


def cpu_driver(path: str, **options: Any) -> Driver:
    token = KIND.set("host")
    driver = Driver(path, page_size=PAGE, num_blocks=1200, dtype="float32", **options)
    KIND.reset(token)
    return driver


@pytest.fixture(scope="module")
def by_cpu(llama: str) -> list[Answer]:
    return Server(cpu_driver(llama), traffic(), False).run()


@pytest.mark.parametrize("graphs", [0, LARGEST])
@pytest.mark.parametrize("ahead", [False, True], ids=["at once", "one step ahead"])
def test_all_kinds_of_requests_together_get_what_the_cpus_worker_gives(
    llama: str, by_cpu: list[Answer], ahead: bool, graphs: int
) -> None:
    asks = traffic()
    server = Server(gpu_driver(llama, graphs=graphs), asks, ahead)
    found = server.run()
    for number, (ask, one, other) in enumerate(zip(asks, found, by_cpu, strict=True)):
        assert len(one.tokens) == ask.count
        assert one.tokens == other.tokens, f"request {number}: {ask}"
        said_alike(one.said, other.said, TOLERANCE)
    assert server.sizes - set(graph_sizes(LARGEST)), "no batch had to be filled up"
    assert max(server.sizes) > 16, "batches that no graph has, and that take larger tiles"


def test_choices_are_those_of_the_cpus_worker(llama: str) -> None:
    prompt = np.random.default_rng(1).integers(0, VOCAB, 50).tolist()
    drivers = gpu_driver(llama, graphs=LARGEST), cpu_driver(llama)
    for driver in drivers:
        driver.admit(1, prompt, SamplingParams(**WARM, seed=4))
        driver.admit(2, prompt, SamplingParams(**NARROW, **ALL, seed=9), choices=150)
        driver.generate(4, chunk=30)
    one, other = (driver.tracks[2] for driver in drivers)
    assert one.choices == other.choices
    said_alike(one.said, other.said, TOLERANCE)
    assert drivers[0].tracks[1].emitted == drivers[1].tracks[1].emitted


def test_a_sampled_token_has_the_very_logprob_that_it_has_among_the_alternatives(llama: str) -> None:
    driver = gpu_driver(llama, graphs=LARGEST)
    driver.admit(1, [5, 6, 7], SamplingParams(**WARM, seed=3, logprobs=True))
    track = driver.admit(2, [5, 6, 7], SamplingParams(**WARM, seed=3, logprobs=True, top_logprobs=VOCAB))
    driver.generate(5)
    for token, said in zip(track.emitted, track.said, strict=True):
        assert said.tops is not None
        ids = np.frombuffer(said.tops.ids_i32, np.int32).tolist()
        assert f32(said.chosen_f32)[0] == f32(said.tops.logprobs_f32)[ids.index(token)]
    assert driver.tracks[1].logprobs == pytest.approx(track.logprobs, abs=TOLERANCE)


def test_grammars_hold_one_step_ahead_with_everything_else(llama: str) -> None:
    regex = grammar.from_regex(r"[a-c]{2,9}(-[0-9]{1,3})*", "regex")
    grammars = Grammars(llama, VOCAB, [EOS])
    stops = {"grammar": regex, "stop_token_ids": (EOS,)}
    samplings = [
        SamplingParams(**WARM, **stops, seed=1),
        SamplingParams(**NARROW, **stops, seed=2, logprobs=True, top_logprobs=2),
        SamplingParams(**GREEDY, **stops, repetition_penalty=1.5, logit_bias={ord("c"): 3.0}),
        SamplingParams(**WARM, **stops, seed=5, min_tokens=7, logit_bias={EOS: 100.0}),
        SamplingParams(**WARM, seed=3, logprobs=True),
        SamplingParams(**NARROW, **ALL, seed=4),
    ]
    drivers = gpu_driver(llama, graphs=LARGEST, grammars=grammars), cpu_driver(llama, grammars=grammars)
    for driver in drivers:
        for key, sampling in enumerate(samplings):
            driver.admit(key, [*b"What is it? "], sampling)
        orders: list[StepOrder] = []
        for _ in range(16):
            orders.append(driver.order({key: len(t.tokens) - t.computed for key, t in driver.tracks.items()}))
            driver.worker.launch(orders[-1])
            if len(orders) > 1:
                assert not driver.take(orders.pop(0)).failed
        driver.take(orders.pop())
    for key in range(len(samplings)):
        one, other = (driver.tracks[key] for driver in drivers)
        assert one.emitted == other.emitted
        said_alike(one.said, other.said, TOLERANCE)
    grammars.close()


# --- what costs what ------------------------------------------------------------------------------------------------


def samplings() -> list[SamplingParams]:
    ways = [{**way, **features} for features in (*FEATURES.values(), ALL) for way in (GREEDY, WARM, NARROW)]
    return [SamplingParams(**way, seed=seed) for seed, way in enumerate(ways)]


def launch_steps(driver: Driver, steps: int) -> list[StepOrder]:
    orders = []
    for _ in range(steps):
        counts = {key: len(track.tokens) - track.computed for key, track in driver.tracks.items()}
        orders.append(driver.order(dict(sorted(counts.items(), key=lambda item: item[1] > 1))))
        driver.worker.launch(orders[-1])
    return orders


def test_no_step_waits_for_the_device(llama: str) -> None:
    """Nor one in which requests are admitted, with tokens to count, or choose several times."""
    driver = gpu_driver(llama, graphs=LARGEST)
    for key, sampling in enumerate(samplings()):
        driver.admit(key, [5, 6, 7, 5], sampling, prompt_len=2)
    orders = launch_steps(driver, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        orders += launch_steps(driver, 4)
        for key, sampling in enumerate(samplings()[-3:], 100):
            driver.admit(key, [5, 6, 7, 5], sampling, prompt_len=2, choices=3)
        orders += launch_steps(driver, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for order in orders:
        driver.take(order)
    assert all(len(track.emitted) == (12 if key < 100 else 4) for key, track in driver.tracks.items())


def test_a_plain_batch_is_sampled_by_its_graph_alone(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when requests that asked for more have gone, or may end by now."""
    seen: list[int] = []
    sample = DeviceSampler.sample

    def noted(self: DeviceSampler, requests: Any, *rest: Any) -> Any:
        seen.append(len(requests))
        return sample(self, requests, *rest)

    monkeypatch.setattr(DeviceSampler, "sample", noted)
    driver = gpu_driver(llama, graphs=LARGEST)
    driver.admit(1, [5, 6, 7], SamplingParams(**GREEDY))
    driver.admit(2, [5, 6, 7], SamplingParams(**WARM, seed=1))
    driver.generate(3)
    assert not seen
    driver.admit(3, [5, 6, 7], SamplingParams(**WARM, presence_penalty=1.0, seed=2))
    driver.generate(5)
    assert seen == [3, 3, 1, 1, 1]
    driver.release(3)
    del driver.tracks[3]
    driver.admit(4, [5, 6, 7], SamplingParams(**WARM, min_tokens=2, stop_token_ids=(8,), seed=3))
    driver.generate(12)
    assert seen == [3, 3, 1, 1, 1, 3, 3]


def test_the_first_samples_compile_all_that_later_ones_need(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone in a process: what an earlier test has compiled is there."""
    compiled: list[str] = []
    driver = gpu_driver(llama, graphs=LARGEST)
    assert isinstance(driver.worker, DeviceWorker)
    with torch.inference_mode():
        for rows in WARM_ROWS:
            warm_sampler(driver.worker.sampler, torch.zeros(rows, VOCAB, device=DEVICE))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", None)
    watch_compilation(compiled.append)
    Server(driver, traffic(), True).run()
    assert not SAMPLING & set(compiled)
