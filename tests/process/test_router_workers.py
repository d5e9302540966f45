"""Health, draining, and what the router says of its workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from router_kit import Call, Entry, FakeWorker, First, Gate, eventually, prefill_worker, routing, workers

from pd.abc import RouteRequest, WorkerView
from pd.errors import ConfigError

Run = Callable[..., Any]


async def _health(gate: Gate, worker: FakeWorker, wanted: str) -> bool:
    return (await gate.worker(worker.url))["health"] == wanted


def test_a_hanging_worker_is_out_after_its_failures_and_back_with_the_first_success(run_async: Run) -> None:
    async def main() -> None:
        hanging, good = FakeWorker(), FakeWorker()
        settings = {"health_interval": 0.05, "health_timeout": 0.3, "health_failures": 3}
        async with workers(hanging, good), routing([hanging, good], **settings) as gate:
            assert (await gate.post()).status == 200 and len(hanging.calls) == 1
            hanging.hang = True
            await eventually(lambda: _health(gate, hanging, "out"))
            assert await gate.metric(f'pd_router_worker_up{{role="decode",worker="{hanging.url}"}}') == 0
            checks = good.checks
            await asyncio.sleep(1.0)
            assert good.checks >= checks + 5  # one that hangs delays nobody's checks
            assert (await gate.post()).status == 200 and len(good.calls) == 1
            hanging.hang = False
            await eventually(lambda: _health(gate, hanging, "healthy"))
            assert (await gate.post()).status == 200 and len(hanging.calls) == 2

    run_async(main())


def test_one_failed_check_takes_nobody_out(run_async: Run) -> None:
    async def main() -> None:
        flaky = FakeWorker()
        async with workers(flaky), routing([flaky], health_failures=2, health_interval=0.2) as gate:
            for _ in range(3):
                flaky.health, checks = 500, flaky.checks
                await eventually(lambda checks=checks: flaky.checks > checks)
                flaky.health, checks = 200, flaky.checks
                assert (await gate.post()).status == 200
                await eventually(lambda checks=checks: flaky.checks > checks)
            assert await _health(gate, flaky, "healthy")

    run_async(main())


def test_a_suspect_worker_is_checked_at_once_and_used_again(run_async: Run) -> None:
    async def main() -> None:
        async def die_once(call: Call) -> None:
            if len(suspect.calls) <= 2:
                call.die()
            else:
                call.answer()

        suspect, other = FakeWorker(script=die_once), FakeWorker()
        async with workers(suspect, other), routing([suspect, other], health_interval=5.0) as gate:
            assert (await gate.post()).status == 200
            assert len(other.calls) == 1
            await eventually(lambda: _health(gate, suspect, "healthy"), 2.0)  # far less than health_interval
            assert (await gate.post()).status == 200
            assert len(other.calls) == 1 and len(suspect.calls) == 3

    run_async(main())


def test_a_lone_suspect_is_better_than_none(run_async: Run) -> None:
    async def main() -> None:
        async def die_twice(call: Call) -> None:
            if len(decode.calls) <= 2:
                call.die()
            else:
                call.answer()

        decode = FakeWorker(script=die_twice)
        async with workers(decode), routing([decode], health_interval=30.0) as gate:
            statuses = [(await gate.post()).status for _ in range(3)]
            assert statuses in ([502, 200, 200], [502, 502, 200])

    run_async(main())


def test_a_draining_worker_gets_no_new_requests_and_finishes_its_own(run_async: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def wait(call: Call) -> None:
            await go.wait()
            call.answer()

        draining, other, prefill = FakeWorker(script=wait), FakeWorker(), prefill_worker()
        async with workers(draining, other, prefill), routing([draining, other], [prefill]) as gate:
            client = await gate.client()
            client.post()
            await eventually(lambda: draining.calls)
            draining.state, draining.health = "draining", 503

            async def noticed() -> bool:
                return (await gate.worker(draining.url))["state"] == "draining"

            await eventually(noticed)
            assert (await gate.post()).status == 200
            assert (len(draining.calls), len(other.calls)) == (1, 1)
            prefill.state = "draining"
            await eventually(lambda: _no_header(gate))
            go.set()
            assert (await client.answer()).status == 200

    run_async(main())


async def _no_header(gate: Gate) -> bool:
    return "x-pd-prefill" not in (await gate.post()).json["headers"]


def test_a_worker_of_the_wrong_kind_is_not_routed_to(run_async: Run) -> None:
    async def main() -> None:
        wrong_decode, decode = prefill_worker(), FakeWorker()
        wrong_prefill, prefill = FakeWorker("unified"), prefill_worker(1)
        async with (
            workers(wrong_decode, decode, wrong_prefill, prefill),
            routing([wrong_decode, decode], [wrong_prefill, prefill]) as gate,
        ):
            headers = (await gate.post()).json["headers"]
            assert headers["x-pd-prefill"] == prefill.control_endpoint
            assert not wrong_decode.calls
            assert not (await gate.worker(wrong_decode.url))["routable"]

    run_async(main())


@pytest.mark.parametrize(
    ("reported", "port", "expected"),
    [
        ("tcp://127.0.0.1:8998", 0, "tcp://127.0.0.1:8998"),
        ("tcp://127.0.0.1:8998", 7000, "tcp://127.0.0.1:7000"),
        ("tcp://0.0.0.0:8998", 0, "tcp://127.0.0.1:8998"),
        ("tcp://[::]:8998", 0, "tcp://127.0.0.1:8998"),
        ("tcp://[fe80::1]:8998", 0, "tcp://[fe80::1]:8998"),
        ("", 7000, "tcp://127.0.0.1:7000"),
        ("tcp://[nonsense:1", 7000, "tcp://127.0.0.1:7000"),
        ("tcp://h\u00f6st,evil:1", 0, "tcp://127.0.0.1:1"),
        ("", 0, None),
    ],
)
def test_the_control_endpoint_is_the_reported_one_unless_the_user_gave_a_port(
    run_async: Run, reported: str, port: int, expected: str | None
) -> None:
    async def main() -> None:
        decode, prefill = FakeWorker(), FakeWorker("prefill", control_endpoint=reported)
        async with workers(decode, prefill), routing([decode], [prefill], prefill_bootstrap_ports=(port,)) as gate:
            assert (await gate.post()).json["headers"].get("x-pd-prefill") == expected

    run_async(main())


def test_health_says_whether_a_request_could_be_served(run_async: Run) -> None:
    async def main() -> None:
        decode, prefill = FakeWorker(local_prefill="never"), prefill_worker()
        async with workers(decode, prefill), routing([decode], [prefill]) as gate:
            answer = await gate.get("/health")
            assert answer.status == 200
            assert answer.json == {
                "status": "ok",
                "prefill": {"healthy": 1, "total": 1},
                "decode": {"healthy": 1, "total": 1},
            }
            await prefill.stop()
            await eventually(lambda: _answers(gate, 503))  # this decode prefills nothing itself
            decode.local_prefill = "fallback"
            await eventually(lambda: _answers(gate, 200))
            await decode.stop()
            await eventually(lambda: _answers(gate, 503))
            assert (await gate.get("/health")).json["decode"] == {"healthy": 0, "total": 1}

    run_async(main())


async def _answers(gate: Gate, status: int) -> bool:
    return (await gate.get("/health")).status == status


def test_models_are_the_union_and_operations_reach_every_worker(run_async: Run) -> None:
    async def main() -> None:
        async def flush(call: Call) -> None:
            call.answer(200 if call.target.startswith("/flush") else 500, b'{"model_path":"m"}')

        decodes = [FakeWorker(models=("a", "b"), script=flush), FakeWorker(models=("b", "c"), script=flush)]
        prefill = prefill_worker(models=("a",), script=flush)
        async with workers(*decodes, prefill), routing(decodes, [prefill]) as gate:
            models = (await gate.get("/v1/models")).json
            assert [model["id"] for model in models["data"]] == ["a", "b", "c"]
            answer = await gate.get("/flush_cache?timeout=1", "POST")
            assert answer.status == 200 and answer.json["success"]
            assert {call.target for worker in (*decodes, prefill) for call in worker.calls} == {
                "/flush_cache?timeout=1"
            }
            answer = await gate.post("/pause_generation", b'{"mode":"retract"}')
            assert answer.status == 502 and set(answer.json["workers"].values()) == {500}
            assert decodes[0].calls[-1].body == b'{"mode":"retract"}'
            await decodes[0].stop()
            answer = await gate.get("/flush_cache")
            assert answer.status == 502 and answer.json["workers"][prefill.url] == 200

    run_async(main())


def test_server_info_and_model_info_come_from_the_workers(run_async: Run) -> None:
    async def main() -> None:
        async def info(call: Call) -> None:
            call.answer(200, json.dumps({"asked": call.target}).encode())

        decode = FakeWorker(script=info, load={"running": 3, "waiting": 2, "free_blocks": 1, "unknown": 9})
        async with workers(decode), routing([decode]) as gate:
            for path in ("/server_info", "/get_server_info"):
                known = (await gate.get(path)).json
                (worker,) = known["workers"]
                assert worker["load"] == {
                    "running": 3,
                    "waiting": 2,
                    "free_blocks": 1,
                    "total_blocks": 0,
                    "queued_tokens": 0,
                }
                assert worker["load_age"] < 5 and worker["routable"] and known["decode"][0]["role"] == "decode"
            for path in ("/model_info", "/get_model_info"):
                assert (await gate.get(path)).json == {"asked": path}
            assert (await gate.get("/health_generate")).json == {"asked": "/health_generate"}

    run_async(main())


def test_policies_see_load_its_age_and_what_is_in_flight(run_async: Run) -> None:
    async def main() -> None:
        seen: list[tuple[WorkerView, ...]] = []

        class Watch(First):
            def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
                seen.append(tuple(workers))
                return super().choose(request, workers)

        async def hold(call: Call) -> None:
            await call.gone.wait()

        busy, dumb = FakeWorker(script=hold, load={"running": 7}), FakeWorker(load=None)
        table = {"random": Entry(Watch)}
        async with workers(busy, dumb), routing([busy, dumb], policies=table, health_interval=0.5) as gate:
            for count in (1, 2, 3):
                client = await gate.client()
                client.post()
                await eventually(lambda count=count: len(seen) == count)
            views = seen[-1]
            assert [view.url for view in views] == [busy.url, dumb.url]
            assert [view.in_flight for view in views] == [2, 0]
            assert views[0].load is not None and views[0].load.running == 7 and views[0].load_age < 1.0
            assert views[1].load is None

    run_async(main())


def test_a_pools_own_policy_wins_and_an_unknown_one_is_refused_by_name(run_async: Run) -> None:
    async def main() -> None:
        decode, prefill = FakeWorker(), prefill_worker()
        table = {"random": Entry(First), "alpha": Entry(First, prefer="prefill"), "beta": Entry(First)}
        async with workers(decode, prefill):
            for settings, expected in (
                ({}, ("alpha", "random")),
                ({"policy": "beta"}, ("beta", "beta")),
                ({"policy": "beta", "decode_policy": "alpha"}, ("beta", "alpha")),
            ):
                async with routing([decode], [prefill], policies=table, **settings) as gate:
                    policies = (await gate.get("/server_info")).json["policies"]
                    assert (policies["prefill"], policies["decode"]) == expected
            with pytest.raises(BaseExceptionGroup) as caught:
                async with routing([decode], policies=table, decode_policy="gamma"):
                    pass
            leaf: BaseException = caught.value
            while isinstance(leaf, BaseExceptionGroup):
                (leaf,) = leaf.exceptions
            assert isinstance(leaf, ConfigError) and leaf.field == "--decode-policy"
            assert "alpha, beta, random" in str(leaf) and "pip install pd-policies" in str(leaf)

    run_async(main())


@pytest.mark.parametrize(
    "nonsense", [b"\xff", b'{"role": "\xff"}', b"[1]", b"[" * 100_000, b'{"state": [], "load": 1}']
)
def test_a_worker_that_says_nonsense_of_itself_harms_nobody(run_async: Run, nonsense: bytes) -> None:
    async def main() -> None:
        class Odd(FakeWorker):
            async def handle(self, call: Call) -> None:
                if call.target in ("/server_info", "/v1/models", "/v1/loads", "/get_load"):
                    call.answer(200, nonsense)
                else:
                    await super().handle(call)

        odd, good = Odd(), FakeWorker()
        async with workers(odd, good), routing([odd, good]) as gate:
            assert (await gate.post()).status == 200
            assert [m["id"] for m in (await gate.get("/v1/models")).json["data"]] == ["tiny"]
            assert (await gate.get("/v1/loads")).status == (await gate.get("/get_load")).status == 200
            checks = odd.checks
            await eventually(lambda: odd.checks > checks + 1)

    run_async(main())
