"""A whole cluster whose KV blocks travel through NIXL, held against transformers in float32."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest
from cluster_kit import Deployment, ask, block_bytes, check_logprobs, deploy, prompt
from fault_kit import find

if not (find_spec("pd_transfer_nixl") and find_spec("nixl_cu12")):
    pytest.skip("needs pip install -e 'plugins/transfer_nixl[cpu]'", allow_module_level=True)

pytestmark = pytest.mark.process

PAGE, CHUNK = 16, 64
BLOCK_BYTES = block_bytes(PAGE)
SETTINGS = ("--transfer", "nixl", "--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Qwen2 with little memory."""
    more = ("--local-prefill", "never", "--max-total-tokens", "1024")
    with deploy(tmp_path_factory.mktemp("qwen2"), "qwen2", *SETTINGS, *more) as found:
        yield found


@pytest.fixture
def rested(pair: Deployment) -> Iterator[None]:
    """Whatever the test asked for is given back."""
    yield
    print(pair.running.stderr[-4000:])  # pytest shows it when something fails
    pair.assert_at_rest()


@pytest.mark.usefixtures("rested")
def test_tokens_and_logprobs_equal_transformers_for_a_batch_of_all_lengths(pair: Deployment) -> None:
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, CHUNK, CHUNK + 1, 150, 199]
    prompts = [prompt(n, 100 + n) for n in lengths]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 9, return_logprob=True, logprob_start_len=0) for x in prompts])
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 9)
    assert moved["pushed"] == moved["landed"] == sum(-(-n // PAGE) for n in lengths) * BLOCK_BYTES
    assert moved["d_computed"] == 0


@pytest.mark.usefixtures("rested")
def test_a_prefix_that_is_cached_on_both_sides_is_exact_and_does_not_travel_again(pair: Deployment) -> None:
    shared = prompt(5 * PAGE, 3)
    pair.generate([ask(shared, 2)])
    asked = shared + prompt(CHUNK + 3, 4)
    with pair.moved() as moved:
        (answer,) = pair.generate([ask(asked, 6, return_logprob=True)])
    check_logprobs(pair.oracle, asked, answer, 6)
    assert moved["pushed"] == moved["landed"] == (-(-len(asked) // PAGE) - 5) * BLOCK_BYTES


@pytest.mark.usefixtures("rested")
def test_requests_that_were_taken_out_go_on_exactly(pair: Deployment) -> None:
    prompts = [prompt(60, 500 + n) for n in range(8)]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 100, return_logprob=True) for x in prompts])
    assert moved["retractions"] > 0 and moved["d_computed"] == 0
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 100)


@pytest.mark.slow
def test_a_frozen_decode_instance_does_not_slow_down_another(tmp_path: Path) -> None:
    """UCX would wait for it for ever: what one prefill instance owes it must not be in the way of the others'."""
    with deploy(tmp_path, "llama", *SETTINGS, "--decode", "2", "--local-prefill", "never") as found:
        first, second = (url for url in found.instances if url != found.prefill)

        def seconds(url: str, seed: int) -> float:
            asked = [prompt(150, seed + n) for n in range(8)]
            start = time.monotonic()
            answers = found.generate([ask(x, 8, return_logprob=True) for x in asked], url, **headers)
            took = time.monotonic() - start
            for one, answer in zip(asked, answers, strict=True):
                check_logprobs(found.oracle, one, answer, 8)
            return took

        prefill = httpx.get(f"{found.prefill}/server_info", timeout=30).json()
        headers = {"x-pd-prefill": prefill["control_endpoint"]}
        seconds(first, 10), seconds(second, 20)  # both are connected
        usual = seconds(second, 30)
        top = find(psutil.Process(found.running.process.pid), "decode-0")
        victims = [top, *top.children(recursive=True)]
        lost: list[object] = []

        def doomed() -> None:
            try:
                lost.append(found.generate([ask(prompt(400, 40), 8)], first, **headers))
            except Exception as error:  # whatever becomes of it
                lost.append(error)

        asking = threading.Thread(target=doomed)
        asking.start()
        time.sleep(0.02)
        try:
            for one in victims:
                one.suspend()
            times = [seconds(second, 50 + 10 * n) for n in range(5)]
        finally:
            for one in victims:
                one.resume()
        asking.join(120)
        assert not asking.is_alive() and lost
        assert min(times) < 2 * usual + 0.5 and max(times) < 2 * usual + 5, (usual, times)
        found.assert_at_rest(20.0)
