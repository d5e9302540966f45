"""The steps without load: a plain copy, whether the output is right, and what becomes of a pushed prompt."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

from pd.bench.pair.launch import Launcher
from pd.bench.pair.options import Options
from pd.bench.pair.plan import Step
from pd.bench.serve.client import Client
from pd.bench.serve.sse import NativeAnswer
from pd.errors import PdError

#: Seconds that a command may take, and a request.
COMMAND, REQUEST = 300.0, 120.0

#: Tokens of an answer whose first two are timed, and of a prompt that warms up.
ANSWER, WARM_UP = 4, 64

#: Seconds until a log line that is due has been written.
LOG_LINE = 5.0


def copy(options: Options, folder: Path) -> dict[str, Any]:
    """GB/s of one plain copy from the first GPU to the second one (or within the only one), and of `direct` beside."""
    found = folder / "copy.json"
    first, second = (f"cuda:{gpu}" for gpu in options.gpus)
    devices = ["cpu", "cpu"] if options.device == "cpu" else [first, second]
    command = ["bench", "transfer", "--bytes", options.copy_bytes, "--sizes", "4M", "--rounds", "5"]
    command += ["--latency-count", "10", "--device", devices[0], "--json", str(found)]
    command += ["--option", "transfer_memory=shm"]
    command += ["--peer-device", devices[1]] if devices[0] != devices[1] else []
    done = pd(*command)
    if done.returncode:
        raise PdError(f"the plain copy cannot be measured: {done.stderr.strip()[-500:]}")
    rows = [row for row in json.loads(found.read_text())["throughput"] if row["posted"] == "merged"]
    (raw,) = (row["gb_per_s"] for row in rows if row["variant"] == "raw")
    (checked,) = (row["gb_per_s"] for row in rows if row["digests"])
    return {"devices": devices, "bytes": options.copy_bytes, "copy_gbps": raw, "direct_alone_gbps": checked}


def verify(step: Step, options: Options, launcher: Launcher, folder: Path) -> dict[str, Any]:
    """What `pd verify` says of the pair, compared with one unified instance."""
    found = folder / f"{step.name}.json"
    command = ["verify", launcher["router"].url, "--reference", launcher["reference"].url, "--json", str(found)]
    command += ["--only", options.verify_only] if options.verify_only else []
    done = pd(*command)
    if done.returncode not in (0, 1) or not found.exists():
        raise PdError(f"pd verify ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    said = json.loads(found.read_text())
    findings = said.pop("findings")
    counts = {name: said[name] for name in ("equal", "tie", "differs", "failed", "skipped")}
    answered = [one for one in findings if one["status"] in ("equal", "tie", "differs")]
    return {
        "right": done.returncode == 0 and bool(answered),
        **counts,
        "by_prefill": sum(bool(one["prefill"]) for one in answered),
        "worst_logprob": max((one["worst"] for one in answered), default=0.0),
        "first_divergence": said["first_divergence"],
        "failures": [f"{one['case']}: {one['detail']}" for one in findings if one["status"] == "failed"][:5],
    }


def push(step: Step, options: Options, launcher: Launcher) -> dict[str, Any]:
    """Prompts one at a time, by length: each computed and pushed, then pushed again from the prefill's cache."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Pushes(step, options, launcher).run())


