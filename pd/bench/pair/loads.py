"""The steps with load: one rate, or one pace of a trace, and what clients saw of a kill under it."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import uvloop

from pd.bench.pair import outcomes
from pd.bench.pair.curves import completed_share
from pd.bench.pair.launch import START, Launcher
from pd.bench.pair.options import Options
from pd.bench.pair.plan import Step
from pd.bench.serve import options as serve
from pd.bench.serve.client import Client
from pd.bench.serve.command import raise_file_limit
from pd.bench.serve.load import Load, RunResult, warm_up
from pd.bench.serve.metrics import summarise
from pd.bench.serve.plan import Run, plan_runs
from pd.bench.serve.requests import Target, discover
from pd.errors import PdError

#: Requests before the load, one after the other, with its own prompts' lengths and answers of so many tokens.
WARM_UP, WARM_UP_OUTPUT = 8, 8

#: When an instance is killed: so far into the time of sending.
KILL_AT = 1 / 4

#: Seconds that a bounded wait for an instance may be exceeded by: its own start.
_GRACE = 5.0


def load(step: Step, options: Options, launcher: Launcher) -> dict[str, Any]:
    """One point of a curve: an entry as `pd bench serve` writes it, and which system it is of."""
    launcher["router"].flush()
    result, asked = _run(arguments(step, options, launcher["router"].url))
    entry = summarise(result, asked)
    point = {"system": step.system, "chunk": step.chunk, "rate": step.rate or entry["offered_rps"]}
    if step.time_scale:
        point["time_scale"] = step.time_scale
    return {**point, "completed_share": round(completed_share(result.outcomes), 4), **entry}


def kill(step: Step, options: Options, launcher: Launcher) -> dict[str, Any]:
    """The same load, in the middle of which `step.victim` is killed and later started again, on the same ports."""
    launcher["router"].flush()
    times: dict[str, float] = {}
    victim = launcher[step.victim]

    async def strike(began: float) -> None:
        await asyncio.sleep(max(0.0, began + options.kill_seconds * KILL_AT - time.perf_counter()))
        times["killed"] = time.perf_counter() - began
        await asyncio.to_thread(victim.kill)
        await asyncio.sleep(options.down)
        victim.start()
        await asyncio.to_thread(victim.wait_healthy, START)
        times["back"] = time.perf_counter() - began

    result, asked = _run(arguments(step, options, launcher["router"].url), strike)
    launcher["router"].wait_healthy(START)
    return {
        "victim": step.victim,
        "rate": step.rate,
        "chunk": step.chunk,
        **outcomes.summary(result.outcomes, times["killed"], times["back"]),
        "load": summarise(result, asked),
    }


def arguments(step: Step, options: Options, url: str) -> serve.Options:
    """The load as `pd bench serve` understands it. Raises ConfigError."""
    words = [url, "--return-token-ids", "--no-progress", "--seed", str(step.seed)]
    words += ["--slo-ttft-ms", str(options.slo_ttft_ms), "--slo-itl-ms", str(options.slo_itl_ms)]
    words += ["--timeout", str(options.request_timeout)]
    if step.phase == "trace":
        words += ["--trace", str(options.trace), "--rows", str(options.rows)]
        words += ["--length-scale", options.length_scale, "--time-scale", str(step.time_scale)]
    else:
        seconds = options.kill_seconds if step.phase == "kill" else options.seconds
        count = max(1, round(step.rate * seconds))
        words += ["--rate", str(step.rate), "--poisson", "--num-requests", str(count)]
        words += ["--input-len", str(options.input_len), "--output-len", str(options.output_len)]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.resolve(parser.parse_args(words))


#: Called with the run's start (time.perf_counter).
Strike = Callable[[float], Coroutine[Any, Any, None]]


def _run(asked: serve.Options, strike: Strike | None = None) -> tuple[RunResult, serve.Options]:
    raise_file_limit()
    (run,) = plan_runs(asked)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_load(asked, run, strike)), asked


def warming(run: Run) -> Run:
    """Its first rows with short answers: lengths that the kernels have to get to know are those of prompts."""
    few = run.warmup(WARM_UP)
    return replace(few, rows=tuple(replace(row, output_len=min(row.output_len, WARM_UP_OUTPUT)) for row in few.rows))


async def _load(asked: serve.Options, run: Run, strike: Strike | None) -> RunResult:
    """Every wait in here is bounded: a request by its timeout, the instance that comes back by START."""
    client = Client(asked.url)
    try:
        target: Target = await discover(client, asked)
        if problems := await warm_up(client, warming(run), target, asked):
            raise PdError(f"the warm-up failed: {problems[0]}")
        striking: list[asyncio.Task[None]] = []

        def started(began: float) -> None:
            if strike is not None:
                striking.append(asyncio.create_task(strike(began)))

        try:
            result = await Load(client, run, target, asked, started).execute()
            for task in striking:
                await asyncio.wait_for(task, START + _GRACE)
            return result
        finally:
            for task in striking:
                task.cancel()
    finally:
        client.close()
