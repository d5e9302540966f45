"""Workers that fail: replaced before the client has seen a byte, told in the stream afterwards, never waited for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from router_kit import Call, Entry, FakeWorker, First, echo, eventually, prefill_worker, routing, until_cut, workers

from pd.abc import RouteRequest, WorkerView

Run = Callable[..., Any]


async def die(call: Call) -> None:
    call.die()


async def busy(call: Call) -> None:
    call.answer(503, b'{"error":{"code":"overloaded"}}', "retry-after: 7")


async def half_a_head(call: Call) -> None:
    call.write(b"HTTP/1.1 200 OK\r\ncontent-ty")
    await asyncio.sleep(0.01)
    call.die()


async def garbage(call: Call) -> None:
    call.write(b"\x00\x01 this is not HTTP\r\n\r\n")


async def silent(call: Call) -> None:
    await call.gone.wait()


@pytest.mark.parametrize("failure", [die, busy, half_a_head, garbage])
def test_a_decode_that_fails_before_the_first_byte_is_replaced_once_each(run_async: Run, failure: Any) -> None:
    async def main() -> None:
        bad = [FakeWorker(script=failure), FakeWorker(script=failure)]
        good, prefill = FakeWorker(), prefill_worker()
        async with workers(*bad, good, prefill), routing([*bad, good], [prefill], health_interval=30.0) as gate:
            body = b'{"prompt":"' + b"p" * 100_000 + b'"}'
            answer = await gate.post("/v1/completions", body)
            assert answer.status == 200
            assert answer.json["body"] == body.decode()
            assert answer.json["headers"]["x-pd-prefill"] == prefill.control_endpoint
            # A connection that dies at once may have been stale: then the same worker is asked again, on a new one.
            limit = 2 if failure is die else 1
            assert all(1 <= len(worker.calls) <= limit for worker in bad) and len(good.calls) == 1
            assert await gate.metric("pd_router_retries_total") == 2

    run_async(main())


def test_a_decode_that_refuses_connections_is_replaced_and_suspect_at_once(run_async: Run) -> None:
    async def main() -> None:
        dead, good = FakeWorker(), FakeWorker()
        async with workers(dead, good), routing([dead, good], health_interval=30.0) as gate:
            await dead.stop()
            client = await gate.client()
            for _ in range(5):
                client.post()
                assert (await client.answer()).status == 200
            assert len(good.calls) == 5
            assert await gate.metric("pd_router_retries_total") == 1  # the next ones did not even try
            assert (await gate.worker(dead.url))["health"] in ("suspect", "out")

    run_async(main())


def test_when_every_decode_is_busy_the_last_answer_passes_through(run_async: Run) -> None:
    async def main() -> None:
        decodes = [FakeWorker(script=busy), FakeWorker(script=busy)]
        async with workers(*decodes), routing(decodes) as gate:
            answer = await gate.post()
            assert (answer.status, answer.json["error"]["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "7"
            assert [len(decode.calls) for decode in decodes] == [1, 1]
            assert [(await gate.worker(decode.url))["health"] for decode in decodes] == ["healthy", "healthy"]

    run_async(main())


def test_when_every_decode_dies_the_client_gets_502_and_when_none_is_there_503(run_async: Run) -> None:
    async def main() -> None:
        decodes = [FakeWorker(script=die), FakeWorker(script=die)]
        async with workers(*decodes), routing(decodes, health_interval=30.0) as gate:
            answer = await gate.post()
            assert (answer.status, answer.json["error"]["code"]) == (502, "worker_failed")
            for decode in decodes:
                await decode.stop()
            answer = await gate.post()
            assert (answer.status, answer.json["error"]["code"]) == (503, "no_worker")
            assert answer.json["error"]["type"] == "server_error"

    run_async(main())


def test_a_stale_connection_is_retried_on_the_same_worker(run_async: Run) -> None:
    async def main() -> None:
        async def once_per_connection(call: Call) -> None:
            first = not hasattr(call.connection, "used")
            call.connection.used = True  # type: ignore[attr-defined]
            if first:
                await echo(call)
            else:
                call.die()  # what a worker's keep-alive timeout looks like when the request is already on its way

        decode = FakeWorker(script=once_per_connection)
        async with workers(decode), routing([decode], health_interval=30.0) as gate:
            for _ in range(6):
                assert (await gate.post()).status == 200
            assert await gate.metric("pd_router_retries_total") == 0
            assert (await gate.worker(decode.url))["health"] == "healthy"

    run_async(main())


@pytest.mark.parametrize("boundary", [True, False], ids=["after an event", "within an event"])
def test_a_stream_that_its_worker_abandons_ends_with_an_error_event_and_no_proper_end(
    run_async: Run, boundary: bool
) -> None:
    async def main() -> None:
        async def abandon(call: Call) -> None:
            call.start_events()
            call.event("one")
            if not boundary:
                call.chunk(b"data: tw")
            await asyncio.sleep(0.02)
            call.die()

        decode, spare = FakeWorker(script=abandon), FakeWorker()
        async with workers(decode, spare), routing([decode, spare], health_interval=30.0) as gate:
            client = await gate.client()
            client.post()
            assert (await client.head()).status == 200
            events = await until_cut(client)
            lines = b"".join(events).split(b"\n\n")
            assert lines[0] == b"data: one"
            assert json.loads(lines[-2].removeprefix(b"data: "))["error"]["code"] == "worker_failed"
            assert len(lines) == (3 if boundary else 4)
            assert not spare.calls
            assert await gate.metric("pd_router_broken_streams_total") == 1
            assert (await gate.worker(decode.url))["health"] != "out"

    run_async(main())


def test_a_stream_cut_within_a_chunk_gets_no_event_that_would_be_read_as_its_rest(run_async: Run) -> None:
    async def main() -> None:
        async def cut(call: Call) -> None:
            call.start_events()
            call.write(b"40\r\ndata: half")
            await asyncio.sleep(0.02)
            call.die()

        decode = FakeWorker(script=cut)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.post()
            await client.head()
            assert await client.reader.read() == b"40\r\ndata: half"

    run_async(main())


def test_a_body_with_a_length_that_is_cut_off_is_cut_off_for_the_client_too(run_async: Run) -> None:
    async def main() -> None:
        async def cut(call: Call) -> None:
            call.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort")
            await asyncio.sleep(0.02)
            call.die()

        decode = FakeWorker(script=cut)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.post()
            with pytest.raises(asyncio.IncompleteReadError) as cut_off:
                await client.answer()
            assert cut_off.value.partial == b"short"

    run_async(main())


def test_bytes_after_the_end_of_an_answer_reach_nobody(run_async: Run) -> None:
    async def main() -> None:
        async def smuggle(call: Call) -> None:
            call.answer(200, b"{}")
            call.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")

        decode = FakeWorker(script=smuggle)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            for _ in range(3):
                client.post()
                try:
                    answer = await client.answer()
                except asyncio.IncompleteReadError:
                    client = await gate.client()
                    continue
                assert answer.body == b"{}"

    run_async(main())


def test_a_worker_that_accepts_no_connection_is_given_up_after_the_connect_timeout(run_async: Run) -> None:
    async def main() -> None:
        full, good = FakeWorker(), FakeWorker()
        async with workers(full, good), routing([full, good], connect_timeout=0.2, health_interval=30.0) as gate:
            await full.stop()
            # A listener whose queue is full does not answer: connecting hangs.
            plugs = []
            import socket

            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", full.port))
            listener.listen(0)
            try:
                for _ in range(4):
                    plug = socket.socket()
                    plug.setblocking(False)
                    plug.connect_ex(("127.0.0.1", full.port))
                    plugs.append(plug)
                start = asyncio.get_running_loop().time()
                assert (await gate.post()).status == 200
                assert 0.15 < asyncio.get_running_loop().time() - start < 1.5
                assert len(good.calls) == 1
            finally:
                for plug in (*plugs, listener):
                    plug.close()

    run_async(main())


def test_a_disconnect_while_connecting_leaves_nothing_behind(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode], health_interval=30.0) as gate:
            for _ in range(30):
                client = await gate.client()
                client.post()
                await asyncio.sleep(0)
                client.close()
            await gate.audit()
            assert (await gate.post()).status == 200

    run_async(main())


def test_without_a_healthy_prefill_the_request_goes_on_without_the_header(run_async: Run) -> None:
    async def main() -> None:
        decode, prefill = FakeWorker(), prefill_worker()
        async with workers(decode, prefill), routing([decode], [prefill]) as gate:
            assert "x-pd-prefill" in (await gate.post()).json["headers"]
            await prefill.stop()
            await eventually(lambda: _health(gate, prefill, "out"))
            assert "x-pd-prefill" not in (await gate.post()).json["headers"]

    run_async(main())


def test_a_unified_worker_gets_no_prefill_header_and_occupies_no_prefill(run_async: Run) -> None:
    async def main() -> None:
        unified, prefill = FakeWorker("unified", script=silent), prefill_worker()
        async with workers(unified, prefill), routing([unified], [prefill]) as gate:
            client = await gate.client()
            client.post()
            await eventually(lambda: unified.calls)
            assert "x-pd-prefill" not in unified.calls[0].headers
            assert (await gate.worker(prefill.url))["in_flight"] == 0
            assert (await gate.worker(unified.url))["in_flight"] == 1

    run_async(main())


def test_alternative_prefills_are_the_least_busy_others(run_async: Run) -> None:
    async def main() -> None:
        decode, prefills = FakeWorker(script=silent), [prefill_worker(n) for n in range(4)]

        class Numbered(First):
            def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
                super().choose(request, workers)
                return workers[int(request.headers.get("x-wanted", "0")) % len(workers)]

        async with (
            workers(decode, *prefills),
            routing([decode], prefills, policies={"random": Entry(Numbered)}) as gate,
        ):
            for wanted in (1, 1, 2, 0):
                client = await gate.client()
                client.post("/generate", b"{}", f"x-wanted: {wanted}")
                await eventually(lambda client=client: len(decode.calls) == len(gate.clients) - 0)
            order = decode.calls[-1].headers["x-pd-prefill"].split(",")
            # in flight when the last one was chosen: 0, 2, 1, 0
            assert order == [prefills[n].control_endpoint for n in (0, 3, 2)]

    run_async(main())


def test_a_policy_that_raises_or_invents_workers_fails_its_request_and_says_whose_fault_it_is(run_async: Run) -> None:
    async def main() -> None:
        class Broken(First):
            def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
                if request.path == "/generate":
                    raise ZeroDivisionError("oops")
                return WorkerView("http://elsewhere:1", "decode", 0)

        decode = FakeWorker()
        async with workers(decode), routing([decode], policies={"random": Entry(Broken)}) as gate:
            for path, words in (("/generate", "ZeroDivisionError: oops"), ("/v1/completions", "elsewhere")):
                answer = await gate.post(path)
                assert answer.status == 500 and words in answer.json["error"]["message"]
            assert not decode.calls

    run_async(main())


async def _health(gate: Any, worker: FakeWorker, wanted: str) -> bool:
    return (await gate.worker(worker.url))["health"] == wanted
