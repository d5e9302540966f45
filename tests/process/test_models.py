"""Models beyond Llama and Qwen2 through a prefill and a decode instance, with windows shorter than the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cluster_kit import Deployment, ask, check_logprobs, deploy, prompt

pytestmark = pytest.mark.process

PAGE, CHUNK, WINDOW = 16, 64, 40
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"hub_id": "some-org/Tiny-Mistral", "sliding_window": WINDOW},
    "qwen3": {
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
        },
    },
}


@pytest.fixture(scope="module", params=["mistral", pytest.param("qwen3", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = ("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "8192")
    folder = tmp_path_factory.mktemp(request.param)
    with deploy(folder, request.param, "--local-prefill", "never", *settings, **MODELS[request.param]) as found:
        yield found


def test_tokens_and_logprobs_equal_transformers_within_and_beyond_the_window(pair: Deployment) -> None:
    prompts = [prompt(length, length) for length in (7, WINDOW - 4, WINDOW, WINDOW + 1, CHUNK + 1, 199, 420)]
    bodies = [ask(x, 12, return_logprob=True, logprob_start_len=0, top_logprobs_num=2) for x in prompts]
    with pair.moved() as moved:
        answers = pair.generate(bodies)
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 12)
    assert moved["p_computed"] == sum(map(len, prompts)) and moved["d_computed"] == 0


def test_a_cached_prefix_longer_than_the_window_changes_nothing(pair: Deployment) -> None:
    shared = prompt(6 * PAGE, 1000)
    pair.generate([ask(shared, 2)])
    asked = [shared + prompt(length, length) for length in (3, CHUNK + 10)]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 8, return_logprob=True, top_logprobs_num=2) for x in asked])
    for one, answer in zip(asked, answers, strict=True):
        check_logprobs(pair.oracle, one, answer, 8)
    assert moved["p_cached"] == moved["d_cached"] == 2 * len(shared)


def test_a_model_from_the_hub_is_served_under_its_id(pair: Deployment) -> None:
    (model,) = httpx.get(f"{pair.url}/v1/models", timeout=30).json()["data"]
    named = pair.running.process.args[4]  # python -m pd up MODEL
    assert model["id"] == named
    body = {"model": named, "prompt": prompt(50), "max_tokens": 3}
    assert httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).json()["model"] == named
