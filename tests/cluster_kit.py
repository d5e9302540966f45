"""A cluster of real processes with a tiny model, what to ask of it, and what transformers says of its answers.

    with deploy(folder, "llama", "--transfer-memory", "shm") as pair:
        (answer,) = pair.generate([ask(prompt(70), 8, return_logprob=True)])
        check_logprobs(pair.oracle, prompt(70), answer)
        pair.assert_at_rest()

It must end as it is told: within the bound of `up_kit`, with exit code 0, and without a process left behind.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from up_kit import Running, running

from tests.hub_kit import cache_model
from tests.oracle import Oracle, tiny_model
from tests.replay import audit, metrics

ROOT = str(Path(__file__).parents[1])
CACHED, COMPUTED, LANDED = (f'pd_prompt_tokens_total{{source="{s}"}}' for s in ("cached", "computed", "landed"))
#: Most by which a logprob may be off: after fewer than 200 tokens, and after more.
NEAR, FAR = 1e-5, 1e-4
#: Seconds that one request, or a batch of them, may take on a busy machine.
PATIENCE = 90.0


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random bytes but for the tiny model's own 0 and 1."""
    source = random.Random(seed)
    return [source.randrange(2, 256) for _ in range(length)]


def block_bytes(page: int) -> int:
    """Of the tiny models: 3 layers, 2 kv heads of 16, float32, keys and values."""
    return 3 * 2 * 16 * 4 * 2 * page


def ask(input_ids: Sequence[int], count: int, **fields: Any) -> dict[str, Any]:
    """A body for /generate: greedy and past end tokens unless `fields` say otherwise.

    Fields of the request itself go to its top level, all others are sampling parameters.
    """
    names = ("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "stream", "rid")
    outer = {name: fields.pop(name) for name in names if name in fields}
    sampling = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True, **fields}
    return {"input_ids": list(input_ids), "sampling_params": sampling, **outer}


@dataclass
class Deployment:
    """A running cluster. `prefill` and `decode` are the URLs of the first instance of each; `unified` is a decode."""

    running: Running
    oracle: Oracle
    faults: Path
    instances: list[str] = field(default_factory=list)
    prefill: str = ""
    decode: str = ""

    @property
    def url(self) -> str:
        return self.running.url

    def generate(self, bodies: Sequence[dict[str, Any]], url: str = "", **headers: str) -> list[dict[str, Any]]:
        """The answers of /generate, all asked at once."""

        async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
            response = await client.post(f"{url or self.url}/generate", json=body, headers=headers)
            assert response.status_code == 200, response.text
            return response.json()  # type: ignore[no-any-return]

        async def everyone() -> list[dict[str, Any]]:
            limits = httpx.Limits(max_connections=64)
            async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as client:
                return list(await asyncio.gather(*(one(client, body) for body in bodies)))

        return asyncio.run(everyone())

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Every event of a streamed answer, in order; it must end with [DONE]."""
        events: list[dict[str, Any]] = []
        last = ""
        with httpx.stream("POST", f"{self.url}{path}", json={**body, "stream": True}, timeout=PATIENCE) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    last = line.removeprefix("data: ")
                    if last != "[DONE]":
                        events.append(json.loads(last))
        assert last == "[DONE]"
        return events

    def flush(self, url: str) -> None:
        httpx.post(f"{url}/flush_cache", timeout=PATIENCE).raise_for_status()

    def figures(self) -> dict[str, float]:
        """What moved through the pair so far."""
        p, d = metrics(self.prefill), metrics(self.decode)
        return {
            "pushed": p["pd_kv_pushed_bytes_total"],
            "landed": d["pd_kv_landed_bytes_total"],
            "p_cached": p[CACHED],
            "p_computed": p[COMPUTED],
            "p_steps": p["pd_steps_total"],
            "d_cached": d[CACHED],
            "d_computed": d[COMPUTED],
            "d_landed": d[LANDED],
            "d_late": d["pd_late_tokens_total"],
            "retractions": d["pd_retractions_total"],
        }

    @contextmanager
    def moved(self) -> Iterator[dict[str, float]]:
        """What moves through the pair in the block; filled at its end, once both sides are at rest."""
        before, found = self.figures(), dict[str, float]()
        yield found
        self.assert_at_rest()
        found |= {name: value - before[name] for name, value in self.figures().items()}

    def assert_at_rest(self, bound: float = 2.0) -> None:
        """Every instance's books balance, and no block belongs to a request any more."""
        for url in self.instances:
            books = audit(url, bound)
            assert books["balanced"], (url, books)
            assert not books["owned"] + books["incoming"] + books["quarantined"], (url, books)


