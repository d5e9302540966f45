"""`pd bench scheduler`: what a step costs the scheduler: decode the runner's result, handle it, encode what follows.

Two schedulers take turns in one process: one with 256 running requests and nothing else, one with 10,000 more waiting
and a prefix cache of 100,000 blocks. The garbage collector is on, as in service.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import rich.console
import rich.table

from pd import messages as m
from pd.config import CacheConfig, SchedulerConfig
from pd.errors import ConfigError
from pd.scheduler import events as ev
from pd.scheduler.actions import Action, Reply, RunStep
from pd.scheduler.core import SchedulerSettings
from pd.scheduler.state import Scheduler
from pd.types import ModelInfo, Role, SamplingParams

_PROMPT, _PAGE = 100, 32
_MODEL = ModelInfo("bench", "", "Bench", 100_000, 1 << 20, 1, 1, 1, 1, 1, "float32", (), "bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--running", type=int, default=256, help="decoding requests (default: 256)")
    parser.add_argument("--waiting", type=int, default=10_000, help="waiting requests of the loaded case")
    parser.add_argument("--cached", type=int, default=100_000, help="cached blocks of the loaded case")
    parser.add_argument("--steps", type=int, default=2_000, help="measured steps of each case (default: 2000)")
    parser.add_argument("--json", metavar="F", help="write the figures to F")


@dataclass
class Case:
    """One scheduler in a steady state; `step` is timed from the bytes that come in to the bytes that go out."""

    name: str
    running: int
    waiting: int
    cached: int
    steps: int

    def __post_init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(m.RunnerToScheduler).decode
        self._orders: list[m.StepOrder] = []
        self._random = np.random.default_rng(0)
        self.micros: list[float] = []
        blocks = self.cached + self.running * ((_PROMPT + self.steps + 200) // _PAGE + 4) + 1
        settings = SchedulerSettings(
            Role.DECODE,
            "bench",
            1,
            "direct",
            scheduler=replace(
                SchedulerConfig(), max_running_requests=self.running, max_queued_requests=self.waiting + self.running
            ),
            cache=CacheConfig(page_size=_PAGE),
        )
        self.scheduler = Scheduler(settings)
        ready = m.RunnerReady(0, blocks, "bench/1/0", b"", (0, 1), (0, 1), 4096, "bench", _MODEL)
        self._carry_out(self.scheduler.handle(ev.RunnerUp(0.0, ready)))
        self._fill_cache()
        for key in range(self.running + self.waiting):
            self._submit(key)
            if key < self.running:
                self._finish_step()
        while len(self._orders[0].sample_u8) < self.running or not all(self._orders[0].sample_u8):
            self._finish_step()

    def _fill_cache(self) -> None:
        core = self.scheduler.core
        assert core is not None
        for _ in range(self.cached // 250):
            path = core.pool.allocate(250)
            assert path is not None
            core.prefix.insert(self._random.integers(0, 100_000, 250 * _PAGE, "<i4").tobytes(), path, 0)
            core.pool.release(path)

    def _submit(self, key: int) -> None:
        tokens = self._random.integers(0, 100_000, _PROMPT, "<i4").tobytes()
        sampling = SamplingParams(max_tokens=self.steps + 200, stop_token_ids=(1, 2))
        self._carry_out(self.scheduler.handle(ev.RequestSubmitted(0.0, m.Submit(key, f"r{key}", tokens, sampling))))

    def _carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, RunStep):
                self._orders.append(action.order)
                self._encode(action.order)
            elif isinstance(action, Reply):
                self._encode(action.message)

    def _result(self) -> bytes:
        order = self._orders.pop(0)
        samples = sum(order.sample_u8)
        return self._encode(
            m.StepDone(
                order.step,
                0,
                order.rows_i64,
                bytes(4 * len(order.sample_u8)),
                bytes(order.sample_u8),
                self._random.integers(3, 100_000, samples, "<i4").tobytes(),
            )
        )

    def _finish_step(self) -> None:
        self._carry_out(self.scheduler.handle(ev.StepFinished(0.0, self._decode(self._result()))))

    def step(self) -> None:
        raw = self._result()
        began = time.perf_counter()
        self._carry_out(self.scheduler.handle(ev.StepFinished(0.0, self._decode(raw))))
        self.micros.append((time.perf_counter() - began) * 1e6)

    def report(self) -> dict[str, float]:
        p50, p99, worst = np.percentile(self.micros, [50, 99, 100])
        return {"median_ms": p50 / 1e3, "p99_ms": p99 / 1e3, "max_ms": worst / 1e3, "steps": len(self.micros)}


def run(args: argparse.Namespace) -> int:
    for name in ("running", "steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}", "must be at least 1")
    cases = [
        Case("empty", args.running, 0, 0, args.steps),
        Case("loaded", args.running, args.waiting, args.cached, args.steps),
    ]
    gc.collect()
    gc.freeze()  # as the scheduler's process does at start; what comes later is the collector's
    for _ in range(args.steps):
        for case in cases:
            case.step()
    reports = {case.name: case.report() for case in cases}
    ratio = reports["loaded"]["median_ms"] / reports["empty"]["median_ms"]
    _show(cases, reports, ratio)
    if args.json:
        document = {
            "command": "pd bench scheduler",
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "running": args.running,
            "waiting": args.waiting,
            "cached_blocks": args.cached,
            "cases": reports,
            "loaded_to_empty": ratio,
        }
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _show(cases: list[Case], reports: dict[str, dict[str, float]], ratio: float) -> None:
    table = rich.table.Table(title=f"scheduler, {cases[0].running} running: decode + handle + encode of one step")
    for column in ("case", "waiting", "cached blocks", "median ms", "p99 ms", "max ms"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in cases:
        figures = reports[case.name]
        table.add_row(
            case.name,
            str(case.waiting),
            str(case.cached),
            *(f"{figures[key]:.3f}" for key in ("median_ms", "p99_ms", "max_ms")),
        )
    console = rich.console.Console()
    console.print(table)
    console.print(f"loaded / empty (medians): {ratio:.2f}")
