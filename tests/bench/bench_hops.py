"""Where the time to the first token goes, beside the device: from the client through scheduler and runner and back.

    OMP_NUM_THREADS=1 python tests/bench/bench_hops.py [--requests 200] [--prompts 512,2048,8192] [--json F]
    python tests/bench/bench_hops.py --device cuda

The production processes of an instance, without HTTP, asked for one token of one prompt at a time, which find an engine
that has been idle for --idle ms. On the CPU a device is stood in for that is busy for as long as an H200 is with
Llama-3.1-8B: the runner's path is a GPU's except that no kernel is launched. With `--device cuda` that model runs, with
random weights, and `due` is when the device was done by its own clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

ROOT = str(Path(__file__).parents[2])
sys.path[:0] = [ROOT]

from pd.bench.engine.client import EngineClient  # noqa: E402
from pd.bench.engine.shapes import SHAPES, make_model  # noqa: E402
from pd.config import CacheConfig, LogConfig, ModelConfig, SchedulerConfig, ServeConfig  # noqa: E402
from pd.instance import Plan  # noqa: E402
from pd.logs import configure  # noqa: E402
from pd.process import ChildSpec  # noqa: E402
from tests.bench.hop_targets import REQUESTS, Notes  # noqa: E402

#: What is between two moments of a request: the client's asking, the NOTES, the client's reading.
HOPS = (
    "client to scheduler",
    "scheduler decides",
    "scheduler to runner",
    "runner launches",
    "device",
    "device to runner",
    "runner makes results",
    "runner to scheduler",
    "scheduler answers",
    "scheduler to client",
)
DEVICE = HOPS.index("device")


class NotingPlan(Plan):
    def scheduler(self) -> ChildSpec:
        return replace(super().scheduler(), target="tests.bench.hop_targets:scheduler")

    def runner(self) -> ChildSpec:
        return replace(super().runner(), target="tests.bench.hop_targets:runner")


def settings(model: str, device: str) -> ServeConfig:
    return ServeConfig(
        model=ModelConfig(model=model, load_format="dummy", device=device),
        cache=CacheConfig(disable_prefix_cache=True, max_total_tokens=0 if device == "cuda" else 16384),
        scheduler=SchedulerConfig(chunked_prefill_size=8192, max_prefill_tokens=8192),
        log=LogConfig(log_level="warning", log_format="json"),
    )


def small_model(folder: Path) -> str:
    """The shape's own context and page tables, and next to nothing to keep."""
    config = SHAPES["llama-3.1-8b"] | {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "num_hidden_layers": 2, "vocab_size": 1024, "eos_token_id": 1,
    }  # fmt: skip
    make_model(folder, "llama-3.1-8b")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


async def hops(engine: EngineClient, notes: Notes, tokens: int, requests: int, idle: float) -> np.ndarray:
    """Microseconds, [requests, HOPS]."""
    found = []
    for _ in range(requests):
        await asyncio.sleep(idle * (0.75 + 0.5 * np.random.random()))
        (answer,) = await engine.ask([tokens], 1)
        inner = notes.times[engine.asked % REQUESTS].tolist()
        found.append(np.diff([int(1e9 * answer.asked), *inner, int(1e9 * answer.times[0])]) / 1e3)
    return np.array(found)


def cpu_shares(processes: Sequence[psutil.Process], seconds: float) -> list[float]:
    """Of a core, that each takes in so many seconds."""
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(seconds)
    return [(sum(process.cpu_times()[:2]) - one) / seconds for process, one in zip(processes, before, strict=True)]


async def measure(options: argparse.Namespace, model: str) -> dict[int, np.ndarray]:
    found = {}
    async with EngineClient(settings(model, options.device), NotingPlan) as engine:
        notes = Notes(engine.folder)
        for tokens in map(int, options.prompts.split(",")):
            await hops(engine, notes, tokens, 5, 0.0)
            found[tokens] = await hops(engine, notes, tokens, options.requests, options.idle / 1e3)
        children = psutil.Process().children()
        await asyncio.sleep(1.0)
        for process, share in zip(children, cpu_shares(children, 3.0), strict=True):
            print(f"idle {process.name()}: {share:.2%} of a core", file=sys.stderr)
    return found


def figures(found: dict[int, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """By hop and prompt length: median and p90, microseconds. `host` is all but the device's own time."""
    rows: dict[str, dict[str, list[float]]] = {}
    for tokens, times in found.items():
        columns = dict(zip(HOPS, times.T, strict=True)) | {"host": times.sum(1) - times[:, DEVICE]}
        columns["first token"] = times.sum(1)
        for name, values in columns.items():
            rows.setdefault(name, {})[str(tokens)] = [statistics.median(values), float(np.quantile(values, 0.9))]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompts", default="512,2048,8192")
    parser.add_argument("--idle", type=float, default=20.0, help="ms between requests")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    configure("bench", "", LogConfig(log_level="warning"))
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        model = str(make_model(Path(folder), "llama-3.1-8b")) if options.device == "cuda" else small_model(Path(folder))
        rows = figures(runner.run(measure(options, model)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    table = Table(title=f"median / p90 of {options.requests} requests, us")
    for column in ("hop", *options.prompts.split(",")):
        table.add_column(column, justify="left" if column == "hop" else "right")
    for name, cells in rows.items():
        table.add_row(name, *(f"{median:.0f} / {late:.0f}" for median, late in cells.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
