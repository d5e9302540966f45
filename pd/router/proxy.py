"""One proxied request: choose, send, relay, and replace a decode instance that fails before the client saw a byte.

Callbacks only, no task per request; the one await is a new connection. States: choosing -> connecting -> waiting for
the head -> relaying -> over. Before the head is sent, a decode that refuses, dies or answers 503 is replaced, each at
most once; after it, a failure is told in the stream and ends the client's connection, so that nobody takes it for an
end.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from pd.abc import RouteRequest
from pd.logs import get_logger
from pd.router.client import ClientConnection
from pd.router.http import Request, Response, error, error_body, error_event, forward_head, relay_head
from pd.router.metrics import Stats
from pd.router.selection import Lease, PolicyError, Selection
from pd.router.upstream import Connection
from pd.router.workers import Fleet, Worker

log = get_logger()

_DISCARD_LIMIT = 64 << 10


@dataclass(frozen=True)
class Core:
    """What every request needs."""

    fleet: Fleet
    selection: Selection
    stats: Stats
    spawn: Callable[[ClientConnection, Coroutine[Any, Any, None]], asyncio.Task[None]]
    ids: itertools.count[int] = field(default_factory=itertools.count)
    id_prefix: str = field(default_factory=lambda: secrets.token_hex(6))

    def mint_id(self) -> bytes:
        return f"{self.id_prefix}-{next(self.ids):08x}".encode()


class _Discard:
    """Reads the rest of an answer that nobody wants, if it is short, so that its connection can be used again."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.size = connection, 0

    def head(self, connection: Connection) -> None:
        pass

    def data(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > _DISCARD_LIMIT:
            self.connection.release()

    def ended(self) -> None:
        pass

    def failed(self, reason: str) -> None:
        pass


class Exchange:
    """A request on its way through the router. Handler of its client, consumer of its worker's connection."""

    def __init__(self, core: Core, client: ClientConnection, request: Request) -> None:
        self.core, self.client, self.request = core, client, request
        self.route: RouteRequest | None = None
        self.decode: Lease | None = None
        self.prefill: Lease | None = None
        self.prefills: bytes | None = None  # None: not chosen yet; empty: none
        self.tried: list[Worker] = []
        self.connection: Connection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.reached = False  # some decode took the request
        self.status = 0  # of the head that the client has got
        self.close = False
        self.events = False  # the answer is a stream of server-sent events
        self.last = b""  # the last bytes relayed
        self.over = False

    # --- handler of the client ------------------------------------------------------------------------------------

    def start(self) -> None:
        self.core.stats.active += 1
        if not self.request.request_id:
            self.request.request_id = self.core.mint_id()
        self.route = self.core.selection.describe(self.request)
        self._attempt()

    def cancel(self) -> None:
        self._leave()
        self._account(499)

    def expire(self) -> None:
        worker = self.decode.worker.url if self.decode is not None else ""
        problem = self._overdue()
        log.warning("request_timed_out", request=self._id, worker=worker, reason=problem)
        connection = self._leave()
        if self.status:
            self._break(connection, 504, problem, "timeout")
        else:
            self._answer(error(504, problem, "timeout"))

    def pause(self) -> None:
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        if self.connection is not None:
            self.connection.resume()

    # --- choosing and sending -------------------------------------------------------------------------------------

    def _attempt(self) -> None:
        """Sends the request to a decode that has not had it yet."""
        assert self.route is not None
        selection = self.core.selection
        try:
            lease = selection.decode.choose(self.route, self.tried)
            if lease is None:
                self._none_left()
                return
            self.decode = lease
            if self.tried:
                self.core.stats.retries += 1
            self.tried.append(lease.worker)
            if self.prefills is None and lease.worker.role != "unified":
                self._choose_prefills()
        except PolicyError as err:
            log.error("routing_policy_failed", request=self._id, exc_info=err)
            self._answer(error(500, str(err), "routing_policy_failed"))
            return
        self._open(lease.worker, lease.worker.connections.get())

    def _choose_prefills(self) -> None:
        assert self.route is not None
        selector = self.core.selection.prefill
        self.prefill = selector.choose(self.route)
        if self.prefill is None:
            self.prefills = b""
            return
        workers = [self.prefill.worker, *selector.alternatives(self.prefill.worker)]
        self.prefills = ",".join(worker.control_endpoint for worker in workers).encode("latin-1")

    def _open(self, worker: Worker, connection: Connection | None) -> None:
        if connection is not None:
            self._send(worker, connection)
        else:
            self.connecting = self.core.spawn(self.client, self._connect(worker))

    async def _connect(self, worker: Worker) -> None:
        try:
            connection = await worker.connections.connect()
        except OSError as err:
            self.connecting = None
            self._replace(f"cannot connect: {err or type(err).__name__}")
            return
        self.connecting = None
        self._send(worker, connection)

    def _send(self, worker: Worker, connection: Connection) -> None:
        self.connection = connection
        prefills = self.prefills if self.prefills and worker.role != "unified" else b""
        head = forward_head(self.request, worker.host_header, prefills)
        connection.send(self, head, self.request.body, decode=self.request.old)
        self.client.renew()

    def _replace(self, reason: str, *, suspect: bool = True) -> None:
        """The current decode will not answer this request: the next one gets it."""
        lease, self.decode = self.decode, None
        assert lease is not None
        lease.end()
        if suspect:
            lease.worker.suspect(reason)
        else:
            lease.worker.check_now.set()
        log.info("decode_replaced", request=self._id, worker=lease.worker.url, reason=reason)
        self._attempt()

    def _none_left(self) -> None:
        if self.reached:
            self._answer(error(502, "the decode instance failed before it answered", "worker_failed"))
        else:
            self._answer(error(503, "no decode instance is available", "no_worker", (b"retry-after", b"1")))

    # --- consumer of the worker's answer --------------------------------------------------------------------------

    def head(self, connection: Connection) -> None:
        self.reached = True
        if connection.status == 503 and self._others():
            self.connection, connection.consumer = None, _Discard(connection)
            self._replace("answered 503", suspect=False)
            return
        if self.prefill is not None:
            self.prefill.end()
        request, stats = self.request, self.core.stats
        framing: tuple[tuple[bytes, bytes], ...] = ()
        self.close = self.client.closes
        if connection.length is not None:
            framing = ((b"content-length", connection.length),)
        elif connection.chunked and not request.old:
            framing = ((b"transfer-encoding", b"chunked"),)
        elif connection.status not in (204, 304):
            self.close = True
        names = dict(connection.headers)
        self.events = names.get(b"content-type", b"").startswith(b"text/event-stream")
        if b"x-request-id" not in names:
            framing += ((b"x-request-id", request.request_id),)
        framing += tuple(request.extra)
        self.status = connection.status
        request.body = b""  # no replay from here on
        stats.first_byte.observe(self.client.loop.time() - request.started)
        self.client.renew(streaming=self.events)
        self.client.write(relay_head(connection.status, connection.headers, framing=framing, close=self.close))
        if self.client.paused:
            connection.pause()

    def data(self, data: bytes) -> None:
        self.last = data
        self.client.renew()
        self.client.transport.write(data)

    def ended(self) -> None:
        self.connection = None
        self._account(self.status)
        self.client.finished(close=self.close)

    def failed(self, reason: str) -> None:
        connection, self.connection = self.connection, None
        assert connection is not None and self.decode is not None
        worker = self.decode.worker
        if self.status:
            worker.suspect(reason)
            log.warning("answer_broken_off", request=self._id, worker=worker.url, reason=reason)
            self._leave()
            self._break(connection, 502, f"the decode instance failed: {reason}", "worker_failed")
        elif connection.reused and not connection.received:
            self._open(worker, None)  # closed while it was idle, which is nobody's fault: a new one to the same worker
        else:
            self.reached = True
            self._replace(reason)

    # --- ends -----------------------------------------------------------------------------------------------------

    @property
    def _id(self) -> str:
        return self.request.request_id.decode("latin-1")

    def _overdue(self) -> str:
        limits, asked = self.client.limits, self.request.timeout
        if asked is not None:
            return f"the request took longer than {asked:g} s"
        if self.client.paused:
            return f"the client read nothing for {limits.stall_timeout:g} s"
        bound = limits.request_timeout if self.status else limits.answer_timeout
        return f"nothing came from the decode instance for {bound:g} s"

    def _others(self) -> bool:
        """Whether a decode is left that has not had this request."""
        return any(worker not in self.tried for worker in Fleet.candidates(self.core.fleet.decode))

    def _leave(self) -> Connection | None:
        """Lets go of the worker, at once. Returns the connection as it was left."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.release()
        if self.connecting is not None:
            self.connecting.cancel()
            self.connecting = None
        return connection

    def _account(self, code: int) -> None:
        """The request is over: every count that it holds goes back."""
        if self.over:
            return
        self.over = True
        for lease in (self.decode, self.prefill):
            if lease is not None:
                lease.end()
        self.core.stats.active -= 1
        self.core.stats.finished(code, self.client.loop.time() - self.request.started)

    def _answer(self, response: Response) -> None:
        self._account(response.status)
        self.client.answer(response)

    def _break(self, connection: Connection | None, status: int, message: str, code: str) -> None:
        """Ends an answer that has begun: the error as an event where the framing allows it, and no proper end."""
        self.core.stats.broken_streams += 1
        self._account(self.status)
        if self.events and connection is not None:
            if not connection.chunked or connection.decode:
                if connection.length is None:
                    self.client.write(b"\n\ndata: " + error_body(status, message, code) + b"\n\n")
            elif connection.between_chunks and (not self.last or self.last.endswith(b"\r\n")):
                complete = not self.last or self.last.endswith((b"\n\n\r\n", b"\r\n\r\n\r\n"))
                self.client.write(error_event(status, message, code, open_event=not complete))
        self.client.finished(close=True)
