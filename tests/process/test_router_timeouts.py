"""How long the router waits: for a worker that is silent, for a client that does not read, for what a client asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from router_kit import Call, FakeWorker, eventually, prefill_worker, routing, until_cut, workers

from pd.router import client as client_module

Run = Callable[..., Any]
PROMPT = b'{"prompt":"hello"}'


@pytest.fixture
def stall(monkeypatch: pytest.MonkeyPatch) -> float:
    """Of the bounds that no setting reaches: no grace for a silent worker, not more for an answer that is not streamed,
    and this long for a client that stalls.
    """
    original, seconds = client_module.Limits, 1.5

    def limits(**settings: Any) -> client_module.Limits:
        short = {"silence_grace": 0.0, "answer_timeout": settings["request_timeout"], "stall_timeout": seconds}
        return original(**{**settings, **short})

    monkeypatch.setattr("pd.router.service.Limits", limits)
    return seconds


async def silent(call: Call) -> None:
    await call.gone.wait()


def now() -> float:
    return asyncio.get_running_loop().time()


# --- the worker's silence --------------------------------------------------------------------------------------------


def test_a_hanging_worker_costs_its_time_and_two_seconds_and_no_more(
    run_async: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pd.router.service._LONGEST_WAIT", 0.0)

    async def main() -> None:
        decode, prefill = FakeWorker(script=silent), prefill_worker()
        async with workers(decode, prefill), routing([decode], [prefill], request_timeout=0.3) as gate:
            start = now()
            answer = await gate.post()
            assert 2.3 < now() - start < 4.0  # the worker's own answer would have been the better one
            assert (answer.status, answer.json["error"]["code"]) == (504, "timeout")
            assert answer.json["error"]["message"] == "nothing came from the decode instance for 0.3 s"
            async with asyncio.timeout(2.0):
                await decode.calls[0].gone.wait()

    run_async(main())


def test_a_stream_may_last_as_long_as_something_comes(run_async: Run, stall: float) -> None:
    async def main() -> None:
        async def steady(call: Call) -> None:
            await asyncio.sleep(0.3)
            call.start_events()
            for number in range(6):
                await asyncio.sleep(0.3)
                call.event(str(number))
            call.end()

        decode = FakeWorker(script=steady)
        async with workers(decode), routing([decode], request_timeout=0.8) as gate:
            start = now()
            answer = await gate.post()
            assert now() - start > 2.0
            assert answer.body.count(b"data: ") == 6

    run_async(main())


def test_an_answer_that_is_not_streamed_may_take_longer_than_a_stream_may_be_silent(run_async: Run) -> None:
    async def main() -> None:
        async def whole(call: Call) -> None:
            await asyncio.sleep(2.6)
            call.answer(200, b'{"whole":true}')

        decode = FakeWorker(script=whole)
        async with workers(decode), routing([decode], request_timeout=0.1) as gate:
            assert (await gate.post()).json == {"whole": True}

    run_async(main())


def test_a_stream_that_falls_silent_is_told_so(run_async: Run, stall: float) -> None:
    async def main() -> None:
        async def two(call: Call) -> None:
            call.start_events()
            call.event("one")
            await asyncio.sleep(0.3)
            call.event("two")
            await call.gone.wait()

        decode = FakeWorker(script=two)
        async with workers(decode), routing([decode], request_timeout=0.4) as gate:
            client = await gate.client()
            start = now()
            client.post()
            await client.head()
            *events, last = await until_cut(client)
            assert 0.7 < now() - start < 2.0
            assert b"".join(events) == b"data: one\n\ndata: two\n\n"
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
            async with asyncio.timeout(2.0):
                await decode.calls[0].gone.wait()

    run_async(main())


def test_a_decode_that_replaces_another_has_the_whole_time(run_async: Run, stall: float) -> None:
    async def main() -> None:
        async def die_late(call: Call) -> None:
            await asyncio.sleep(0.5)
            call.die()

        async def answer_late(call: Call) -> None:
            await asyncio.sleep(0.5)
            call.answer(200, b'{"late":true}')

        bad, good = FakeWorker(script=die_late), FakeWorker(script=answer_late)
        async with workers(bad, good), routing([bad, good], request_timeout=0.8, health_interval=30.0) as gate:
            assert (await gate.post()).json == {"late": True}

    run_async(main())


def test_a_request_that_follows_another_on_its_connection_has_its_own_time(run_async: Run, stall: float) -> None:
    async def main() -> None:
        async def script(call: Call) -> None:
            await (silent(call) if call.target == "/generate" else asyncio.sleep(0.3))
            call.answer()

        decode = FakeWorker(script=script)
        async with workers(decode), routing([decode], request_timeout=0.6) as gate:
            client = await gate.client()
            for headers in ((), ("x-request-timeout: 5",), ()):
                client.post("/v1/completions", PROMPT, *headers)
                assert (await client.answer()).status == 200
            client.post("/generate")
            start = now()
            assert (await client.answer()).status == 504
            assert 0.5 < now() - start < 2.0

    run_async(main())


# --- the client's own time -------------------------------------------------------------------------------------------


def test_a_client_that_asks_for_more_time_has_it(run_async: Run, stall: float) -> None:
    async def main() -> None:
        async def slow(call: Call) -> None:
            await asyncio.sleep(1.0)
            call.answer(200, b'{"slow":true}')

        decode = FakeWorker(script=slow)
        async with workers(decode), routing([decode], request_timeout=0.3) as gate:
            answer = await gate.post("/v1/completions", PROMPT, "x-request-timeout: 7200")
            assert answer.json == {"slow": True}
            assert decode.calls[0].headers["x-request-timeout"] == "7200"

    run_async(main())


def test_a_hanging_worker_costs_no_more_than_the_client_has_time_for(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker(script=silent)
        async with workers(decode), routing([decode], request_timeout=30.0) as gate:
            start = now()
            answer = await gate.post("/v1/completions", PROMPT, "X-Request-Timeout: 0.2")
            assert 0.6 < now() - start < 2.0
            assert (answer.status, answer.json["error"]["code"]) == (504, "timeout")
            assert answer.json["error"]["message"] == "the request took longer than 0.2 s"
            assert decode.calls[0].headers["x-request-timeout"] == "0.2"

    run_async(main())


def test_a_stream_ends_with_the_clients_time_however_much_comes(run_async: Run) -> None:
    async def main() -> None:
        async def endless(call: Call) -> None:
            call.start_events()
            while not call.gone.is_set():
                call.event("x")
                await asyncio.sleep(0.02)

        decode = FakeWorker(script=endless)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.post("/v1/completions", PROMPT, "x-request-timeout: 0.3")
            await client.head()
            events = await until_cut(client)
            assert json.loads(events[-1].removeprefix(b"data: "))["error"]["code"] == "timeout"
            async with asyncio.timeout(2.0):
                await decode.calls[0].gone.wait()

    run_async(main())


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", "1_0", "1e300"])
def test_a_malformed_timeout_is_for_the_worker_to_refuse(run_async: Run, value: str) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            header = f"X-Request-Timeout: {value}"
            answer = await gate.post("/v1/completions", PROMPT, header)
            assert (answer.status, answer.json["headers"]["x-request-timeout"]) == (200, value)

    run_async(main())


# --- a client that does not read -------------------------------------------------------------------------------------


async def flood(call: Call) -> None:
    """64 MiB, as fast as they are taken."""
    call.start_events()
    for _ in range(1024):
        await call.drain()
        if call.gone.is_set():
            return
        call.chunk(b"x" * 65536)
        await asyncio.sleep(0)
    call.end()


def test_a_client_that_does_not_read_is_not_taken_for_a_silent_worker(run_async: Run, stall: float) -> None:
    async def main() -> None:
        decode = FakeWorker(script=flood)
        async with workers(decode), routing([decode], request_timeout=0.3) as gate:
            client = await gate.client(limit=4096)
            client.post()
            await client.head()
            await asyncio.sleep(1.0)
            received = 0
            while piece := await client.chunk():
                received += len(piece)
            assert received == 64 << 20  # late, and all of it

    run_async(main(), 40.0)


def test_a_client_that_never_reads_does_not_hold_its_worker_for_ever(run_async: Run, stall: float) -> None:
    async def main() -> None:
        decode = FakeWorker(script=flood)
        async with workers(decode), routing([decode], request_timeout=0.3) as gate:
            client = await gate.client(limit=4096)
            start = now()
            client.post()
            await client.head()
            async with asyncio.timeout(8.0):
                await decode.calls[0].gone.wait()
            assert now() - start > stall
            await eventually(lambda: _nothing_active(gate))

    run_async(main())


async def _nothing_active(gate: Any) -> bool:
    return bool((await gate.get("/server_info")).json["active_requests"] == 0)