class _Pushes:
    def __init__(self, step: Step, options: Options, launcher: Launcher) -> None:
        self._options, self._launcher = options, launcher
        self._random = np.random.default_rng(zlib.crc32(step.name.encode()))
        self._id = f"{step.name}-{time.time_ns():x}"
        self._vocabulary = int(get(f"{launcher['decode'].url}/model_info")["vocab_size"])

    async def run(self) -> dict[str, Any]:
        client = Client(self._launcher["router"].url)
        try:
            for number in range(3):
                await self._ask(client, f"warm-up-{number}", self._prompt(WARM_UP))
            lengths = {}
            for length in self._options.prompts:
                await self._ask(client, f"first-{length}", self._prompt(length))  # cuDNN plans each new length
                fresh, cached = [], []
                for number in range(self._options.repeats):
                    prompt = self._prompt(length)
                    fresh.append(await self._timed(client, f"fresh-{length}-{number}", prompt))
                    self._launcher["decode"].flush()
                    cached.append(await self._timed(client, f"cached-{length}-{number}", prompt))
                lengths[str(length)] = {"fresh": medians(fresh), "cached": medians(cached)}
            return {"transfer_way": self._ways(), "lengths": lengths}
        finally:
            client.close()

    def _prompt(self, length: int) -> list[int]:
        """Random, so that no two share a prefix."""
        found: list[int] = self._random.integers(self._vocabulary // 8, self._vocabulary * 7 // 8, length).tolist()
        return found

    async def _ask(self, client: Client, name: str, prompt: list[int]) -> tuple[float, float]:
        """Milliseconds until the first and the second token. Raises PdError."""
        sampling = {"temperature": 0, "max_new_tokens": ANSWER, "ignore_eos": True}
        body = {"input_ids": prompt, "rid": f"{self._id}-{name}", "sampling_params": sampling, "stream": True}
        answer = NativeAnswer()
        began = time.perf_counter()
        try:
            async with asyncio.timeout(REQUEST):
                await client.post("/generate", msgspec.json.encode(body), answer, f"{self._id}-{name}")
        except OSError as error:  # TimeoutError included
            answer.fail("connection", str(error) or type(error).__name__)
        answer.settle()
        if answer.error_kind is not None:
            raise PdError(f"{name}: {answer.error_kind} {answer.error}")
        tokens = itertools.accumulate(answer.counts)
        second = next(time for time, count in zip(answer.times, tokens, strict=True) if count >= 2)
        return (answer.times[0] - began) * 1e3, (second - began) * 1e3

    async def _timed(self, client: Client, name: str, prompt: list[int]) -> dict[str, float]:
        """One prompt by the client's clock and by the two instances' log lines."""
        first, second = await self._ask(client, name, prompt)
        there = await self._landed("prefill", name)
        here = await self._landed("decode", name)
        return {
            "ttft_ms": first,
            "second_token_ms": second,
            "nbytes": there["bytes"],
            "push_ms": there["push_ms"],
            "gbps": there["bytes"] / max(1e-6, there["push_ms"]) / 1e6,
            "after_compute_ms": there["after_compute_ms"],
            "after_first_ms": here["after_first_ms"],
            "share": there["after_compute_ms"] / second,
        }

    async def _landed(self, instance: str, name: str) -> dict[str, Any]:
        deadline = time.monotonic() + LOG_LINE
        while True:
            for line in log_lines(self._launcher[instance].log):
                if line.get("event") == "handoff_landed" and line.get("rid") == f"{self._id}-{name}":
                    return line
            if time.monotonic() > deadline:
                raise PdError(f"{name}: {instance} never said that its KV landed: it was computed elsewhere, or failed")
            await asyncio.sleep(0.02)

    def _ways(self) -> list[str]:
        """How `direct` reached the other instance's memory, as its log says; of other backends nothing is known."""
        found = {f"{line['way']}" for line in log_lines(self._launcher["decode"].log) if line.get("way")}
        found |= {f"{line['way']}" for line in log_lines(self._launcher["prefill"].log) if line.get("way")}
        return sorted(found)


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure, and the least and the most of the rate."""
    out = {name: statistics.median(one[name] for one in found) for name in found[0]}
    rates = [one["gbps"] for one in found]
    return {**{name: round(value, 6) for name, value in out.items()}, "gbps_min": min(rates), "gbps_max": max(rates)}


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines of a log; others, such as a warning of a library, are left out."""
    for line in path.read_bytes().split(b"\n"):
        if line.startswith(b"{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # it is being written
                continue


def pd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A `pd` command, to its end."""
    command = [sys.executable, "-m", "pd", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND, check=False)
    except subprocess.TimeoutExpired:
        raise PdError(f"pd {arguments[0]} {arguments[1]} took longer than {COMMAND:g} s") from None


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.loads(answer.read())
