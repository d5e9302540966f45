"""A router over real sockets: scripted workers, a client that speaks bytes, and an audit when a test is done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pd.abc import PolicyContext, RouteRequest, RoutingPolicy, WorkerView
from pd.config import HttpConfig, LogConfig, RouteConfig
from pd.router.service import serve


class First:
    """The first worker: what a test can foresee."""

    wants_prompt = False

    def __init__(self, context: PolicyContext) -> None:
        self.seen: list[RouteRequest] = []
        self.open = 0

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        self.seen.append(request)
        self.open += 1
        return workers[0]

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        self.open -= 1


@dataclass(frozen=True)
class Entry:
    factory: Callable[[PolicyContext], RoutingPolicy]
    prefer: str = ""


# --- workers --------------------------------------------------------------------------------------------------------


class Call:
    """One request that a worker got, and the means to answer it."""

    def __init__(self, connection: _WorkerConnection, head: bytes, body: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, _ = lines[0].split(" ")
        self.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        self.body = body
        self.connection = connection
        self.gone = connection.gone  # the router closed the connection

    def write(self, data: bytes) -> None:
        self.connection.transport.write(data)

    async def drain(self) -> None:
        await self.connection.writable.wait()

    def answer(self, status: int = 200, body: bytes = b"{}", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}", *headers]
        self.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def start_events(self) -> None:
        self.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def event(self, text: str) -> None:
        self.chunk(f"data: {text}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self.write(b"0\r\n\r\n")

    def die(self) -> None:
        self.connection.transport.abort()


Script = Callable[[Call], Awaitable[None]]


async def echo(call: Call) -> None:
    """Answers with the request as it arrived."""
    seen = {"target": call.target, "headers": call.headers, "body": call.body.decode("latin-1")}
    call.answer(200, json.dumps(seen).encode())


class _WorkerConnection(asyncio.Protocol):
    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker
        self.buffer = b""
        self.gone = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.worker.connections.add(self)
        self.worker.accepted += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            length = 0
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            task = asyncio.get_running_loop().create_task(self.worker.handle(Call(self, head, body)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self.worker.connections.discard(self)


@dataclass
class FakeWorker:
    """An instance as the router sees it. `script` answers everything but health checks and /v1/models."""

    role: str = "decode"
    script: Script = echo
    control_endpoint: str = ""
    health: int = 200
    state: str = "ready"
    load: dict[str, int] | None = field(default_factory=lambda: {"running": 0, "waiting": 0})
    local_prefill: str = "fallback"
    models: tuple[str, ...] = ("tiny",)
    key: str = ""
    tls: ssl.SSLContext | None = None
    checks: int = 0
    hang: bool = False  # health checks are not answered
    accepted: int = 0
    calls: list[Call] = field(default_factory=list)
    connections: set[_WorkerConnection] = field(default_factory=set)
    server: asyncio.Server | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def start(self) -> FakeWorker:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: _WorkerConnection(self), "127.0.0.1", self.port, ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """As a killed process: nothing listens any more, every connection is reset."""
        if self.server is not None:
            self.server.close()
            self.server = None
        tasks = [task for connection in self.connections for task in connection.tasks]
        for connection in list(self.connections):
            connection.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: not self.connections)

    async def handle(self, call: Call) -> None:
        path = call.target.partition("?")[0]
        if self.key and call.headers.get("authorization") != f"Bearer {self.key}" and path != "/health":
            call.answer(401)
        elif path in ("/health", "/server_info"):
            if self.hang:
                await call.gone.wait()
                return
            self.checks += path == "/health"
            call.answer(200, json.dumps(self._info()).encode()) if path == "/server_info" else call.answer(self.health)
        elif path == "/v1/models":
            data = [{"id": name, "object": "model"} for name in self.models]
            call.answer(200, json.dumps({"object": "list", "data": data}).encode())
        else:
            self.calls.append(call)
            await self.script(call)

    def _info(self) -> dict[str, Any]:
        info = {
            "role": self.role,
            "state": self.state,
            "control_endpoint": self.control_endpoint,
            "local_prefill": self.local_prefill,
            "load": self.load,
        }
        return {name: value for name, value in info.items() if value is not None}


def prefill_worker(number: int = 0, **settings: Any) -> FakeWorker:
    return FakeWorker("prefill", control_endpoint=f"tcp://127.0.0.1:{8998 + number}", **settings)


@contextlib.asynccontextmanager
async def workers(*fakes: FakeWorker) -> AsyncIterator[None]:
    try:
        for fake in fakes:
            await fake.start()
        yield
    finally:
        for fake in fakes:
            await fake.stop()


# --- the client -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection to the router."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, path: str = "/v1/completions", body: bytes = b'{"prompt":"hello"}', *headers: str) -> None:
        lines = [f"POST {path} HTTP/1.1", "host: router", f"content-length: {len(body)}", *headers]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def head(self) -> Answer:
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in raw[1:] if line)}
        return Answer(int(raw[0].split(" ")[1]), headers, b"")

    async def chunk(self) -> bytes:
        """The next chunk; empty for the last one. Raises IncompleteReadError where the stream is cut off."""
        size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self) -> Answer:
        head = await self.head()
        if "content-length" in head.headers:
            body = await self.reader.readexactly(int(head.headers["content-length"]))
        elif head.headers.get("transfer-encoding") == "chunked":
            pieces = []
            while piece := await self.chunk():
                pieces.append(piece)
            body = b"".join(pieces)
        else:
            body = await self.reader.read()
        return Answer(head.status, head.headers, body)

    def close(self) -> None:
        self.writer.transport.abort()


# --- the router -----------------------------------------------------------------------------------------------------


class Gate:
    """A running router."""

    def __init__(self, address: dict[str, Any], stop: asyncio.Event, policies: dict[str, First]) -> None:
        self.host, self.port, self.stop, self.policies = address["host"], address["port"], stop, policies
        self.clients: list[Client] = []

    async def client(self, **settings: Any) -> Client:
        client = Client(*await asyncio.open_connection(self.host, self.port, **settings))
        self.clients.append(client)
        return client

    async def get(self, path: str, method: str = "GET", *headers: str) -> Answer:
        client = await self.client()
        lines = [f"{method} {path} HTTP/1.1", "host: router", "content-length: 0", *headers]
        client.send("\r\n".join(lines).encode() + b"\r\n\r\n")
        answer = await client.answer()
        client.close()
        return answer

    async def post(self, path: str = "/v1/completions", body: bytes = b'{"prompt":"hello"}', *headers: str) -> Answer:
        client = await self.client()
        client.post(path, body, *headers)
        answer = await client.answer()
        client.close()
        return answer

    async def worker(self, url: str) -> dict[str, Any]:
        """What the router knows of a worker."""
        known = (await self.get("/server_info")).json["workers"]
        return next(worker for worker in known if worker["url"] == url)

    async def metric(self, name: str) -> float:
        lines = (await self.get("/metrics")).body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))

    async def audit(self) -> None:
        """At idle nothing is in flight, anywhere."""
        for client in self.clients:
            client.close()

        async def idle() -> bool:
            info = (await self.get("/server_info")).json
            return info["active_requests"] == 0 and not any(worker["in_flight"] for worker in info["workers"])

        await eventually(idle)
        assert all(policy.open == 0 for policy in self.policies.values())


async def until_cut(client: Client) -> list[bytes]:
    """What comes until the connection ends without the stream's own end."""
    chunks = []
    with pytest.raises(asyncio.IncompleteReadError):
        while True:
            chunks.append(await client.chunk())
            assert chunks[-1], "the stream ended properly"
    return chunks


