"""The built-in routing policy, registered in the same way as any plugin's."""

from __future__ import annotations

from collections.abc import Sequence

from pd import hookimpl
from pd.abc import PolicyContext, RouteRequest, WorkerView
from pd.hookspecs import RegisterPolicy


class Random:
    """Any worker, all equally likely."""

    wants_prompt = False

    def __init__(self, context: PolicyContext) -> None:
        self._random = context.random

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        return workers[int(self._random() * len(workers))]

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        pass


@hookimpl
def pd_register_routing_policies(register: RegisterPolicy) -> None:
    register("random", Random, summary="any worker, all equally likely")
