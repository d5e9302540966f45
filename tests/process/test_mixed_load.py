"""Every kind of request at once on clusters with too little memory; each answer is what it is alone on one instance."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cluster_kit import PATIENCE, Deployment, ask, deploy, prompt, tokens_of

from tests.replay import metrics

pytestmark = [pytest.mark.process, pytest.mark.slow]

REQUESTS, AT_ONCE = 160, 24

#: Model, what moves its KV, and the settings of the cluster that is short of memory.
DEPLOYMENTS = {
    "llama-tcp": ("llama", "--transfer-memory", "tcp", "--page-size", "8", "--chunked-prefill-size", "40"),
    "qwen2-shm": ("qwen2", "--transfer-memory", "shm", "--page-size", "16", "--chunked-prefill-size", "100"),
}


@pytest.fixture(scope="module", params=DEPLOYMENTS)
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two prefill and two decode instances; what D lacks little of it computes itself."""
    arch, *settings = DEPLOYMENTS[request.param]
    settings += ["--prefill", "2", "--decode", "2", "--max-total-tokens", "1600", "--local-prefill", "short:24"]
    with deploy(tmp_path_factory.mktemp(request.param), arch, *settings) as found:
        yield found


@pytest.fixture(scope="module")
def alone(pairs: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The same model on one instance with all the memory that it wants."""
    arch = "qwen2" if "qwen2" in pairs.running.folder.parent.name else "llama"
    with deploy(tmp_path_factory.mktemp("alone"), arch, "--unified", "1", "--max-total-tokens", "32768") as found:
        yield found


def workload(seed: int) -> list[dict[str, Any]]:
    source = random.Random(seed)
    prefixes = [prompt(source.randrange(300), 50 + n) for n in range(8)]
    bodies = []
    for n in range(REQUESTS):
        asked = source.choice(prefixes) + prompt(source.randrange(1, 120), 1000 * seed + n)
        fields: dict[str, Any] = {"return_logprob": True, "seed": n}
        if source.random() < 0.3:
            fields["logprob_start_len"] = source.randrange(len(asked))
        if source.random() < 0.6:
            fields["temperature"] = source.choice([0.5, 1.0, 1.5])
            fields |= source.choice([{}, {"top_p": 0.8}, {"top_k": 30}, {"frequency_penalty": 1.0}, {"min_p": 0.1}])
        if source.random() < 0.5:
            fields |= {"ignore_eos": False, "logit_bias": {"1": 3.0}, "min_new_tokens": source.choice([0, 3])}
        bodies.append(ask(asked, source.choice([1, 2, 10, 50, 200]), **fields))
        bodies[-1]["sampling_params"]["min_new_tokens"] = min(
            bodies[-1]["sampling_params"].get("min_new_tokens", 0), bodies[-1]["sampling_params"]["max_new_tokens"]
        )
    return bodies


async def serve(url: str, bodies: list[dict[str, Any]], leave: set[int]) -> list[dict[str, Any]]:
    """Answers by request; those in `leave` go away after some events and have none."""
    room = asyncio.Semaphore(AT_ONCE)
    answers: list[dict[str, Any]] = [{} for _ in bodies]

    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = {**bodies[index], "stream": True}
        async with room, client.stream("POST", f"{url}/generate", json=body) as response:
            assert response.status_code == 200, await response.aread()
            events = 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    events += 1
                    answers[index] = json.loads(line.removeprefix("data: "))
                if index in leave and events > index % 7:
                    answers[index] = {}
                    return

    async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=AT_ONCE)) as client:
        await asyncio.gather(*(one(client, index) for index in range(len(bodies))))
    return answers


def values(answer: dict[str, Any], kind: str) -> list[float]:
    return [logprob or 0.0 for logprob, *_ in answer["meta_info"][kind]]


@pytest.mark.parametrize("seed", [1, 2])
def test_everything_at_once_gives_the_answers_that_each_gets_alone(
    pairs: Deployment, alone: Deployment, seed: int
) -> None:
    bodies = workload(seed)
    leave = set(random.Random(seed).sample(range(REQUESTS), REQUESTS // 8))
    answers = asyncio.run(serve(pairs.url, bodies, leave))
    pairs.assert_at_rest()
    for index, (body, answer) in enumerate(zip(bodies, answers, strict=True)):
        if index in leave:
            continue
        (want,) = alone.generate([body])
        assert tokens_of(answer) == tokens_of(want), (index, body)
        assert answer["text"] == want["text"]
        assert answer["meta_info"]["finish_reason"] == want["meta_info"]["finish_reason"]
        for kind in ("input_token_logprobs", "output_token_logprobs"):
            ours, theirs = values(answer, kind), values(want, kind)
            assert len(ours) == len(theirs), (index, kind)
            assert all(abs(a - b) < 1e-4 for a, b in zip(ours, theirs, strict=True)), (index, kind)
    decodes = [metrics(url) for url in pairs.instances]
    assert sum(one["pd_retractions_total"] for one in decodes) > 0, "there must be too little memory"
    assert sum(one['pd_prompt_tokens_total{source="landed"}'] for one in decodes) > 0
