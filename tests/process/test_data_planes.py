"""Whole clusters whose KV blocks travel through a third party's engine, held against transformers in float32.

In short here; `test_end_to_end` runs all of it over each of them, in `make test-all`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_kit import Deployment, all_at_rest, ask, block_bytes, check_logprobs, deploy, prompt
from fault_kit import fault_cluster, send
from plane_kit import PLANES, settings

pytestmark = pytest.mark.process

PAGE, CHUNK = 16, 64
BLOCK_BYTES = block_bytes(PAGE)
SHORT = [name if name != "nixl-tcp" else pytest.param(name, marks=pytest.mark.slow) for name in PLANES]


@pytest.fixture(scope="module", params=SHORT)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Qwen2 with little memory."""
    folder = tmp_path_factory.mktemp(request.param)
    plane, environment = settings(request.param, folder)
    more = ("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "1024")
    with deploy(folder, "qwen2", *plane, *more, "--local-prefill", "never", environment=environment) as found:
        yield found


@pytest.fixture(autouse=True)
def _rested(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    all_at_rest(request)


def test_tokens_and_logprobs_equal_transformers_for_a_batch_of_all_lengths(pair: Deployment) -> None:
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, CHUNK, CHUNK + 1, 150, 420]
    prompts = [prompt(n, 100 + n) for n in lengths]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 9, return_logprob=True, logprob_start_len=0) for x in prompts])
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 9)
    assert moved["pushed"] == moved["landed"] == sum(-(-n // PAGE) for n in lengths) * BLOCK_BYTES
    assert moved["d_computed"] == 0


def test_a_prefix_that_is_cached_on_one_side_or_both_is_exact_and_does_not_travel_again(pair: Deployment) -> None:
    shared = prompt(5 * PAGE, 3)
    pair.generate([ask(shared, 2)])
    for seed, forgetful in enumerate(("", pair.prefill, pair.decode)):
        if forgetful:
            pair.flush(forgetful)
        asked = [*shared, *prompt(CHUNK + 3, 4 + seed)]
        with pair.moved() as moved:
            (answer,) = pair.generate([ask(asked, 6, return_logprob=True)])
        check_logprobs(pair.oracle, asked, answer, 6)
        known = 0 if forgetful == pair.decode else 5
        assert moved["pushed"] == moved["landed"] == (-(-len(asked) // PAGE) - known) * BLOCK_BYTES


def test_requests_that_were_taken_out_go_on_exactly(pair: Deployment) -> None:
    prompts = [prompt(60, 500 + n) for n in range(8)]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 100, return_logprob=True) for x in prompts])
    assert moved["retractions"] > 0 and moved["d_computed"] == 0
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 100)


@pytest.mark.slow
@pytest.mark.parametrize("plane", ["direct", *PLANES])
def test_a_frozen_decode_instance_does_not_slow_down_another_one_nor_keep_blocks(plane: str, tmp_path: Path) -> None:
    """The prefill instance of both is about to push to one of them when that freezes."""
    point = "prefill-0.runner.push"
    arguments, environment = settings(plane, tmp_path) if plane in PLANES else ((), {})
    with fault_cluster(tmp_path, *arguments, environment=environment) as cluster:
        cluster.wait_until_healthy()

        def served(seed: int) -> tuple[float, list[str]]:
            began = time.monotonic()
            asks = [cluster.ask(prompt(300, seed + i), stream=False, decode=1).start().wait() for i in range(12)]
            assert {(one.outcome, one.used) for one in asks} == {("tokens", "prefill-0")}, asks
            return time.monotonic() - began, [one.text for one in asks]

        _, texts = served(1000)
        before, _ = served(2000)
        frozen = cluster.victim("decode-0")
        cluster.faults.arm(point)
        held = cluster.ask(prompt(600, 3000), stream=True).start()
        cluster.faults.wait((point,))
        send(frozen, signal.SIGSTOP)
        try:
            cluster.faults.release(point)
            beside, _ = served(4000)
            time.sleep(2.0)  # the heartbeats of the frozen one are missed; what it was owed may have landed or not
            _, again = served(1000)
        finally:
            send(frozen, signal.SIGCONT)
        held.wait()
        cluster.wait_until_healthy()
        after, _ = served(5000)
        assert again == texts
        assert beside < 1.5 * max(before, after) + 0.5, (before, beside, after)
