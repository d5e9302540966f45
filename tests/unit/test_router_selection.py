"""Who may be chosen, what a lease counts, which policy a pool gets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_kit import Entry, First

from pd.abc import PolicyContext, RouteRequest, WorkerView
from pd.config import RouteConfig
from pd.errors import ConfigError
from pd.router.selection import PolicyError, Selection, Selector, resolve
from pd.router.workers import Fleet, Health, Worker
from pd.types import InstanceState, Load

READY = {"role": "decode", "state": "ready"}
REQUEST = RouteRequest(1, "/generate")


def fleet(decodes: int = 3, prefills: int = 0) -> Fleet:
    made = Fleet(
        RouteConfig(
            decode=tuple(f"http://d{n}:1" for n in range(decodes)),
            prefill=tuple(f"http://p{n}:1" for n in range(prefills)),
        )
    )
    for worker in made.decode:
        worker.passed(READY, 0.0)
    for n, worker in enumerate(made.prefill):
        worker.passed({"role": "prefill", "state": "ready", "control_endpoint": f"tcp://p{n}:2"}, 0.0)
    return made


def selector(workers: list[Worker], policy: First | None = None) -> Selector:
    return Selector("decode", workers, "test", policy or First(PolicyContext("decode")))


def test_a_lease_counts_once_however_often_it_ends() -> None:
    workers, policy = fleet().decode, First(PolicyContext("decode"))
    lease = selector(workers, policy).choose(REQUEST)
    assert lease is not None and (lease.worker.in_flight, policy.open) == (1, 1)
    for _ in range(3):
        lease.end()
    assert (lease.worker.in_flight, policy.open) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60))
def test_in_flight_is_the_number_of_open_leases_whatever_the_order(steps: list[tuple[int, bool]]) -> None:
    workers, policy = fleet().decode, First(PolicyContext("decode"))
    chooser, leases = selector(workers, policy), []
    for position, (skip, end) in enumerate(steps):
        lease = chooser.choose(REQUEST, workers[:skip])
        assert lease is not None
        leases.append(lease)
        if end:
            leases.pop(position % len(leases)).end()
        for worker in workers:
            assert worker.in_flight == sum(lease.worker is worker for lease in leases)
            assert worker.view(0.0).in_flight == worker.in_flight
        assert policy.open == len(leases)


def test_only_the_healthy_are_candidates_and_suspects_only_where_nobody_is_healthy() -> None:
    workers = fleet(4).decode
    assert Fleet.candidates(workers) == workers
    workers[0].suspect("reset")
    workers[1].passed({**READY, "state": "draining"}, 0.0)
    workers[2].passed({**READY, "role": "prefill"}, 0.0)
    assert Fleet.candidates(workers) == [workers[3]]
    workers[3].failed("x", 1)
    assert workers[3].health is Health.OUT
    assert Fleet.candidates(workers) == [workers[0]]
    workers[0].failed("x", 2)
    workers[0].failed("x", 2)
    assert Fleet.candidates(workers) == []
    assert selector(workers).choose(REQUEST) is None


def test_failures_count_in_a_row_only() -> None:
    worker = fleet().decode[0]
    for _ in range(5):
        worker.failed("x", 2)
        assert worker.health is Health.HEALTHY
        worker.passed(READY, 0.0)
    worker.failed("x", 2)
    worker.failed("x", 2)
    assert worker.health is Health.OUT
    worker.suspect("a late failure on the request path")
    assert worker.health is Health.OUT
    worker.passed(READY, 0.0)
    assert worker.health is Health.HEALTHY and worker.routable


def test_a_worker_that_was_never_checked_gets_nothing() -> None:
    made = Fleet(RouteConfig(decode=("http://d:1",)))
    assert Fleet.candidates(made.decode) == [] and not made.ready
    made.decode[0].suspect("refused")
    assert Fleet.candidates(made.decode) == []


def test_an_instance_that_is_still_starting_gets_nothing() -> None:
    worker = fleet().decode[0]
    worker.passed({**READY, "state": "starting"}, 0.0)
    assert worker.state is InstanceState.STARTING and not worker.routable


def test_what_a_worker_said_is_kept_when_it_says_nothing_and_nonsense_is_no_load() -> None:
    worker = fleet().decode[0]
    worker.passed({**READY, "load": {"running": 3}}, 10.0)
    assert worker.view(11.0).load == Load(running=3) and worker.view(11.0).load_age == 1.0
    worker.passed({}, 20.0)
    worker.passed({**READY, "load": {"running": "many"}}, 21.0)
    worker.passed({**READY, "load": 7}, 22.0)
    assert worker.view(25.0).load == Load(running=3) and worker.view(25.0).load_age == 15.0
    worker.passed({**READY, "load": {"running": 4}}, 30.0)
    assert worker.view(30.0).load == Load(running=4) and worker.view(30.0).load_age == 0.0


def test_alternatives_are_the_least_busy_others() -> None:
    workers = fleet(5).decode
    for worker, count in zip(workers, (0, 3, 1, 0, 2), strict=True):
        for _ in range(count):
            worker.acquire()
    assert selector(workers).alternatives(workers[0]) == [workers[3], workers[2]]
    assert selector(workers[:1]).alternatives(workers[0]) == []


@dataclass
class Picky(First):
    answer: object = None

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize("answer", [None, WorkerView("http://d0:1", "decode", 0), KeyError("k")])
def test_a_policy_that_breaks_its_contract_is_named_and_counts_nothing(answer: object) -> None:
    workers = fleet().decode
    with pytest.raises(PolicyError, match="routing policy test"):
        selector(workers, Picky(answer)).choose(REQUEST)
    assert [worker.in_flight for worker in workers] == [0, 0, 0]


def test_a_policy_that_fails_when_told_of_the_end_does_not_keep_the_count() -> None:
    class Bad(First):
        def finished(self, request: RouteRequest, worker: WorkerView) -> None:
            raise RuntimeError("bad day")

    workers = fleet().decode
    lease = selector(workers, Bad(PolicyContext("decode"))).choose(REQUEST)
    assert lease is not None
    lease.end()
    assert workers[0].in_flight == 0


@pytest.mark.parametrize(
    ("settings", "prefill", "decode"),
    [
        ({}, "cachy", "random"),
        ({"policy": "plain"}, "plain", "plain"),
        ({"prefill_policy": "plain"}, "plain", "random"),
        ({"policy": "cachy", "decode_policy": "plain"}, "cachy", "plain"),
    ],
)
def test_a_pools_own_flag_beats_the_common_one_which_beats_preference(
    settings: dict[str, str], prefill: str, decode: str
) -> None:
    table = {"random": Entry(First), "plain": Entry(First), "cachy": Entry(First, prefer="prefill")}
    config = RouteConfig(**settings)
    assert (resolve("prefill", config, table), resolve("decode", config, table)) == (prefill, decode)


@pytest.mark.parametrize(
    ("settings", "flag"), [({"policy": "x"}, "--policy"), ({"prefill_policy": "x"}, "--prefill-policy")]
)
def test_an_unknown_policy_is_refused_naming_flag_choices_and_package(settings: dict[str, str], flag: str) -> None:
    with pytest.raises(ConfigError, match=r"known: plain, random; .*pip install pd-policies") as caught:
        resolve("prefill", RouteConfig(**settings), {"random": Entry(First), "plain": Entry(First)})
    assert caught.value.field == flag


def test_the_prompt_is_wanted_only_if_a_policy_of_a_pool_with_workers_wants_it() -> None:
    class Reader(First):
        wants_prompt = True

    table = {"random": Entry(First), "reader": Entry(Reader)}
    for prefills, settings, wanted in (
        (1, {}, False),
        (1, {"prefill_policy": "reader"}, True),
        (0, {"prefill_policy": "reader"}, False),
        (0, {"decode_policy": "reader"}, True),
    ):
        made = fleet(1, prefills)
        assert Selection(RouteConfig(**settings), made, table).wants_prompt is wanted


def test_random_draws_every_worker_about_equally_often() -> None:
    from pd.router.plugin import Random

    workers = fleet(4).decode
    policy = Random(PolicyContext("decode", {}, random.Random(1).random))
    views = [worker.view(0.0) for worker in workers]
    counts = [0] * 4
    for _ in range(4000):
        counts[views.index(policy.choose(REQUEST, views))] += 1
    assert min(counts) > 900