@contextmanager
def deploy(
    folder: Path,
    arch: str,
    *arguments: str,
    hub_id: str = "",
    device: str = "cpu",
    environment: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Iterator[Deployment]:
    """`pd up` with a tiny model of `arch` until the block ends; with a `hub_id` from a cache of the hub, by that id."""
    model = tiny_model(folder / "models", arch, tokenizer=True, **overrides)
    faults = folder / "faults"
    faults.mkdir()
    named, variables = hub_id or model, {"PYTHONPATH": ROOT, "PD_FAULT": str(faults), **(environment or {})}
    if hub_id:
        cache_model(folder / "cache", hub_id, model)
        variables |= {"HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pd", "up", named, "--port", "0", "--log-format", "json"]
    with running([*command, "--device", device, *arguments], folder / "logs", **variables) as cluster:
        found = Deployment(cluster, Oracle(model), faults)
        for worker in httpx.get(f"{cluster.url}/server_info", timeout=PATIENCE).json()["workers"]:
            found.instances.append(worker["url"])
            if not getattr(found, worker["pool"]):
                setattr(found, worker["pool"], worker["url"])
        yield found
        family = psutil.Process(cluster.process.pid).children(recursive=True)
        code = cluster.stop()
        assert code == 0, f"exit code {code}: {cluster.stderr[-4000:]}"
        _, alive = psutil.wait_procs(family, timeout=2.0)
        assert not alive, alive


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return list(answer["output_ids"])


def all_at_rest(request: pytest.FixtureRequest) -> None:
    """Whatever a test asked of its deployments is given back. pytest shows what they said when something fails."""
    for deployment in request.node.funcargs.values():
        if isinstance(deployment, Deployment):
            print(deployment.running.stderr[-4000:])
            deployment.assert_at_rest()


def check_logprobs(oracle: Oracle, asked: Sequence[int], answer: dict[str, Any], count: int | None = None) -> None:
    """Greedy tokens (`count` of them) and every logprob that the answer carries equal transformers'."""
    meta = answer["meta_info"]
    output = meta["output_token_logprobs"]
    tokens = [token for _, token, _ in output]
    assert tokens == answer["output_ids"] and count in (None, len(tokens))
    # One pass: where every token is the best one after what precedes it, all are the oracle's own, by induction.
    everything = [*asked, *tokens]
    rows = oracle.logprobs(everything)
    assert tokens == rows[len(asked) - 1 : -1].argmax(-1).tolist()

    def bound(at: int) -> float:
        return NEAR if len(asked) < 200 and at < 200 else FAR

    for part, begin in (("input", len(asked) - len(meta.get("input_token_logprobs", []))), ("output", len(asked))):
        for at, (logprob, token, _) in enumerate(meta.get(f"{part}_token_logprobs", []), begin):
            assert token == everything[at]
            if at == 0:
                assert logprob is None
                continue
            _close(rows[at - 1], [[logprob, token, None]], bound(at), f"{part} at {at}")
        for name in ("top_logprobs", "token_ids_logprobs"):
            for at, row in enumerate(meta.get(f"{part}_{name}", []), begin):
                if at == 0:
                    assert row is None
                    continue
                _close(rows[at - 1], row, bound(at), f"{part}_{name} at {at}")
                if name == "top_logprobs":
                    best = rows[at - 1].topk(len(row)).values.tolist()
                    assert max(abs(x[0] - y) for x, y in zip(row, best, strict=True)) < bound(at), (
                        f"not the best at {at}"
                    )


def _close(exact: Any, row: list[list[Any]], bound: float, where: str) -> None:
    for logprob, token, _ in row:
        want = float(exact[token])
        assert abs(logprob - want) < bound, f"{where}: token {token} has {logprob} instead of {want}"


class Hold:
    """A point of `pd.faults` at which a process of the cluster stands until `release`, or its bound, lets it go on."""

    def __init__(self, deployment: Deployment, point: str) -> None:
        self._armed = deployment.faults / point
        self._reached, self._go = (Path(f"{self._armed}.{end}") for end in ("reached", "go"))

    def __enter__(self) -> Hold:
        for path in (self._reached, self._go):
            path.unlink(missing_ok=True)
        self._armed.touch()
        return self

    def __exit__(self, *_: object) -> None:
        self._go.touch()
        self._armed.unlink(missing_ok=True)

    def wait(self, bound: float = 20.0) -> None:
        end = time.monotonic() + bound
        while not self._reached.exists():
            assert time.monotonic() < end, f"nobody came to {self._armed.name}"
            time.sleep(0.002)
