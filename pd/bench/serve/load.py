"""The open loop: every request leaves at its time, whatever became of the earlier ones."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from pd.bench.serve.client import Client
from pd.bench.serve.options import Options
from pd.bench.serve.plan import Row, Run
from pd.bench.serve.progress import Counters, watch
from pd.bench.serve.requests import Ahead, Target, body_of, new_answer, path_of
from pd.bench.serve.sse import Answer

_LEAD = 0.05  # seconds between the start of a run and its first request


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request after the run. Times are seconds after the run's start."""

    row: Row
    request_id: str
    sent: float  # row.at + send lag
    ended: float  # the exchange was over, well or not
    start: float  # time.perf_counter of the run's start; answer.times are on that clock
    answer: Answer


@dataclass(frozen=True)
class RunResult:
    """Everything that one run measured."""

    run: Run
    outcomes: list[Outcome]
    counters: Counters
    cpu_s: float  # CPU seconds of this process during the run
    wall_s: float


class Load:
    """Drives one run. Owns the requests' tasks: all of them have ended when `execute` returns.

    `started` is called with the run's start (time.perf_counter) when it is known.
    """

    def __init__(
        self,
        client: Client,
        run: Run,
        target: Target,
        options: Options,
        started: Callable[[float], None] = lambda start: None,
    ) -> None:
        self._client, self._run, self._target, self._options = client, run, target, options
        self._counters = Counters(total=len(run.rows))
        self._outcomes: list[Outcome] = []
        self._path = path_of(options)
        self._id = f"bench-{os.urandom(4).hex()}"  # request ids must differ between invocations
        cap = options.max_concurrency
        self._slots = asyncio.Semaphore(cap) if cap is not None else None
        self._start, self._started = 0.0, started

    async def execute(self) -> RunResult:
        """Send every row at its time and wait for the last answer."""
        ahead = Ahead(iter(self._run.rows), lambda row: body_of(row, self._run, self._target, self._options))
        gc.collect()
        gc.freeze()  # a full collection over the prepared bodies would stall the loop for milliseconds
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch(self._run.label, self._counters, self._options.progress))
                await self._send_all(ahead)
                watcher.cancel()
        finally:
            gc.unfreeze()
        wall_s = time.perf_counter() - wall
        self._outcomes.sort(key=lambda outcome: outcome.row.at)
        return RunResult(self._run, self._outcomes, self._counters, time.process_time() - cpu, wall_s)

    async def _send_all(self, ahead: Ahead) -> None:
        self._start = time.perf_counter() + _LEAD
        self._started(self._start)
        async with asyncio.TaskGroup() as tasks:
            for number, row in enumerate(self._run.rows):
                body = ahead.take()
                # The loop's timers count milliseconds: a request leaves up to 1 ms early or late.
                await asyncio.sleep(max(0.0, self._start + row.at - time.perf_counter()))
                tasks.create_task(self._one(row, number, body))
                await asyncio.sleep(0)  # lets the task write its request before the next body is prepared
                ahead.fill()

    async def _one(self, row: Row, number: int, body: bytes) -> None:
        if self._slots is None:
            await self._exchange(row, number, body)
        else:
            self._counters.held += self._slots.locked()
            async with self._slots:  # first come, first served
                await self._exchange(row, number, body)

    async def _exchange(self, row: Row, number: int, body: bytes) -> None:
        counters, answer = self._counters, new_answer(self._options)
        request_id = f"{self._id}-{self._run.index}-{number}"
        counters.sent += 1
        counters.peak = max(counters.peak, counters.in_flight)
        sent, limit = time.perf_counter(), asyncio.timeout(self._options.timeout)
        try:
            async with limit:
                await self._client.post(self._path, body, answer, request_id)
        except OSError as error:  # TimeoutError included
            if limit.expired():
                answer.fail("timeout", f"no complete answer within {self._options.timeout:g} s")
            else:
                answer.fail("connection", str(error) or type(error).__name__)
        ended = time.perf_counter()
        answer.settle()
        counters.done += 1
        counters.failed += answer.error_kind is not None
        outcome = Outcome(row, request_id, sent - self._start, ended - self._start, self._start, answer)
        self._outcomes.append(outcome)


async def warm_up(client: Client, run: Run, target: Target, options: Options) -> list[str]:
    """Send the warm-up rows one after the other; returns the messages of those that failed."""
    problems = []
    for number, row in enumerate(run.rows):
        answer = new_answer(options)
        try:
            async with asyncio.timeout(options.timeout):
                body = body_of(row, run, target, options)
                await client.post(path_of(options), body, answer, f"bench-{os.urandom(4).hex()}-warmup-{number}")
        except OSError as error:  # TimeoutError included
            answer.fail("connection", str(error) or type(error).__name__)
        answer.settle()
        if answer.error_kind is not None:
            problems.append(f"{answer.error_kind}: {answer.error}")
    return problems
