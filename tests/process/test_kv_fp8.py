"""A prefill and a decode instance with KV blocks of one byte an element: the same answers as one instance gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cluster_kit import Deployment, all_at_rest, ask, block_bytes, deploy, prompt

from tests.oracle import Oracle

pytestmark = pytest.mark.process

PAGE, CHUNK = 16, 64
FP8 = ("--kv-cache-dtype", "fp8", "--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
MEMORY = ("--max-total-tokens", "4096")
#: Most by which logprobs may part where steps are divided in another way: a key is then rounded to its other neighbour.
TOLERANCE = 5e-3
LENGTHS = (1, PAGE - 1, PAGE, CHUNK, CHUNK + 1, 150)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deploy(tmp_path_factory.mktemp("pair"), "qwen2", *FP8, *MEMORY) as found:
        yield found


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deploy(tmp_path_factory.mktemp("unified"), "qwen2", "--unified", "1", *FP8, *MEMORY) as found:
        yield found


@pytest.fixture(autouse=True)
def _rested(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    all_at_rest(request)


def answers(deployment: Deployment, url: str = "", *, cached: bool = False) -> list[tuple[list[int], list[Any]]]:
    """Tokens and logprobs for prompts of LENGTHS, asked one after the other; `cached`: behind a common prefix."""
    found = []
    for length in LENGTHS:
        asked = prompt(length, 40 + length)
        if cached:
            asked = [*prompt(5 * PAGE, 3), *asked]
        body = ask(asked, 9, return_logprob=True, logprob_start_len=-1 if cached else 0, top_logprobs_num=2)
        (answer,) = deployment.generate([body], url)
        meta = answer["meta_info"]
        logprobs = [meta["output_token_logprobs"], meta["output_top_logprobs"], meta.get("input_token_logprobs")]
        found.append((answer["output_ids"], logprobs))
    return found


def test_disaggregated_answers_are_those_of_one_instance_bit_for_bit(pair: Deployment, unified: Deployment) -> None:
    with pair.moved() as moved:
        found = answers(pair)
    assert found == answers(unified)
    # The tiny models are of float32: a quarter of what the blocks would have.
    assert moved["pushed"] == moved["landed"] == sum(-(-n // PAGE) for n in LENGTHS) * block_bytes(PAGE) // 4
    assert moved["d_computed"] == 0


def test_they_are_what_transformers_computes_from_rounded_keys_and_values(pair: Deployment) -> None:
    oracle = Oracle(str(pair.running.process.args[4]), fp8_scales=((1.0, 1.0),) * 3)
    for length, (tokens, (outputs, _, _)) in zip(LENGTHS, answers(pair), strict=True):
        asked = prompt(length, 40 + length)
        rows = oracle.logprobs([*asked, *tokens])[length - 1 : -1]
        assert tokens == rows.argmax(-1).tolist()
        expected = [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
        assert [logprob for logprob, _, _ in outputs] == pytest.approx(expected, abs=TOLERANCE)


def test_behind_a_cached_prefix_and_where_decode_computes_the_prompt_itself_answers_agree(
    pair: Deployment, unified: Deployment
) -> None:
    """The second time the prefix is known on both sides; the third time nobody names a prefill instance."""
    expected = answers(unified, cached=True)
    for url in ("", "", pair.decode):
        if url:
            pair.flush(pair.decode)
        for (tokens, logprobs), (wanted, others) in zip(answers(pair, url, cached=True), expected, strict=True):
            assert tokens == wanted
            for one, other in zip(logprobs[0], others[0], strict=True):
                assert one[0] == pytest.approx(other[0], abs=TOLERANCE)
    with pair.moved() as moved:
        answers(pair, pair.decode)
    assert moved["d_computed"] == sum(LENGTHS) and not moved["landed"]


def test_an_instance_says_what_its_blocks_hold(pair: Deployment) -> None:
    for url in (pair.prefill, pair.decode):
        assert httpx.get(f"{url}/server_info", timeout=30).json()["kv_cache_dtype"] == "fp8_e4m3"
