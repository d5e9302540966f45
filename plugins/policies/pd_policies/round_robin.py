"""One after the other."""

from __future__ import annotations

from collections.abc import Sequence

from pd.abc import PolicyContext, RouteRequest, WorkerView


class RoundRobin:
    """The worker after the last one chosen, in the router's order; one that has gone is skipped."""

    wants_prompt = False

    def __init__(self, context: PolicyContext) -> None:
        self._turn = 0

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        worker = workers[self._turn % len(workers)]
        self._turn += 1
        return worker

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        pass
