"""Whole clusters over real processes and sockets, held against transformers in float32 and against `unified`."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from up_kit import Running, running

from tests.oracle import Oracle, tiny_model
from tests.replay import audit, metrics

pytestmark = pytest.mark.process

PAGE, CHUNK = 16, 64
#: 3 layers, 2 kv heads of 16, float32, keys and values.
BLOCK_BYTES = 3 * 2 * 16 * 4 * 2 * PAGE
CACHED, COMPUTED, LANDED = (f'pd_prompt_tokens_total{{source="{s}"}}' for s in ("cached", "computed", "landed"))


@dataclass
class Deployment:
    """A running cluster: where to ask, what answers, and what it should answer."""

    running: Running
    oracle: Oracle
    prefill: str = ""
    decode: str = ""

    @property
    def url(self) -> str:
        return self.running.url

    def generate(self, prompts: list[list[int]], count: int, **sampling: Any) -> list[dict[str, Any]]:
        """All prompts at once through /generate, ids in and ids out."""
        extra = {
            k: sampling.pop(k) for k in ("return_logprob", "logprob_start_len", "top_logprobs_num") if k in sampling
        }

        async def one(client: httpx.AsyncClient, prompt: list[int], index: int) -> dict[str, Any]:
            params = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True, **sampling}
            if "seeds" in params:
                params["seed"] = params.pop("seeds")[index]
            body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, **extra}
            response = await client.post(f"{self.url}/generate", json=body)
            assert response.status_code == 200, response.text
            return response.json()  # type: ignore[no-any-return]

        async def everyone() -> list[dict[str, Any]]:
            limits = httpx.Limits(max_connections=64)
            async with httpx.AsyncClient(timeout=60, limits=limits) as client:
                return list(await asyncio.gather(*(one(client, p, i) for i, p in enumerate(prompts))))

        return asyncio.run(everyone())

    def flush(self, url: str) -> None:
        httpx.post(f"{url}/flush_cache").raise_for_status()

    def figures(self) -> dict[str, float]:
        """What moved through the pair so far."""
        p, d = metrics(self.prefill), metrics(self.decode)
        return {
            "pushed": p["pd_kv_pushed_bytes_total"],
            "landed": d["pd_kv_landed_bytes_total"],
            "p_cached": p[CACHED],
            "p_computed": p[COMPUTED],
            "d_cached": d[CACHED],
            "d_computed": d[COMPUTED],
            "retractions": d["pd_retractions_total"],
        }


def deploy(folder: Path, arch: str, *arguments: str) -> Iterator[Deployment]:
    model = tiny_model(folder / "models", arch, tokenizer=True)
    command = [sys.executable, "-m", "pd", "up", model, "--port", "0", "--page-size", str(PAGE), *arguments]
    with running(command, folder / "logs", PYTHONPATH=str(Path(__file__).parents[2])) as cluster:
        found = Deployment(cluster, Oracle(model))
        for worker in httpx.get(f"{cluster.url}/server_info").json()["workers"]:
            setattr(found, worker["pool"], worker["url"])
        yield found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Llama over shared memory."""
    folder = tmp_path_factory.mktemp("llama")
    settings = ("--local-prefill", "never", "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "16384")
    yield from deploy(folder, "llama", *settings, "--transfer-memory", "shm")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Qwen2 over TCP, with little memory."""
    folder = tmp_path_factory.mktemp("qwen2")
    settings = ("--local-prefill", "never", "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "1024")
    yield from deploy(folder, "qwen2", *settings, "--transfer-memory", "tcp")


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    yield from deploy(tmp_path_factory.mktemp("unified"), "llama", "--unified", "1", "--max-total-tokens", "16384")


@pytest.fixture(params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    yield request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def books_balance(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, on every instance that it used."""
    yield
    for name in ("llama", "qwen2"):
        if (
            name in request.fixturenames
            or getattr(getattr(request.node, "callspec", None), "params", {}).get("pair") == name
        ):
            deployment = request.getfixturevalue(name)
            for url in (deployment.prefill, deployment.decode):
                books = audit(url)
                assert books["balanced"], books
                assert not books["owned"] + books["incoming"] + books["quarantined"], books


def prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(2, 256) for _ in range(length)]


def check(deployment: Deployment, asked: list[int], answer: dict[str, Any], count: int) -> None:
    """Tokens and every logprob equal transformers'."""
    want = deployment.oracle.generate_logprobs(asked, count)
    bound = 1e-5 if len(asked) < 200 else 1e-4
    meta = answer["meta_info"]
    output = meta["output_token_logprobs"]
    assert [token for _, token, _ in output] == want.tokens
    everything = asked + want.tokens
    given = [*enumerate(meta.get("input_token_logprobs", [])), *((len(asked) + i, x) for i, x in enumerate(output))]
    for position, (logprob, token, _) in given:
        assert token == everything[position]
        if position:
            exact = float(want.logprobs[position - 1, token])
            assert abs(logprob - exact) < bound, f"position {position}: {logprob} instead of {exact}"


