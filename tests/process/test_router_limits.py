"""Clients that are wrong, slow or hostile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from router_kit import Call, FakeWorker, echo, eventually, routing, workers

from pd.config import HttpConfig
from pd.router import client as client_module

Run = Callable[..., Any]

MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "bad method": b"FOO /x HTTP/1.1\r\n\r\n",
    "bad header": b"POST /generate HTTP/1.1\r\nbad header: x\r\n\r\n",
    "two lengths": b"POST /generate HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "length and chunks": b"POST /generate HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad length": b"POST /generate HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    "bad chunk": b"POST /generate HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_http_gets_400_and_the_end_of_the_connection(run_async: Run, data: bytes) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.send(data)
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (400, "close")
            assert answer.json["error"]["type"] == "invalid_request_error"
            assert await client.reader.read() == b""
            assert not decode.calls

    run_async(main())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00", 505),
        (b"POST /generate HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000, 431),
        (b"POST /generate HTTP/1.1\r\ncontent-length: 1001\r\n\r\n", 413),
        (b"POST /generate HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 1001\r\n\r\n", 413),
        (b"POST /generate HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, 413),
    ],
    ids=["HTTP/2", "encoding", "header", "target", "headers", "length", "expect", "chunks"],
)
def test_what_is_too_large_or_not_spoken_is_refused(run_async: Run, data: bytes, status: int) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode], http=HttpConfig(port=0, max_request_bytes=1000)) as gate:
            client = await gate.client()
            client.send(data)
            answer = await client.answer()
            assert answer.status == status and answer.json["error"]["message"]
            assert await client.reader.read() == b""
            assert (await gate.post("/generate", b"x" * 1000)).status == 200
            assert await gate.metric(f'pd_router_requests_total{{code="{status}"}}') == 1

    run_async(main())


def test_an_http_2_preface_in_pieces_is_refused_too(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            for piece in (b"PR", b"I * HT", b"TP/2.0\r\n\r\nSM\r\n\r\n"):
                client.send(piece)
                await asyncio.sleep(0.02)
            assert (await client.answer()).status in (400, 505)

    run_async(main())


def test_a_large_upload_that_is_refused_still_hears_why(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode], http=HttpConfig(port=0, max_request_bytes=1000)) as gate:
            client = await gate.client()
            client.post("/generate", b"x" * 4_000_000)
            assert (await client.answer()).status == 413

    run_async(main())


def test_a_request_for_an_upgrade_is_served_without_it_body_included(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            for _ in range(2):  # what clients that prefer HTTP/2 send, such as Java's
                client.post("/generate", b'{"a":1}', "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
            for _ in range(2):
                answer = await client.answer()
                assert answer.json["body"] == '{"a":1}'
                assert not {"upgrade", "connection"} & answer.json["headers"].keys()

    run_async(main())


def test_unknown_paths_and_methods_are_told(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            assert (await gate.post("/v1/embeddings")).status == 404
            answer = await gate.get("/v1/completions")
            assert (answer.status, answer.headers["allow"]) == (405, "POST")
            assert (await gate.post("/metrics")).status == 405
            client = await gate.client()
            client.send(b"HEAD /health HTTP/1.1\r\nhost: r\r\n\r\nGET /health HTTP/1.1\r\nhost: r\r\n\r\n")
            head = await client.head()
            assert head.status == 200 and int(head.headers["content-length"]) > 0
            assert (await client.answer()).json["status"] == "ok"
            assert not decode.calls

    run_async(main())


def test_a_path_may_end_with_a_slash_or_come_as_a_whole_url(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            for target in ("/health/", "http://router/health", "HTTP://router:1/health?a=b", "/v1/models/"):
                assert (await gate.get(target)).status == 200, target
            for target in ("http://router", "http://router?a", "ftp://router/health", "*"):
                assert (await gate.get(target)).status == 404, target
            assert (await gate.post("http://router/generate?a=b")).json["target"] == "/generate?a=b"
            assert (await gate.get("/generate", "PUT")).json["target"] == "/generate"

    run_async(main())


def test_slow_clients_are_bounded_at_every_stage(run_async: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            nothing, head, body, idle = [await gate.client() for _ in range(4)]
            head.send(b"POST /generate HTTP/1.1\r\nx: ")
            body.send(b"POST /generate HTTP/1.1\r\ncontent-length: 5\r\n\r\nab")
            idle.post()
            assert (await idle.answer()).status == 200
            async with asyncio.timeout(3):
                assert await nothing.reader.read() == b""
                assert (await head.answer()).status == 408
                assert (await body.answer()).status == 408
                assert await idle.reader.read() == b""
            assert len(decode.calls) == 1

    short = (0.2, 0.2, 0.3, 0.2, 0.2)
    names = ("head_timeout", "body_timeout", "idle_timeout", "linger", "flush_timeout")
    original = client_module.Limits

    def limits(**settings: Any) -> client_module.Limits:
        return original(**settings, **dict(zip(names, short, strict=True)))

    monkeypatch.setattr("pd.router.service.Limits", limits)
    run_async(main())


def test_a_slow_but_steady_upload_is_not_cut_off(run_async: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            client = await gate.client()
            client.send(b"POST /generate HTTP/1.1\r\ncontent-length: 10\r\n\r\n")
            for _ in range(10):
                await asyncio.sleep(0.1)
                client.send(b"x")
            assert (await client.answer()).json["body"] == "x" * 10

    original = client_module.Limits
    monkeypatch.setattr("pd.router.service.Limits", lambda **s: original(**s, body_timeout=0.4, head_timeout=0.4))
    run_async(main())


def test_a_flood_of_pipelined_requests_is_held_back_and_refused_beyond_a_limit(run_async: Run) -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def wait(call: Call) -> None:
            await go.wait()
            await echo(call)

        decode = FakeWorker(script=wait)
        async with workers(decode), routing([decode]) as gate:
            patient = await gate.client()
            patient.post()
            await eventually(lambda: decode.calls)
            for _ in range(1000):  # unread by the router beyond its backlog: the sender is held back
                patient.send(b"GET /health HTTP/1.1\r\nx: " + b"y" * 32_000 + b"\r\n\r\n")
            await asyncio.sleep(0.5)
            assert patient.writer.transport.get_write_buffer_size() > 16_000_000  # of 32, the rest is in the kernel
            go.set()
            assert [(await patient.answer()).status for _ in range(1001)] == [200] * 1001
            go.clear()
            greedy = await gate.client()
            greedy.post()
            greedy.send(b"GET /health HTTP/1.1\r\n\r\n" * 1000)
            await eventually(lambda: len(decode.calls) == 2)
            go.set()
            statuses = []
            while not statuses or statuses[-1] == 200:
                statuses.append((await greedy.answer()).status)
            assert statuses[-1] == 400 and 100 < len(statuses) < 200

    run_async(main())
