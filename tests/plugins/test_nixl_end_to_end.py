"""A whole cluster whose KV blocks travel through NIXL, held against transformers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from cluster_kit import Deployment, ask, block_bytes, check_logprobs, deploy, prompt

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


@pytest.fixture(autouse=True)
def _everything_is_given_back(pair: Deployment) -> Iterator[None]:
    yield
    print(pair.running.stderr[-4000:])  # pytest shows it when something fails
    pair.assert_at_rest()


def test_tokens_and_logprobs_equal_transformers_for_a_batch_of_all_lengths(pair: Deployment) -> None:
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, CHUNK, CHUNK + 1, 150, 199]
    prompts = [prompt(n, 100 + n) for n in lengths]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 9, return_logprob=True, logprob_start_len=0) for x in prompts])
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 9)
    assert moved["pushed"] == moved["landed"] == sum(-(-n // PAGE) for n in lengths) * BLOCK_BYTES
    assert moved["d_computed"] == 0


def test_a_prefix_that_is_cached_on_both_sides_is_exact_and_does_not_travel_again(pair: Deployment) -> None:
    shared = prompt(5 * PAGE, 3)
    pair.generate([ask(shared, 2)])
    asked = shared + prompt(CHUNK + 3, 4)
    with pair.moved() as moved:
        (answer,) = pair.generate([ask(asked, 6, return_logprob=True)])
    check_logprobs(pair.oracle, asked, answer, 6)
    assert moved["pushed"] == moved["landed"] == (-(-len(asked) // PAGE) - 5) * BLOCK_BYTES


def test_requests_that_were_taken_out_go_on_exactly(pair: Deployment) -> None:
    prompts = [prompt(60, 500 + n) for n in range(8)]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 100, return_logprob=True) for x in prompts])
    assert moved["retractions"] > 0 and moved["d_computed"] == 0
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 100)
