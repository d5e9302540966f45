"""Connections from clients: parsing, limits, timeouts, pipelining. What a request means is the handler's business.

A request is read whole before anything is done with it (its body is needed for a replay anyway). While a handler is at
work, the connection goes on reading, because that is how a disconnect is noticed; what a pipelining client sends
meanwhile is kept unparsed, up to a limit.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from dataclasses import dataclass
from typing import Protocol, cast

import httptools

from pd.router.http import HOP_HEADERS, MAX_HEAD, Request, Response, error, origin_form, parse_timeout, render


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes. `body_timeout` is the longest pause in an upload.

    A request has the time that its client asked for and `grace` besides. Without such a wish what is bounded is its
    worker's silence: `request_timeout` and `silence_grace` besides in a stream, `answer_timeout` before the answer's
    head, since an answer that is not streamed comes when all of its tokens are there. The worker knows the bounds too,
    and its own answer is the better one. While the client does not read, the worker may not write, and `stall_timeout`
    counts.
    """

    max_body: int
    request_timeout: float
    answer_timeout: float
    stall_timeout: float
    grace: float = 0.5
    silence_grace: float = 2.0
    head_timeout: float = 20.0
    body_timeout: float = 30.0
    idle_timeout: float = 120.0
    linger: float = 2.0
    flush_timeout: float = 30.0
    max_backlog: int = 64 << 10
    max_pipelined: int = 128


class Handler(Protocol):
    """One request at work. It ends by `client.finished(...)`, or by `cancel`; after that it leaves the client alone."""

    def start(self) -> None: ...

    def cancel(self) -> None:
        """The client has gone."""

    def expire(self) -> None:
        """The request's time is up: answer so, and finish."""

    def pause(self) -> None:
        """The client does not read: write no more until `resume`."""

    def resume(self) -> None: ...


class App(Protocol):
    limits: Limits
    draining: bool

    def joined(self, client: ClientConnection) -> None: ...

    def left(self, client: ClientConnection) -> None: ...

    def handler(self, client: ClientConnection, request: Request) -> Handler: ...

    def refused(self, status: int) -> None:
        """A request was answered with an error before it could have a handler."""


class _Refused(Exception):
    """Stops the parser; the answer is already queued."""


