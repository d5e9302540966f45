"""The data path of `pd route` over real sockets: what is forwarded, how soon, and with how much memory."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

from router_kit import Call, Client, Entry, FakeWorker, First, echo, eventually, prefill_worker, routing, workers

from pd.router.plugin import Random

Run = Callable[..., Any]


def test_a_request_reaches_the_decode_unchanged_with_the_prefills_named_in_order(run_async: Run) -> None:
    async def main() -> None:
        decode, prefills = FakeWorker(), [prefill_worker(n) for n in range(4)]
        async with workers(decode, *prefills), routing([decode], prefills) as gate:
            body = b'{"prompt": "a",  "unknown": [1, null], "rid": "r"}'
            answer = await gate.post("/v1/chat/completions?x=1", body, "content-type: application/json", "x-foo: bar")
            seen = answer.json
            assert answer.status == 200
            assert seen["body"] == body.decode() and seen["target"] == "/v1/chat/completions?x=1"
            assert seen["headers"]["x-foo"] == "bar" and seen["headers"]["content-type"] == "application/json"
            assert seen["headers"]["host"] == decode.url.removeprefix("http://")
            endpoints = seen["headers"]["x-pd-prefill"].split(",")
            assert endpoints == [prefill.control_endpoint for prefill in prefills[:3]]
            assert not any(prefill.calls for prefill in prefills)

    run_async(main())


def test_inbound_pd_and_hop_headers_are_stripped_also_from_trailers(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            answer = await gate.post(
                "/generate",
                b"{}",
                "X-PD-Prefill: tcp://evil:1",
                "x-pd-other: 1",
                "Connection: keep-alive, x-private",
                "X-Private: 1",
                "TE: trailers",
            )
            headers = answer.json["headers"]
            assert not any(name.startswith("x-pd-") for name in headers)
            assert not {"connection", "x-private", "te"} & headers.keys()
            client = await gate.client()
            client.send(
                b"POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n"
                b"2\r\n{}\r\n0\r\nx-pd-prefill: tcp://evil:1\r\nx-tenant: evil\r\n\r\n"
            )
            answer = await client.answer()
            assert answer.json["body"] == "{}"
            assert not {"x-pd-prefill", "x-tenant"} & answer.json["headers"].keys()

    run_async(main())


def test_a_request_id_is_minted_where_absent_and_kept_where_given(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            given = await gate.post("/generate", b"{}", "x-request-id: mine")
            assert given.json["headers"]["x-request-id"] == "mine" == given.headers["x-request-id"]
            minted = {(await gate.post()).headers["x-request-id"] for _ in range(3)}
            assert len(minted) == 3
            assert all(call.headers["x-request-id"] in minted for call in decode.calls[1:])

    run_async(main())


def test_the_prefill_used_and_a_workers_4xx_pass_through_and_leave_its_health_alone(run_async: Run) -> None:
    async def main() -> None:
        async def refuse(call: Call) -> None:
            call.answer(422, b'{"error":"no"}', "x-pd-prefill-used: tcp://127.0.0.1:8999", "x-custom: 1")

        decode = FakeWorker(script=refuse)
        async with workers(decode), routing([decode]) as gate:
            for _ in range(10):
                answer = await gate.post()
                assert (answer.status, answer.body) == (422, b'{"error":"no"}')
                assert answer.headers["x-pd-prefill-used"] == "tcp://127.0.0.1:8999"
                assert answer.headers["x-custom"] == "1"
            assert (await gate.worker(decode.url))["health"] == "healthy"
            assert len(decode.calls) == 10

    run_async(main())


def test_events_are_relayed_as_they_come(run_async: Run) -> None:
    async def main() -> None:
        steps: asyncio.Queue[str] = asyncio.Queue()

        async def stream(call: Call) -> None:
            call.start_events()
            while text := await steps.get():
                call.event(text)
            call.end()

        decode = FakeWorker(script=stream)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.post()
            head = await client.head()
            assert head.headers["content-type"] == "text/event-stream"
            loop, delays = asyncio.get_running_loop(), []
            for number in range(30):
                start = loop.time()
                steps.put_nowait(str(number))
                assert await client.chunk() == f"data: {number}\n\n".encode()
                delays.append(loop.time() - start)
            steps.put_nowait("")
            assert await client.chunk() == b""
            assert sorted(delays)[15] < 0.02  # Nagle and delayed acknowledgements would add 40 ms to each

    run_async(main())


def test_both_sides_have_no_delay(run_async: Run) -> None:
    """asyncio sets TCP_NODELAY by itself on some loops only; here it must hold on every socket of the router."""

    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.post()
            await client.answer()
            ports = {gate.port, decode.port}
            router_sockets = [
                sock for sock in _sockets_of_this_process() if sock["local"] == gate.port or sock["remote"] in ports
            ]
            ends = [s for s in router_sockets if s["local"] == gate.port or s["remote"] == decode.port]
            assert {s["local"] == gate.port for s in ends} == {True, False}
            assert all(sock["nodelay"] for sock in ends)

    run_async(main())


def _sockets_of_this_process() -> list[dict[str, Any]]:
    """Connected TCP sockets: both ends, since workers, router and client share this process."""
    import os

    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with sock:
            try:
                if sock.family != socket.AF_INET or sock.type != socket.SOCK_STREAM:
                    continue
                found.append(
                    {
                        "local": sock.getsockname()[1],
                        "remote": sock.getpeername()[1],
                        "nodelay": bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)),
                    }
                )
            except OSError:
                continue
    return found


def test_a_client_that_does_not_read_stops_the_worker_and_costs_bounded_memory(run_async: Run) -> None:
    async def main() -> None:
        sent, total = 0, 64 << 20
        block = b"x" * 65536

        async def flood(call: Call) -> None:
            nonlocal sent
            call.start_events()
            while sent < total and not call.gone.is_set():
                await call.drain()
                call.chunk(block)
                sent += len(block)
                await asyncio.sleep(0)
            call.end()

        decode = FakeWorker(script=flood)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client(limit=4096)
            client.post()
            await client.head()
            before = -1
            while before != sent:  # until nothing moves any more
                before = sent
                await asyncio.sleep(0.2)
            assert 0 < sent < 24 << 20  # kernel buffers of four sockets, and what the router holds
            received = 0
            while piece := await client.chunk():
                received += len(piece)
            assert received == total == sent  # paused, not lost

    run_async(main(), 40.0)


def test_a_connection_paused_by_its_last_client_works_for_the_next(run_async: Run) -> None:
    async def main() -> None:
        big = b"y" * (8 << 20)

        async def script(call: Call) -> None:
            call.answer(200, big if call.target == "/generate" else b"{}")

        decode = FakeWorker(script=script)
        async with workers(decode), routing([decode]) as gate:
            for _ in range(3):
                answer = await gate.post("/generate")
                assert answer.body == big
                assert (await gate.post()).status == 200

    run_async(main())


def test_a_disconnect_before_the_first_byte_reaches_the_worker_at_once(run_async: Run) -> None:
    async def main() -> None:
        async def silent(call: Call) -> None:
            await call.gone.wait()

        decode, prefill = FakeWorker(script=silent), prefill_worker()
        async with workers(decode, prefill), routing([decode], [prefill]) as gate:
            client = await gate.client()
            client.post()
            await eventually(lambda: decode.calls)
            assert (await gate.worker(prefill.url))["in_flight"] == 1
            client.close()
            async with asyncio.timeout(2.0):
                await decode.calls[0].gone.wait()
            await gate.audit()
            assert await gate.metric('pd_router_requests_total{code="499"}') == 1

    run_async(main())


def test_a_disconnect_in_mid_stream_reaches_the_worker_without_another_event(run_async: Run) -> None:
    async def main() -> None:
        async def one_event(call: Call) -> None:
            call.start_events()
            call.event("first")
            await call.gone.wait()

        decode, prefill = FakeWorker(script=one_event), prefill_worker()
        async with workers(decode, prefill), routing([decode], [prefill]) as gate:
            client = await gate.client()
            client.post()
            await client.head()
            await client.chunk()
            assert (await gate.worker(prefill.url))["in_flight"] == 0  # its part ended with the first byte
            assert (await gate.worker(decode.url))["in_flight"] == 1
            client.writer.close()  # an orderly FIN
            async with asyncio.timeout(2.0):
                await decode.calls[0].gone.wait()

    run_async(main())


def test_a_client_that_closes_while_it_does_not_read_is_noticed(run_async: Run) -> None:
    async def main() -> None:
        async def flood(call: Call) -> None:
            call.start_events()
            while not call.gone.is_set():
                await call.drain()
                call.chunk(b"x" * 65536)
                await asyncio.sleep(0)

        decode = FakeWorker(script=flood)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client(limit=4096)
            client.post()
            await client.head()
            await asyncio.sleep(0.3)
            client.close()
            async with asyncio.timeout(3.0):
                await decode.calls[0].gone.wait()

    run_async(main())


def test_connections_are_kept_on_both_sides(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            for number in range(20):
                client.post("/generate", b"%d" % number)
                assert (await client.answer()).json["body"] == str(number)
            assert decode.accepted <= 2  # requests, and health checks beside them

    run_async(main())


def test_pipelined_requests_are_answered_in_order_also_with_errors_between(run_async: Run) -> None:
    async def main() -> None:
        async def slow_first(call: Call) -> None:
            await asyncio.sleep(0.05 if call.body == b"0" else 0)
            await echo(call)

        decode = FakeWorker(script=slow_first)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            for number in range(8):
                client.post("/generate" if number != 3 else "/nowhere", b"%d" % number)
            await asyncio.sleep(0.02)
            client.post("/generate", b"late")
            client.send(b"nonsense\r\n\r\n")
            bodies: list[Any] = []
            for _ in range(9):
                answer = await client.answer()
                bodies.append(answer.json["body"] if answer.status == 200 else answer.status)
            assert bodies == ["0", "1", "2", 404, "4", "5", "6", "7", "late"]
            assert (await client.answer()).status == 400
            assert await client.reader.read() == b""

    run_async(main())


def test_uploads_arrive_whole_chunked_or_with_a_length_and_after_expect(run_async: Run) -> None:
    async def main() -> None:
        async def count(call: Call) -> None:
            call.answer(200, json.dumps([len(call.body), call.headers.get("content-length")]).encode())

        decode = FakeWorker(script=count)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.send(b"POST /generate HTTP/1.1\r\nhost: r\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(100):
                client.send(b"1000\r\n" + b"z" * 4096 + b"\r\n")
                await client.writer.drain()
            client.send(b"0\r\n\r\n")
            assert (await client.answer()).json == [409600, "409600"]
            client.post("/generate", b"z" * 3_000_000)
            assert (await client.answer()).json == [3_000_000, "3000000"]
            client.send(b"POST /generate HTTP/1.1\r\nhost: r\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
            assert (await client.head()).status == 100
            client.send(b"{}")
            assert (await client.answer()).json == [2, "2"]

    run_async(main())


def test_an_http_1_0_client_gets_no_chunks(run_async: Run) -> None:
    async def main() -> None:
        async def stream(call: Call) -> None:
            call.start_events()
            call.event("a")
            call.event("b")
            call.end()

        decode = FakeWorker(script=stream)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.send(b"POST /generate HTTP/1.0\r\ncontent-length: 2\r\n\r\n{}")
            head = await client.head()
            assert "transfer-encoding" not in head.headers and head.headers["connection"] == "close"
            assert await client.reader.read() == b"data: a\n\ndata: b\n\n"

    run_async(main())


def test_a_body_that_ends_with_the_workers_connection_is_relayed_to_its_end(run_async: Run) -> None:
    async def main() -> None:
        async def old(call: Call) -> None:
            call.write(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nhello")
            await asyncio.sleep(0.05)
            call.write(b" world")
            call.connection.transport.close()

        decode = FakeWorker(script=old)
        async with workers(decode), routing([decode]) as gate:
            assert (await gate.post()).body == b"hello world"

    run_async(main())


def test_an_interim_response_of_a_worker_is_not_taken_for_the_answer(run_async: Run) -> None:
    async def main() -> None:
        async def hinting(call: Call) -> None:
            call.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\ncont")
            await asyncio.sleep(0.02)
            call.write(b"ent-length: 2\r\n\r\n{}")

        decode = FakeWorker(script=hinting)
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            for _ in range(2):
                client.post()
                answer = await client.answer()
                assert (answer.status, answer.body) == (200, b"{}") and "link" not in answer.headers

    run_async(main())


def test_a_policy_that_wants_the_prompt_gets_it_and_others_cost_no_parsing(run_async: Run) -> None:
    async def main() -> None:
        class Reader(First):
            wants_prompt = True

        seen: list[First] = []

        def make(kind: type[First]) -> Any:
            def factory(context: Any) -> First:
                seen.append(kind(context))
                return seen[-1]

            return factory

        decode = FakeWorker()
        async with workers(decode):
            for kind, texts in ((First, [None, None, None]), (Reader, ["hello", "a\nbc", None])):
                seen.clear()
                async with routing([decode], policies={"random": Entry(make(kind))}) as gate:
                    await gate.post("/v1/completions", b'{"prompt":"hello"}', "X-Tenant: t")
                    chat = b'{"messages":[{"content":"a"},{"content":[{"type":"text","text":"bc"}]}]}'
                    await gate.post("/v1/chat/completions", chat)
                    await gate.post("/generate", b'{"input_ids":[1,2]}')
                requests = [request for policy in seen for request in policy.seen]
                assert [request.text for request in requests] == texts
                assert requests[0].headers["x-tenant"] == "t"
                assert requests[2].token_ids == ([1, 2] if kind is Reader else None)

    run_async(main())


def test_many_clients_at_once_get_their_own_answers_and_nothing_stays_in_flight(run_async: Run) -> None:
    async def main() -> None:
        async def jitter(call: Call) -> None:
            await asyncio.sleep(hash(call.body) % 7 / 1000)
            await echo(call)

        decodes, prefills = [FakeWorker(script=jitter) for _ in range(3)], [prefill_worker(n) for n in range(2)]
        table = {"random": Entry(Random)}
        async with workers(*decodes, *prefills), routing(decodes, prefills, policies=table) as gate:

            async def session(client: Client, name: int) -> None:
                for number in range(20):
                    client.post("/generate", f"{name}/{number}".encode())
                    assert (await client.answer()).json["body"] == f"{name}/{number}"

            clients = [await gate.client() for _ in range(20)]
            await asyncio.gather(*(session(client, name) for name, client in enumerate(clients)))
            assert sum(len(decode.calls) for decode in decodes) == 400
            assert all(len(decode.calls) > 80 for decode in decodes)
            assert await gate.metric('pd_router_requests_total{code="200"}') == 400

    run_async(main())
