"""Policies that compare load: this router's own requests on a worker plus what the worker last said of itself.

A worker whose word is missing or old is not thereby idle. Its reported part is taken to be the largest that any other
candidate reports, so that it never wins by silence, and still gets requests when the others really have more to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pd.abc import PolicyContext, RouteRequest, WorkerView

#: A report older than this, in seconds, says nothing about now.
FRESH = 5.0


def _reported(worker: WorkerView) -> int | None:
    if worker.load is None or worker.load_age > FRESH:
        return None
    return worker.load.waiting + worker.load.running


def loads(workers: Sequence[WorkerView]) -> list[tuple[int, bool]]:
    """Per worker (load, whether its report is missing): in this order the less loaded one comes first."""
    reports = [_reported(worker) for worker in workers]
    worst = max((report for report in reports if report is not None), default=0)
    return [
        (worker.in_flight + (worst if report is None else report), report is None)
        for worker, report in zip(workers, reports, strict=True)
    ]


def least(workers: Sequence[WorkerView], random: Callable[[], float]) -> WorkerView:
    """The least loaded worker; one of them at random where several are."""
    measured = loads(workers)
    low = min(measured)
    best = [worker for worker, load in zip(workers, measured, strict=True) if load == low]
    return best[int(random() * len(best))]


class LeastLoad:
    """The least loaded of all workers."""

    wants_prompt = False

    def __init__(self, context: PolicyContext) -> None:
        self._random = context.random

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        return least(workers, self._random)

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        pass


class PowerOfTwo:
    """The less loaded of two workers drawn at random.

    Nearly as even as asking all, without every router sending its next request to the same, momentarily idle worker
    (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).
    """

    wants_prompt = False

    def __init__(self, context: PolicyContext) -> None:
        self._random = context.random

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        count = len(workers)
        if count == 1:
            return workers[0]
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        second += second >= first
        return least((workers[first], workers[second]), self._random)

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        pass