class ClientConnection(asyncio.Protocol):
    """One client. At most one request is at work at a time; answers keep the order of requests."""

    def __init__(self, app: App) -> None:
        self.app, self.limits = app, app.limits
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.parser = httptools.HttpRequestParser(self)
        self.handler: Handler | None = None
        self.paused = False
        self._patience = 0.0  # how long the worker at work may be silent; 0: the whole request has a deadline
        self.deadline = self.loop.time() + self.limits.head_timeout
        self._queue: deque[Request | Response] = deque()
        self._backlog: list[bytes] = []
        self._backlog_size = 0
        self._reading_paused = False
        self._deaf = False  # whatever still comes is thrown away
        self._advancing = False
        self._replaying = False
        self._current: Request | None = None
        self._fresh = True  # nothing received yet
        self._begin()
        self._in_message = False

    def _begin(self) -> None:
        self._request = Request()
        self._in_message = True
        self._in_head = True
        self._head_fed = 0
        self._head_size = 0
        self._length = 0
        self._body: bytearray | bytes = b""
        self._chunked = False
        self._expect = False
        self._options = b""

    # --- asyncio --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app.joined(self)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self.handler is None and not self._backlog:
            self._feed(data)
            self._advance()
            return
        self._backlog.append(data)
        self._backlog_size += len(data)
        if self._backlog_size > self.limits.max_backlog and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        """A client that has stopped sending is taken to have gone: over TCP the two look the same."""
        self._gone()
        self.transport.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.app.left(self)
        self._gone()

    def _gone(self) -> None:
        self._deaf = True
        self._queue.clear()
        self._backlog.clear()
        handler, self.handler = self.handler, None
        if handler is not None:
            handler.cancel()

    def pause_writing(self) -> None:
        self.paused = True
        if self._patience:
            self.deadline = self.loop.time() + self.limits.stall_timeout
        if self.handler is not None:
            self.handler.pause()

    def resume_writing(self) -> None:
        self.paused = False
        self.renew()
        if self.handler is not None:
            self.handler.resume()

    # --- what a handler does --------------------------------------------------------------------------------------

    @property
    def closes(self) -> bool:
        """Whether the connection ends with the current answer, which must say so in its head."""
        current = self._current
        return self.app.draining or current is None or not current.keep_alive

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def renew(self, *, streaming: bool = False) -> None:
        """The worker has been asked or was heard: its silence begins now. Other deadlines stay as they are."""
        if self._patience and streaming:
            self._patience = self.limits.request_timeout + self.limits.silence_grace
        if self._patience and not self.paused:
            self.deadline = self.loop.time() + self._patience

    def answer(self, response: Response) -> None:
        """A whole answer; the request is finished by it."""
        request_id = self._current.request_id if self._current is not None else b""
        closes = self.closes
        extra = self._current.extra if self._current is not None else ()
        data = render(response, close=closes, request_id=request_id, extra=extra)
        if self._current is not None and self._current.method == b"HEAD":
            data = data[: data.index(b"\r\n\r\n") + 4]
        self.transport.write(data)
        self.finished(close=closes)

    def finished(self, *, close: bool) -> None:
        """The answer is written. `close`: the connection ends with it."""
        self.handler = self._current = None
        self._patience = 0.0
        if close or self.app.draining:
            self._close()
        else:
            self._advance()

    # --- what the service does ------------------------------------------------------------------------------------

    def expired(self) -> None:
        """`deadline` has passed."""
        if self.handler is not None:
            self.handler.expire()
        elif self._deaf:
            self.transport.abort()
        elif self._in_message:
            self._refuse(error(408, "the request did not arrive in time", "request_timeout"))
            self._advance()
        else:
            self.transport.close()

    def drain(self) -> None:
        """Closes the connection unless a request is at work or arriving; then its answer closes it."""
        if self.handler is None and not self._in_message and not self._queue:
            self._close()

    # --- requests one after the other -----------------------------------------------------------------------------

    def _advance(self) -> None:
        """Starts what can be started."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self.handler is None:
                if self._queue:
                    self._start(self._queue.popleft())
                elif self._deaf:
                    return
                elif self._backlog:
                    data, self._backlog_size = b"".join(self._backlog), 0
                    self._backlog.clear()
                    self._feed(data)
                else:
                    break
        finally:
            self._advancing = False
        if self.handler is None:
            self._wait()

    def _start(self, item: Request | Response) -> None:
        if isinstance(item, Response):
            self._close_with(item)
            return
        self._current = item
        item.started = self.loop.time()
        if item.timeout is None:
            self._patience = self.limits.answer_timeout + self.limits.silence_grace
            self.deadline = item.started + (self.limits.stall_timeout if self.paused else self._patience)
        else:
            self.deadline = item.started + item.timeout + self.limits.grace
        self.handler = self.app.handler(self, item)
        self.handler.start()

    def _wait(self) -> None:
        """No request is at work: wait for the rest of one, or for the next."""
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()
        limits = self.limits
        if not self._in_message:
            self.deadline = self.loop.time() + limits.idle_timeout
        elif not self._in_head:
            self.deadline = self.loop.time() + limits.body_timeout
            if self._expect:
                self._expect = False
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, response: Response) -> None:
        """Queues an error answer, after which the connection ends: what follows cannot be understood."""
        self._in_message = False
        self._deaf = True
        self._queue.append(response)

    def _close_with(self, response: Response) -> None:
        """Answers and closes, reading on for a moment: closing with unread bytes would reset the answer away."""
        self.app.refused(response.status)
        self.transport.write(render(response, close=True))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.deadline = self.loop.time() + self.limits.linger

    def _close(self) -> None:
        self._deaf = True
        self._queue.clear()
        self.deadline = self.loop.time() + self.limits.flush_timeout
        self.transport.close()

    # --- parsing --------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        if self._fresh:
            self._fresh = False
            if data.startswith(b"PRI * HTTP/2"):
                self._refuse(error(505, "HTTP/2 is not spoken here; use HTTP/1.1", "http_version_not_supported"))
                return
        if self._in_head:
            self._head_fed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._deaf:
                self._decline_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as err:
            if not self._deaf:
                self._refuse(error(400, f"malformed HTTP request: {err}", "bad_request"))
            return
        if self._in_message and self._in_head and self._head_fed > MAX_HEAD:
            self._refuse(error(431, "request head too large", "header_fields_too_large"))

    def _decline_upgrade(self, rest: bytes) -> None:
        """Goes on after a request that asked for another protocol, which is served with this one (RFC 9110, 7.8).

        The parser stopped after the head. If a body follows, a new parser is told so and reads it.
        """
        self.parser = httptools.HttpRequestParser(self)
        if self._in_message:
            self._replaying = True
            framing = b"transfer-encoding: chunked" if self._chunked else b"content-length: %d" % self._length
            close = b"connection: close\r\n" if b"close" in self._options else b""
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + close + framing + b"\r\n\r\n")
            self._replaying = False
        if rest:
            self._feed(rest)

    def _stop(self, status: int, message: str, code: str) -> None:
        self._refuse(error(status, message, code))
        raise _Refused

    def on_message_begin(self) -> None:
        if self._replaying:
            return
        if self._deaf:
            raise _Refused
        self._begin()
        self.deadline = self.loop.time() + self.limits.head_timeout

    def on_url(self, url: bytes) -> None:
        if self._replaying:
            return
        self._request.target += url
        self._count_head(len(url))

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > MAX_HEAD:
            self._stop(431, "request head too large", "header_fields_too_large")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replaying:
            return
        self._count_head(len(name) + len(value) + 4)
        if not self._in_head:
            return  # a trailer
        name = name.lower()
        if name in HOP_HEADERS:
            self._on_hop_header(name, value)
        elif name == b"x-request-id":
            self._request.request_id = value[:256]
        elif name == b"x-request-timeout":
            self._request.timeout = parse_timeout(value)
            self._request.headers.append((name, value))
        elif not name.startswith(b"x-pd-"):  # those are for the router to say
            self._request.headers.append((name, value))

    def _on_hop_header(self, name: bytes, value: bytes) -> None:
        if name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            self._chunked = True
            if value.lower() != b"chunked":
                self._stop(501, "only chunked transfer-encoding is understood", "unsupported_transfer_encoding")
        elif name == b"expect":
            self._expect = value.lower() == b"100-continue"
        elif name == b"connection":
            self._options += b"," + value.lower()

    def on_headers_complete(self) -> None:
        if self._replaying:
            return
        self._in_head = False
        request, version = self._request, self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop(505, f"HTTP/{version} is not spoken here", "http_version_not_supported")
        if self._length > self.limits.max_body:
            self._stop(413, f"request body larger than {self.limits.max_body} bytes", "body_too_large")
        request.method = self.parser.get_method()
        if not request.target.startswith(b"/"):
            request.target = origin_form(request.target)
        request.old = version == "1.0"
        if self._options not in (b"", b",keep-alive", b",close"):
            named = {option.strip() for option in self._options.split(b",")}
            request.headers = [pair for pair in request.headers if pair[0] not in named]

    def on_body(self, body: bytes) -> None:
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body
        self._expect = False
        if len(self._body) > self.limits.max_body:
            self._stop(413, f"request body larger than {self.limits.max_body} bytes", "body_too_large")

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade() and (self._length or self._chunked):
            return  # only for the parser: see _decline_upgrade
        request = self._request
        request.body = bytes(self._body)
        request.keep_alive = self.parser.should_keep_alive() and not request.old
        self._body = b""
        self._in_message = False
        self._in_head = True
        self._head_fed = 0
        self._queue.append(request)
        if not request.keep_alive:
            self._deaf = True
        elif len(self._queue) > self.limits.max_pipelined:
            self._stop(400, f"more than {self.limits.max_pipelined} pipelined requests", "too_many_requests")
