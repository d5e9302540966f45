"""The processes of `bench_hops.py`: the production ones, which note when a request passes them.

The notes are in a file beside the sockets. The monotonic clock is the same in all processes of one machine.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pd import messages as m
from pd.child import ChildContext
from pd.runner import device as runner_device
from pd.runner import device_sampler
from pd.runner import service as runner_service
from pd.runner.config import RunnerConfig
from pd.runner.device import Cpu
from pd.runner.device_state import DeviceState
from pd.runner.device_worker import DeviceWorker
from pd.runner.ends import StepEnds
from pd.runner.grammar import Grammars
from pd.runner.graphs import Outcome, StepGraphs
from pd.scheduler import actions as ac
from pd.scheduler import events as ev
from pd.scheduler import service as scheduler_service
from pd.scheduler.service import SchedulerProcessConfig
from pd.screen import Report
from pd.types import ModelInfo

#: What is noted of each request, in order; `due` is when the device was done with it.
NOTES = ("submitted", "ordered", "received", "launched", "due", "noticed", "finished", "came", "replied")
REQUESTS = 4096

#: By prompt length: milliseconds for which a device that is none computes.
DEVICE_MS = {512: 14.0, 2048: 49.0, 8192: 210.0}


class Notes:
    def __init__(self, folder: Path) -> None:
        """Every process may open them; who comes first makes the file."""
        self.size = 8 * REQUESTS * len(NOTES)
        descriptor = os.open(folder / "notes", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, self.size)
        #: int64[REQUESTS, notes], monotonic nanoseconds, by key.
        self.times = np.frombuffer(mmap.mmap(descriptor, self.size), dtype=np.int64).reshape(REQUESTS, len(NOTES))
        os.close(descriptor)

    @classmethod
    def beside(cls, endpoint: str) -> Notes:
        return cls(Path(endpoint.removeprefix("ipc://")).parent)

    def put(self, key: int, note: str, at: int | None = None) -> None:
        if key > 0:  # the first steps' keys are negative
            self.times[key % REQUESTS, NOTES.index(note)] = at if at is not None else time.monotonic_ns()


# --- scheduler ---


async def scheduler(config: SchedulerProcessConfig, context: ChildContext) -> int:
    """Process target."""
    notes = Notes.beside(config.api_endpoint)

    class Noting(scheduler_service.Service):
        def apply(self, event: ev.Event) -> None:
            at = time.monotonic_ns()
            if isinstance(event, ev.RequestSubmitted):
                notes.put(event.submit.key, "submitted", at)
            elif isinstance(event, ev.StepFinished):
                notes.put(_first_key(event.done.keys_i64), "came", at)
            super().apply(event)

        def _do(self, action: ac.Action) -> None:
            if isinstance(action, ac.RunStep):
                notes.put(_first_key(action.order.rows_i64), "ordered")
            elif isinstance(action, ac.Reply) and isinstance(action.message, m.StepOutputs):
                notes.put(_first_key(action.message.keys_i64), "replied")
            super()._do(action)

    scheduler_service.Service = Noting  # type: ignore[misc]
    return await scheduler_service.main(config, context)


def _first_key(keys: bytes) -> int:
    return int.from_bytes(keys[:8], "little", signed=True)


# --- runner ---


def runner(config: RunnerConfig, context: ChildContext) -> None:
    """Process target."""
    notes = Notes.beside(config.step_endpoint)
    runner_device.DeviceWorker, runner_device.StepGraphs = _noting(notes)  # type: ignore[misc]
    if config.model.device == "cpu":
        device_sampler.sample_rows = lambda logits, *_, **__: (torch.zeros(len(logits), dtype=torch.int32), None)
        runner_service.open_device = lambda config, report: NoDevice(config, report, notes)
    runner_service.main(config, context)


def _noting(notes: Notes) -> tuple[type[DeviceWorker], type[StepGraphs]]:
    """A step counts as launched when all is ready for its model's first kernel, or its graph."""
    launched: list[Any] = [0, None]  # when, and the device's event

    def launches() -> None:
        launched[:] = time.monotonic_ns(), _mark()

    class Graphs(StepGraphs):
        def _replay(self, *args: Any) -> Outcome:
            launches()
            return super()._replay(*args)

    class Model:
        def __init__(self, model: Any) -> None:
            self.logits, self._forward = model.logits, model.forward

        def forward(self, *args: Any) -> torch.Tensor:
            launches()
            return self._forward(*args)

    class Worker(DeviceWorker):
        def __init__(self, model: Any, *args: Any, **options: Any) -> None:
            super().__init__(Model(model), *args, **options)
            self._noted: deque[tuple[int, int, Any, Any]] = deque()

        def launch(self, order: m.StepOrder) -> None:
            key = _first_key(order.rows_i64)
            notes.put(key, "received")
            super().launch(order)
            notes.put(key, "launched", launched[0])
            self._noted.append((key, *launched, _mark()))

        def finish(self) -> m.StepDone:
            at = time.monotonic_ns()
            done = super().finish()
            key, began, begin, end = self._noted.popleft()
            notes.put(key, "noticed", at)
            notes.put(key, "finished")
            if end is not None:
                end.synchronize()
                notes.put(key, "due", began + int(1e6 * begin.elapsed_time(end)))
            return done

    return Worker, Graphs


def _mark() -> torch.cuda.Event | None:
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class NoModel:
    """Returns at once, as what launches kernels does."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info

    def forward(self, tokens: torch.Tensor, batch: object, kv: object) -> torch.Tensor:
        return torch.zeros(len(tokens), self._info.hidden_size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden), self._info.vocab_size)


class Due:
    """Stands for a device's event; waiting for it sleeps, as the driver does."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic_ns() + int(1e9 * seconds)

    def query(self) -> bool:
        return time.monotonic_ns() >= self.at

    def synchronize(self) -> None:
        while (left := self.at - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)


class NoDevice(Cpu):
    """The GPU's worker over a device that computes nothing, and takes its time for that."""

    def __init__(self, config: RunnerConfig, report: Report, notes: Notes) -> None:
        super().__init__(config, report)
        self._notes = notes

    def load(self, info: ModelInfo, builders: object, log: object) -> None:
        torch.set_num_threads(1)
        self._model = NoModel(info)

    def make_worker(
        self,
        info: ModelInfo,
        push: Callable[[m.Push], None] | None,
        grammars: Grammars,
        ends: StepEnds,
        log: Callable[..., None],
    ) -> DeviceWorker:
        width = -(-info.context_length // self._pool.shape.tokens) + 1
        worker = runner_device.DeviceWorker(
            self._model,
            self._pool,
            DeviceState(64, width, info.num_kv_heads, info.vocab_size, torch.device("cpu")),
            vocab_size=info.vocab_size,
            group=info.num_heads // info.num_kv_heads,
            grammars=grammars,
        )

        def launched(_: object) -> None:
            order = worker._pending[-1].order
            event = Due(DEVICE_MS.get(int.from_bytes(order.counts_i32[:4], "little"), 1.0) / 1e3)
            self._notes.put(_first_key(order.rows_i64), "due", event.at)
            ends.launched(event)

        worker.start(None, launched)
        return worker
