"""What the router costs: CPU seconds of its process per 1,000 requests, and what it adds to latency.

    python tests/bench/bench_router.py [--requests 4000] [--streams 1000] [--policy random …]

One worker process answers at once (JSON), or with 64 events, one every 5 ms. The load comes from this process over kept
connections: directly, through a splice that copies bytes and understands nothing (the floor for an asyncio router), and
through `pd route`. Ratios travel between machines, absolute figures do not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import uvloop

EVENTS, EVENT_S = 64, 0.005
ANSWER = json.dumps({"id": "cmpl-1", "choices": [{"index": 0, "text": "x" * 200}], "usage": {}}).encode()
EVENT = b"data: " + json.dumps({"id": "cmpl-1", "choices": [{"index": 0, "text": "token"}]}).encode() + b"\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
INFO = json.dumps({"role": "decode", "state": "ready", "load": {"running": 0, "waiting": 0}}).encode()


class Worker(asyncio.Protocol):
    """As cheap as a worker can be: the machine's two cores are shared with what is measured."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            at = head.lower().find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head)

    def answer(self, head: bytes) -> None:
        write = self.transport.write  # type: ignore[attr-defined]
        if b"/generate " not in head:
            body = INFO if b"/server_info" in head else ANSWER
            write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            return
        write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        loop = asyncio.get_running_loop()
        start = loop.time()

        def event(number: int) -> None:
            if self.transport.is_closing():
                return
            write(CHUNK if number < EVENTS else b"0\r\n\r\n")
            if number < EVENTS:
                loop.call_at(start + EVENT_S * (number + 1), event, number + 1)

        event(0)


async def work() -> None:
    server = await asyncio.get_running_loop().create_server(Worker, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


class Splice(asyncio.Protocol):
    """Copies bytes to `other`, whatever they are."""

    def __init__(self, worker: int = 0, other: asyncio.Transport | None = None) -> None:
        self.worker, self.other, self.early = worker, other, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.other is None:
            self.task = asyncio.get_running_loop().create_task(self.connect())

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        transport: asyncio.Transport = self.transport  # type: ignore[assignment]
        self.other, _ = await loop.create_connection(lambda: Splice(other=transport), "127.0.0.1", self.worker)
        self.other.write(self.early)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.write(data)
        else:
            self.early += data

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()


async def splice(worker: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Splice(worker), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[int, int]]:
    """(pid, port) of a process that says its port in its first line of output, or in the router's log."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert child.stdout is not None
    try:
        async for line in child.stdout:
            text = line.decode().strip()
            if text.isdigit():
                yield child.pid, int(text)
                break
            if '"router_listening"' in text:
                yield child.pid, int(json.loads(text)["url"].rpartition(":")[2])
                break
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def cpu_seconds(pid: int) -> float:
    fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Load:
    seconds: float
    first_byte_ms: float
    total_ms: float


async def drive(port: int, path: str, body: bytes, count: int, at_once: int) -> Load:
    """`count` requests over `at_once` kept connections."""
    request = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    data = request.encode() + body
    left, first, total = count, [], []

    async def session() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            start = time.perf_counter()
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            first.append(time.perf_counter() - start)
            assert b" 200 " in head, head
            if b"chunked" in head:
                await reader.readuntil(b"\r\n0\r\n\r\n")
            else:
                at = head.lower().index(b"content-length:")
                await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
            total.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(session())
    seconds = time.perf_counter() - start
    return Load(seconds, 1000 * statistics.median(first), 1000 * statistics.median(total))


async def measure(options: argparse.Namespace) -> None:
    cases = {
        "JSON, 1 KB prompt": ("/v1/completions", 1000, options.requests, 32),
        "JSON, 32 KB prompt": ("/v1/completions", 32_000, options.requests // 2, 32),
        f"{EVENTS} events, 5 ms": ("/generate", 1000, options.streams, 128),
    }
    async with process(__file__, "--worker") as (_, worker):
        for name, (path, size, count, at_once) in cases.items():
            body = json.dumps({"model": "m", "prompt": "a long prompt " * (size // 14), "stream": True}).encode()
            direct = await drive(worker, path, body, count, at_once)
            print(f"\n{name}, {at_once} at once")
            print(f"  direct        first byte {direct.first_byte_ms:7.2f} ms   total {direct.total_ms:7.2f} ms")
            for policy in ("splice", *options.policy):
                arguments = ("-m", "pd", "route", "--port", "0", "--log-format", "json", "--policy", policy)
                arguments += ("--decode", f"http://127.0.0.1:{worker}")
                if policy == "splice":
                    arguments = (__file__, "--splice", str(worker))
                async with process(*arguments) as (pid, port):
                    await drive(port, path, body, count // 10, at_once)
                    before = cpu_seconds(pid)
                    load = await drive(port, path, body, count, at_once)
                    cpu = (cpu_seconds(pid) - before) / count * 1000
                print(
                    f"  {policy:13s} first byte {load.first_byte_ms:7.2f} ms   total {load.total_ms:7.2f} ms   "
                    f"{cpu:.3f} CPU s per 1,000"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--policy", nargs="+", default=["random"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--splice", type=int, default=0, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work() if parsed.worker else splice(parsed.splice) if parsed.splice else measure(parsed))