async def eventually(condition: Callable[[], Any], limit: float = 5.0) -> None:
    """Waits until `condition()`, or what it awaits, is true; fails after `limit` seconds."""
    deadline = asyncio.get_running_loop().time() + limit
    while True:
        value = condition()
        if value if not isinstance(value, Awaitable) else await value:
            return
        assert asyncio.get_running_loop().time() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def routing(
    decode: Sequence[FakeWorker],
    prefill: Sequence[FakeWorker] = (),
    *,
    policies: dict[str, Entry] | None = None,
    drain_timeout: float = 5.0,
    audited: bool = True,
    **settings: Any,
) -> AsyncIterator[Gate]:
    """A router in front of these workers, on this loop. Every pool takes its first worker unless `policies` says.

    One that a plain client may not ask cannot be `audited`.
    """
    stop = asyncio.Event()
    ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    made: dict[str, First] = {}

    def first(context: PolicyContext) -> First:
        made[context.pool] = First(context)
        return made[context.pool]

    config = RouteConfig(
        prefill=tuple(worker.url for worker in prefill),
        decode=tuple(worker.url for worker in decode),
        log=LogConfig(log_level="error"),
        **{
            "http": HttpConfig(port=0, drain_timeout=drain_timeout),
            "health_interval": 0.1,
            "health_timeout": 2.0,
            **settings,
        },
    )
    table = policies if policies is not None else {"random": Entry(first)}
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(config, ready.set_result, stop, table))
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        gate = Gate(ready.result(), stop, made)
        try:
            yield gate
            if audited and not stop.is_set():
                await gate.audit()
        finally:
            for client in gate.clients:
                client.close()
                with contextlib.suppress(ConnectionError):
                    await client.writer.wait_closed()
            stop.set()
            await task
