"""One invocation from resolved options to an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import resource
import sys
from collections.abc import AsyncIterator
from typing import IO, Any

import uvloop
from rich.console import Console

from pd.bench.serve.client import Client
from pd.bench.serve.load import Load, RunResult, warm_up
from pd.bench.serve.metrics import latencies, summarise
from pd.bench.serve.options import Options
from pd.bench.serve.plan import Run, plan_runs
from pd.bench.serve.profiler import Recording
from pd.bench.serve.report import document, print_report, write_json, write_record
from pd.bench.serve.requests import Target, discover
from pd.errors import ConfigError


class _Bench:
    """The runs of one invocation; what is finished is on disk before the next run starts."""

    def __init__(self, options: Options, runs: list[Run]) -> None:
        self._options, self._runs = options, runs
        self._started = datetime.datetime.now(datetime.UTC)
        self._notes = Console(stderr=True)
        self.entries: list[dict[str, Any]] = []
        self.target: Target | None = None
        self.last: RunResult | None = None
        self.profiled = True  # or there is nothing to profile

    async def execute(self, record: IO[bytes] | None) -> None:
        """Find the target, warm it up and run every load level."""
        client = Client(self._options.url, self._options.headers)
        try:
            target = self.target = await discover(client, self._options)
            self._describe(target)
            if self._options.warmup:
                problems = await warm_up(client, self._runs[0].warmup(self._options.warmup), target, self._options)
                for problem in problems[:3]:
                    self._notes.print(f"warm-up failed: {problem}", style="yellow", markup=False)
            async with self._profile():
                for run in self._runs:
                    self.last = await Load(client, run, target, self._options).execute()
                    self.entries.append(summarise(self.last, self._options))
                    if record is not None:
                        write_record(record, self.last, target, self._options)
                    if self._options.json_path is not None:
                        write_json(self._options.json_path, self._document(target))
        finally:
            client.close()

    @contextlib.asynccontextmanager
    async def _profile(self) -> AsyncIterator[None]:
        """Every run is in the trace; the warm-up is not."""
        if self._options.profile is None:
            yield
            return
        note = functools.partial(self._notes.print, markup=False, highlight=False, soft_wrap=True)
        recording = Recording(self._options.profile, self._options, note)
        try:
            await recording.start()
            try:
                yield
            finally:
                self.profiled = await recording.stop()
        finally:
            recording.close()

    def _document(self, target: Target) -> dict[str, Any]:
        return document(self._options, target, self.entries, self._started)

    def _describe(self, target: Target) -> None:
        options, rows = self._options, self._runs[0].rows
        low, high = target.token_range
        load = f"trace {options.trace}, lengths x{options.length_scale:g}" if options.trace else "synthetic prompts"
        self._notes.print(
            f"{options.url} {options.endpoint}, model {target.model or '-'}; {load}, {len(rows)} requests a run: "
            f"{sum(row.input_len for row in rows):,} prompt and {sum(row.output_len for row in rows):,} output tokens; "
            f"ids {low}..{high - 1} ({target.range_source}), seed {options.seed}",
            markup=False,
            highlight=False,
        )


def run_bench(options: Options) -> int:
    """Exit code: 0 done; 1 every request of every run failed, or a profile is lost; 130 interrupted.

    Raises ConfigError.
    """
    runs = plan_runs(options)
    _check_warmup(options, runs)
    raise_file_limit()
    bench = _Bench(options, runs)
    interrupted = False
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(options.record_path.open("wb")) if options.record_path is not None else None
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(bench.execute(record))
            except KeyboardInterrupt:
                interrupted = True
                print("interrupted: the report covers the finished runs only", file=sys.stderr)
    if bench.entries:
        print_report(Console(), bench.entries)
        _plot(options, bench)
    if interrupted:
        return 130
    return 0 if bench.profiled and any(entry["completed"] for entry in bench.entries) else 1


def _plot(options: Options, bench: _Bench) -> None:
    if options.plot_path is None or bench.last is None or bench.target is None:
        return
    from pd.bench.serve.plot import write_plot

    source = f"{options.trace.name}, lengths x{options.length_scale:g}" if options.trace else "synthetic prompts"
    title = f"pd bench serve: {bench.target.model or options.url}, {source}"
    if len(bench.entries) == 1:
        title += f", {bench.entries[0]['label']}"
    write_plot(options.plot_path, title, bench.entries, latencies(bench.last.outcomes))


def _check_warmup(options: Options, runs: list[Run]) -> None:
    if options.warmup > len(runs[0].rows):
        raise ConfigError("--warmup", f"a run has only {len(runs[0].rows)} requests", "warm up with at most as many")


def raise_file_limit() -> None:
    """A stream is a socket: raise the soft limit, often 1,024, to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
