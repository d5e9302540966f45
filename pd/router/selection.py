"""Which worker gets a request: a policy per pool, chosen by name or by preference, and what it may not decide.

A policy sees healthy workers only and never the bookkeeping: in-flight counts are taken and returned here, exactly
once each, by a `Lease`.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from pd.abc import PolicyContext, RouteRequest, RoutingPolicy, WorkerView
from pd.config import RouteConfig
from pd.errors import ConfigError, PdError
from pd.logs import get_logger
from pd.router.http import HeaderMap, Request
from pd.router.prompt import Prompt, read_prompt
from pd.router.workers import Fleet, Worker

log = get_logger()

#: Prefill candidates named to a decode instance: the policy's choice and alternatives.
MAX_PREFILLS = 3


class PolicyEntry(Protocol):
    """What the plugins registered under a name."""

    @property
    def factory(self) -> Callable[[PolicyContext], RoutingPolicy]: ...

    @property
    def prefer(self) -> str: ...


class PolicyError(PdError):
    """A policy broke its contract. The request that it was asked for fails; no other is tried behind its back."""

    def __init__(self, name: str, problem: str) -> None:
        self.name, self.problem = name, problem
        super().__init__(f"routing policy {name}: {problem}")


def resolve(pool: str, config: RouteConfig, entries: Mapping[str, PolicyEntry]) -> str:
    """The name of a pool's policy: its own flag, `--policy`, the installed one that prefers this pool, `random`."""
    own = config.prefill_policy if pool == "prefill" else config.decode_policy
    name = own or config.policy
    if name:
        if name not in entries:
            known = ", ".join(sorted(entries))
            flag = f"--{pool}-policy" if own else "--policy"
            raise ConfigError(flag, f"no routing policy {name!r}; known: {known}", "more with: pip install pd-policies")
        return name
    return next((name for name, entry in sorted(entries.items()) if entry.prefer == pool), "random")


class Lease:
    """One request on one worker. `end` may be called any number of times; the first one counts."""

    __slots__ = ("_open", "_policy", "_request", "_view", "worker")

    def __init__(
        self, worker: Worker, policy: RoutingPolicy | None, request: RouteRequest, view: WorkerView | None
    ) -> None:
        self.worker = worker
        self._policy, self._request, self._view = policy, request, view
        self._open = True
        worker.acquire()

    def end(self) -> None:
        if not self._open:
            return
        self._open = False
        self.worker.release()
        if self._policy is not None and self._view is not None:
            try:
                self._policy.finished(self._request, self._view)
            except Exception:  # third-party code; the request itself is over, so its answer stands
                log.exception("routing_policy_failed", worker=self.worker.url)


class Selector:
    """One pool and its policy."""

    def __init__(self, pool: str, workers: list[Worker], name: str, policy: RoutingPolicy) -> None:
        self.pool, self.workers, self.name, self.policy = pool, workers, name, policy

    def choose(self, request: RouteRequest, exclude: Collection[Worker] = ()) -> Lease | None:
        """A lease on the policy's choice, or None where no worker is left. Raises PolicyError."""
        candidates = Fleet.candidates(self.workers)
        if exclude:
            candidates = [worker for worker in candidates if worker not in exclude]
        if not candidates:
            return None
        now = time.monotonic()
        views = [worker.view(now) for worker in candidates]
        try:
            view = self.policy.choose(request, views)
        except Exception as err:  # third-party code: reported with its name, and the request fails
            raise PolicyError(self.name, f"{type(err).__name__}: {err}") from err
        for worker, candidate in zip(candidates, views, strict=True):
            if candidate is view:
                return Lease(worker, self.policy, request, view)
        raise PolicyError(self.name, f"chose {view!r}, which is not one of the workers given")

    def alternatives(self, first: Worker) -> list[Worker]:
        """Who else could do it: the least busy others."""
        others = [worker for worker in Fleet.candidates(self.workers) if worker is not first]
        return sorted(others, key=lambda worker: worker.in_flight)[: MAX_PREFILLS - 1]


class Selection:
    """The policies of both pools."""

    def __init__(self, config: RouteConfig, fleet: Fleet, entries: Mapping[str, PolicyEntry]) -> None:
        self.prefill = self._selector("prefill", fleet.prefill, config, entries)
        self.decode = self._selector("decode", fleet.decode, config, entries)
        self.wants_prompt = self.decode.policy.wants_prompt or (
            bool(fleet.prefill) and self.prefill.policy.wants_prompt
        )
        self._ids = itertools.count(1)

    @staticmethod
    def _selector(
        pool: str, workers: list[Worker], config: RouteConfig, entries: Mapping[str, PolicyEntry]
    ) -> Selector:
        name = resolve(pool, config, entries)
        if name not in entries:
            raise ConfigError("--policy", "no routing policy is installed", "reinstall pd-serve")
        policy = entries[name].factory(PolicyContext(pool, {}, random.random, time.monotonic))
        if workers:
            log.info("routing_policy", pool=pool, policy=name, workers=len(workers))
        return Selector(pool, workers, name, policy)

    def describe(self, request: Request) -> RouteRequest:
        """What the policies get to see of a request. Parses the body only if one of them wants the prompt."""
        prompt = read_prompt(request.body) if self.wants_prompt else Prompt()
        return RouteRequest(next(self._ids), request.path, prompt.text, prompt.token_ids, HeaderMap(request.headers))
