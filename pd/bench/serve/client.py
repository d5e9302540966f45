"""A streaming HTTP/1.1 client that costs microseconds per event.

asyncio transport + httptools, no framework: at 256 streams x 50 tokens/s the load generator must not be what is
measured. Every received packet is stamped once, before it is parsed. Connections are kept alive and reused, as a
gateway would; the time to connect, where one is needed, counts towards the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Sequence
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

_IDLE_LIMIT = 2.0  # seconds a connection may rest: servers close idle ones, uvicorn after 5 s
_CONNECT_TIMEOUT = 10.0  # seconds


class Sink(Protocol):
    """Receives one response."""

    def head(self, status: int, content_type: str) -> None: ...

    def body(self, data: bytes, now: float) -> None:
        """`now` is time.perf_counter() when the packet was received."""


class Stale(ConnectionError):
    """A kept-alive connection was closed before its answer began: the request may go out on a fresh one."""


class _Connection(asyncio.Protocol):
    """One connection; at most one exchange at a time. The exchange's future belongs to the caller of `exchange`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self.reusable = False
        self.exchanges = 0
        self._sink: Sink | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._finished: asyncio.Future[None] | None = None
        self._content_type = ""
        self._in_head = True
        self._now = 0.0

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Send `request` and feed `sink` until the response is complete or cut.

        Raises ConnectionError when it ended before the response's head. A response that is cut later returns
        normally: only the sink knows whether its content is complete.
        """
        if self.transport is None or self.transport.is_closing():
            raise Stale("closed while idle")
        self._sink, self._parser = sink, httptools.HttpResponseParser(self)
        self._finished = asyncio.get_running_loop().create_future()
        self._content_type, self._in_head, self.reusable = "", True, False
        self.exchanges += 1
        self.transport.write(request)
        try:
            await self._finished
        finally:
            self._sink = self._finished = None
            if not self.reusable:
                self.transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._parser is None or self._sink is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(ConnectionError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._in_head:
            text = str(exc) if exc is not None else "closed by the server before it answered"
            self._end(Stale(text) if self.exchanges > 1 else ConnectionError(text))
        else:
            self._end(None)

    # ---- httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._content_type = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None and self._sink is not None
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx heads precede the real one
            self._in_head = False
            self._sink.head(status, self._content_type)

    def on_body(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink.body(data, self._now)

    def on_message_complete(self) -> None:
        if not self._in_head:
            assert self._parser is not None
            self.reusable = self._parser.should_keep_alive()
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._finished is not None and not self._finished.done():
            if error is None:
                self._finished.set_result(None)
            else:
                self._finished.set_exception(error)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Client:
    """Requests to one server. Owns its connections; `close` ends them all."""

    def __init__(self, url: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        own = [("Host", parts.netloc.rpartition("@")[2]), ("User-Agent", "pd-bench"), *headers]
        self._head = "".join(f"{name}: {value}\r\n" for name, value in own)
        self._idle: list[_Connection] = []
        self._address: str | None = None

    async def post(self, path: str, body: bytes, sink: Sink, request_id: str) -> None:
        """POST JSON and stream the answer into `sink`; raises OSError when there is no answer."""
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await self._send(head.encode("latin-1") + body, sink)

    async def get(self, path: str, sink: Sink) -> None:
        """GET and feed the answer to `sink`; raises OSError when there is none."""
        head = f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}Accept: application/json\r\n\r\n"
        await self._send(head.encode("latin-1"), sink)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _send(self, request: bytes, sink: Sink) -> None:
        kept = self._take_idle()
        connection = kept if kept is not None else await self._connect()
        try:
            await connection.exchange(request, sink)
        except Stale:
            connection = await self._connect()
            await connection.exchange(request, sink)
        if connection.reusable:
            connection.idle_since = time.perf_counter()
            self._idle.append(connection)

    def _take_idle(self) -> _Connection | None:
        """The connection that rested least; the ones that rested too long are closed."""
        while self._idle:
            connection = self._idle.pop()
            closed = connection.transport is None or connection.transport.is_closing()
            if not closed and time.perf_counter() - connection.idle_since < _IDLE_LIMIT:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                if self._address is None:
                    self._address = await self._resolve(loop)
                name = self._host if self._tls else None
                _, connection = await loop.create_connection(
                    _Connection, self._address, self._port, ssl=self._tls, server_hostname=name
                )
        except TimeoutError:
            raise ConnectionError(f"no connection within {_CONNECT_TIMEOUT:g} s") from None
        return connection

    async def _resolve(self, loop: asyncio.AbstractEventLoop) -> str:
        """The first address of the host that accepts a connection; looked up once, not per request."""
        found = await loop.getaddrinfo(self._host, self._port, type=1)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                transport, _ = await loop.create_connection(asyncio.Protocol, address, self._port)
                transport.close()
                return address
        return addresses[-1]
