"""Connections to workers: one HTTP/1.1 response at a time, kept alive in a bounded pool.

A body is not decoded: the bytes go on as they came, and the parser only says where the message ends. Whoever sent the
request is the connection's `consumer` until the response has ended or failed; then the connection is back in its pool
or gone.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from typing import Protocol, cast

import httptools

from pd.router.http import MAX_HEAD, Response


class Consumer(Protocol):
    """Who waits for a response. After `ended` or `failed` nothing more is called."""

    def head(self, connection: Connection) -> None:
        """`connection.status` and `connection.headers` are known."""

    def data(self, data: bytes) -> None:
        """Body bytes, as framed by the worker."""

    def ended(self) -> None: ...

    def failed(self, reason: str) -> None: ...


class Connection(asyncio.Protocol):
    """One connection to a worker. `reused`: it has carried a response before, so the worker may have closed it."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.consumer: Consumer | None = None
        self.reused = False
        self.paused = False
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.chunked = False
        self.length: bytes | None = None
        self.received = False  # at least one byte of the response
        self.pieces: list[bytes] = []  # the decoded body, only where `decode` was asked for
        self.decode = False
        self._buffer = b""
        self._in_body = False
        self._in_chunk = False
        self._complete = False
        self._keep_alive = False
        self._overrun = False
        self._unsupported = False

    # --- what a consumer does -------------------------------------------------------------------------------------

    def send(self, consumer: Consumer, head: bytes, body: bytes, *, decode: bool = False) -> None:
        """Sends a request. `decode`: `data` gets the body without its framing (for HTTP/1.0 clients and own use)."""
        self.consumer = consumer
        self.decode = decode
        if len(body) < 16384:
            self.transport.write(head + body)
        else:
            self.transport.writelines([head, body])

    def release(self) -> None:
        """The consumer is no longer interested: the connection closes now, which is how the worker learns of it."""
        self.consumer = None
        self.transport.abort()

    def pause(self) -> None:
        if not self.paused and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused and not self.transport.is_closing():
            self.paused = False
            self.transport.resume_reading()

    @property
    def between_chunks(self) -> bool:
        """Whether everything so far is whole chunks, so that one more may be added (given that it ends in CRLF)."""
        return self.chunked and not self._in_chunk and not self._complete

    # --- asyncio --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.pool.adopt(self)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self.consumer is None:  # nobody asked: whatever this is, the connection cannot be trusted any more
            self.transport.abort()
            return
        self.received = True
        try:
            if self._in_body:
                self._body(data)
            else:
                self._head(data)
        except httptools.HttpParserError as err:
            self._fail(f"malformed response: {err}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.forget(self)
        consumer, self.consumer = self.consumer, None
        if consumer is None:
            return
        if exc is None and self._in_body and not self.chunked and self.length is None:
            consumer.ended()  # a body that ends with the connection
        else:
            consumer.failed(f"connection lost: {exc}" if exc else "connection closed by the worker")

    # --- parsing --------------------------------------------------------------------------------------------------

    def _head(self, data: bytes) -> None:
        buffer = self._buffer + data
        while True:
            end = buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                self._buffer = buffer
                if len(buffer) > MAX_HEAD:
                    self._fail("response head too large")
                return
            self.parser.feed_data(buffer[:end])
            buffer = buffer[end:]
            if self.status >= 200:
                break
            self.headers, self._complete = [], False  # an interim response: the real one follows
        self._buffer = b""
        self._in_body = True
        if self._unsupported:
            self._fail("unsupported transfer-encoding")
            return
        consumer = self.consumer
        assert consumer is not None
        consumer.head(self)
        if self.consumer is None:  # released meanwhile
            return
        if buffer:
            self._body(buffer)
        elif self._complete:
            self._finish()

    def _body(self, data: bytes) -> None:
        self.parser.feed_data(data)
        if self._overrun:
            self._fail("data after the end of the response")
            return
        consumer = self.consumer
        assert consumer is not None
        if not self.decode:
            consumer.data(data)
        elif self.pieces:
            pieces, self.pieces = self.pieces, []
            consumer.data(b"".join(pieces))
        if self._complete and self.consumer is not None:
            self._finish()

    def _finish(self) -> None:
        consumer, self.consumer = self.consumer, None
        assert consumer is not None
        keep = self._keep_alive and not self.transport.get_write_buffer_size()
        self._reset()
        self.reused = True
        self.resume()  # the last bytes may have filled the client's buffer: the next request must not find it paused
        if keep:
            self.pool.put(self)
        else:
            self.transport.abort()
        consumer.ended()

    def _fail(self, reason: str) -> None:
        consumer, self.consumer = self.consumer, None
        self.transport.abort()
        if consumer is not None:
            consumer.failed(reason)

    # --- httptools ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._overrun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:
            return  # a trailer: relayed raw with the rest
        name = name.lower()
        if name == b"transfer-encoding":
            self.chunked = True
            self._unsupported = value.lower() != b"chunked"
        elif name == b"content-length":
            self.length = value
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_chunk_header(self) -> None:
        self._in_chunk = True

    def on_body(self, body: bytes) -> None:
        if self.decode:
            self.pieces.append(body)

    def on_chunk_complete(self) -> None:
        self._in_chunk = False

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep_alive = self.parser.should_keep_alive()  # afterwards the parser has forgotten


class ConnectionPool:
    """Connections to one worker. Idle ones are reused last in, first out, so that surplus ones grow old and close.

    `tls`: how an https worker is judged. `authorization`: the header line with which the router itself asks, or empty.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connect_timeout: float,
        max_idle: int,
        idle_timeout: float,
        tls: ssl.SSLContext | None = None,
        authorization: bytes = b"",
    ) -> None:
        self.host, self.port, self.tls, self.authorization = host, port, tls, authorization
        self.connect_timeout, self.max_idle, self.idle_timeout = connect_timeout, max_idle, idle_timeout
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._ended = asyncio.Event()  # none is left

    def __len__(self) -> int:
        return len(self._all)

    def get(self) -> Connection | None:
        """An idle connection, now the caller's."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def connect(self) -> Connection:
        """A new connection, the caller's. Raises OSError (TimeoutError included) when there is none to be had."""
        loop = asyncio.get_running_loop()
        connection = Connection(self)
        try:
            async with asyncio.timeout(self.connect_timeout):
                await loop.create_connection(lambda: connection, self.host, self.port, ssl=self.tls)
        except BaseException:
            if connection.transport is not None:  # made, and cancelled before it could be handed over
                connection.transport.abort()
                self.forget(connection)  # uvloop may already have closed it without calling connection_lost
            raise
        return connection

    def adopt(self, connection: Connection) -> None:
        self._all.add(connection)
        self._ended.clear()

    def put(self, connection: Connection) -> None:
        if connection.transport.is_closing():
            return
        if len(self._idle) >= self.max_idle:
            self._idle.popleft().transport.close()
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        if not self._all:
            self._ended.set()
        if connection in self._idle:
            self._idle.remove(connection)

    def prune(self, now: float) -> None:
        while self._idle and now - self._idle[0].idle_since > self.idle_timeout:
            self._idle.popleft().transport.close()

    async def close(self) -> None:
        """Ends every connection; consumers hear `failed`. Returns when all have ended."""
        for connection in list(self._all):
            connection.transport.abort()
        while self._all:
            await self._ended.wait()


class _Collector:
    """Collects one whole response of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.pieces: list[bytes] = []
        self.status = 0
        self.content_type = ""
        self.connection: Connection | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def head(self, connection: Connection) -> None:
        self.connection = connection
        self.status = connection.status
        self.content_type = dict(connection.headers).get(b"content-type", b"").decode("latin-1")

    def data(self, data: bytes) -> None:
        self.size += len(data)
        self.pieces.append(data)
        if self.size > self.limit and self.connection is not None:
            self.connection.release()
            self.failed("response too large")

    def ended(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def failed(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))


async def fetch(
    pool: ConnectionPool,
    method: str,
    path: str,
    *,
    body: bytes = b"",
    limit: int = 1 << 20,
    authorization: bytes = b"",
) -> Response:
    """One whole response. Raises OSError. The caller bounds the time.

    `authorization`: the header line of who asked, which counts where the pool has none of its own.
    """
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: {pool.host}:{pool.port}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    ).encode("latin-1") + b"%b\r\n" % (pool.authorization or authorization)
    while True:
        connection = pool.get() or await pool.connect()
        collector = _Collector(limit)
        connection.send(collector, head, body, decode=True)
        try:
            await collector.done
        except ConnectionError:
            if connection.reused and not connection.received:
                continue  # closed while it was idle
            raise
        except asyncio.CancelledError:
            connection.release()
            raise
        return Response(collector.status, b"".join(collector.pieces), collector.content_type or "text/plain")