def test_tokens_and_logprobs_equal_transformers_for_a_batch_of_all_lengths(pair: Deployment) -> None:
    before = pair.figures()
    lengths = [1, 2, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 150, 199, 420]
    prompts = [prompt(n, 100 + n) for n in lengths]
    answers = pair.generate(prompts, 9, logprob_start_len=0, top_logprobs_num=2)
    for asked, answer in zip(prompts, answers, strict=True):
        check(pair, asked, answer, 9)
        assert len(answer["meta_info"]["input_token_logprobs"]) == len(asked)
    after = pair.figures()
    blocks = sum(-(-n // PAGE) for n in lengths)
    assert after["pushed"] - before["pushed"] == after["landed"] - before["landed"] == blocks * BLOCK_BYTES
    assert after["d_computed"] == 0, "nothing is ever prefilled on the decode instance"


@pytest.mark.parametrize("hit", ["prefill", "decode", "both", "none"])
def test_a_shared_prefix_is_exact_wherever_it_is_cached(pair: Deployment, hit: str) -> None:
    shared = prompt(5 * PAGE, {"prefill": 1, "decode": 2, "both": 3, "none": 4}[hit])
    pair.generate([shared], 2)
    if hit in ("prefill", "none"):
        pair.flush(pair.decode)
    if hit in ("decode", "none"):
        pair.flush(pair.prefill)
    before = pair.figures()
    asked = shared + prompt(20, 77)
    (answer,) = pair.generate([asked], 6)
    check(pair, asked, answer, 6)
    moved = {name: value - before[name] for name, value in pair.figures().items()}
    blocks = -(-len(asked) // PAGE)
    on_p, on_d = hit in ("prefill", "both"), hit in ("decode", "both")
    assert moved["p_cached"] == (5 * PAGE if on_p else 0)
    assert moved["d_cached"] == (5 * PAGE if on_d else 0)
    assert moved["pushed"] == (blocks - 5 * on_d) * BLOCK_BYTES
    assert answer["meta_info"]["cached_tokens"] == (5 * PAGE if on_p else 0)


def test_retraction_changes_no_token(qwen2: Deployment) -> None:
    before = qwen2.figures()["retractions"]
    prompts = [prompt(60, 500 + n) for n in range(8)]
    answers = qwen2.generate(prompts, 100)
    assert qwen2.figures()["retractions"] > before, "the pool must be too small for all of them"
    for asked, answer in zip(prompts, answers, strict=True):
        check(qwen2, asked, answer, 100)


def test_sampling_with_a_seed_is_the_same_alone_in_a_batch_and_on_one_instance(
    llama: Deployment, unified: Deployment
) -> None:
    prompts, seeds = [prompt(10 + n, 900 + n) for n in range(32)], list(range(32))
    how: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 50}

    def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
        return [[token for _, token, _ in a["meta_info"]["output_token_logprobs"]] for a in answers]

    batch = tokens(llama.generate(prompts, 12, seeds=seeds, **how))
    assert batch == tokens(unified.generate(prompts, 12, seeds=seeds, **how))
    for n in (0, 7, 31):
        assert tokens(llama.generate([prompts[n]], 12, seeds=[seeds[n]], **how)) == [batch[n]]
    assert len({tuple(t) for t in batch}) > 16, "sampled, not greedy"


def test_disaggregated_logprobs_equal_unified(llama: Deployment, unified: Deployment) -> None:
    prompts = [prompt(n, 40 + n) for n in (5, 70, 300)]
    for one, other in zip(llama.generate(prompts, 8), unified.generate(prompts, 8), strict=True):
        ours, theirs = (x["meta_info"]["output_token_logprobs"] for x in (one, other))
        assert [t for _, t, _ in ours] == [t for _, t, _ in theirs]
        assert max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_the_token_after_a_stop_token_is_never_emitted(llama: Deployment) -> None:
    asked, want, stop = next(
        (asked, want, want[4])
        for asked in (prompt(33, seed) for seed in range(100))
        if (want := llama.oracle.generate_logprobs(asked, 6).tokens)[4] not in want[:4]
    )
    (answer,) = llama.generate([asked], 12, stop_token_ids=[stop])
    got = [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]]
    assert got == want[: want.index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def stream(url: str, body: dict[str, Any]) -> tuple[list[str], str | None]:
    """The deltas of a streamed completion, and its finish reason."""
    deltas, finish = [], None
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    deltas.append(choice["text"])
                    finish = choice["finish_reason"] or finish
    return deltas, finish


def test_a_stop_string_across_tokens_never_leaks_from_the_stream(llama: Deployment) -> None:
    asked = prompt(21, 4)
    body = {"prompt": asked, "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    whole = "".join(stream(llama.url, body)[0])
    at = len(whole) // 2
    stop = whole[at : at + 3]
    deltas, finish = stream(llama.url, {**body, "stop": [stop]})
    assert finish == "stop"
    assert "".join(deltas) == whole[: whole.index(stop)]


def test_streamed_and_whole_answers_are_the_same(pair: Deployment) -> None:
    body = {"prompt": prompt(90, 14), "max_tokens": 25, "temperature": 0, "ignore_eos": True}
    whole = httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).json()
    assert "".join(stream(pair.url, body)[0]) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 25


def test_a_client_that_leaves_cancels_everywhere(llama: Deployment) -> None:
    body = {"prompt": prompt(60, 3), "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{llama.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    end = time.monotonic() + 5
    while metrics(llama.decode)['pd_requests{state="running"}'] and time.monotonic() < end:
        time.sleep(0.05)
    assert metrics(llama.decode)['pd_requests{state="running"}'] == 0


def test_a_request_that_names_no_prefill_is_503_under_never(llama: Deployment) -> None:
    body = {"prompt": prompt(30, 8), "max_tokens": 4}
    response = httpx.post(f"{llama.decode}/v1/completions", json=body, timeout=30)
    assert response.status_code == 503
    assert "prefill" in response.json()["error"]["message"]
