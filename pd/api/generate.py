"""The way of every generating request: read, check, tokenise, submit, answer; and every way in which it can end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pd.api.context import Context, mint_rid
from pd.api.exchange import Exchange, Prompt
from pd.api.http import ClientDisconnected, Headers, Http, header_value
from pd.api.sse import HEADERS, error_event
from pd.errors import RequestError

#: What the access log of nginx calls a request whose client has gone.
CLIENT_CLOSED = 499


class Plan(Protocol):
    """A checked and tokenised request, and how its API shows the outputs."""

    stream: bool
    prompts: list[Prompt]

    def whole(self, exchange: Exchange) -> Any:
        """The answer without streaming: a value for JSON."""

    def opening(self, exchange: Exchange) -> bytes:
        """What a stream begins with, before any output."""

    def update(self, exchange: Exchange) -> bytes:
        """Events for what is new; b"" when nothing can be shown yet."""

    def closing(self, exchange: Exchange) -> bytes:
        """The end of a stream that succeeded."""


class Writers:
    """Writes to clients, and gives up on those that do not read: a stalled stream would keep its memory for ever."""

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._tasks: dict[Http, asyncio.Task[Any]] = {}  # those that stream
        self._since: dict[Http, float] = {}  # those in a write
        self._stalled: set[Http] = set()

    @contextlib.contextmanager
    def streaming(self, http: Http) -> Iterator[None]:
        """Around all writes of one stream, in the task that makes them."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks[http] = task
        try:
            yield
        finally:
            del self._tasks[http]
            self._since.pop(http, None)
            self._stalled.discard(http)

    async def write(self, http: Http, data: bytes, *, last: bool = False) -> None:
        """Raises ClientDisconnected when the client left the stream unread for too long."""
        self._since[http] = self._clock()
        try:
            await (http.end(data) if last else http.write(data))
        except asyncio.CancelledError:
            if http not in self._stalled:
                raise
            self._tasks[http].uncancel()
            raise ClientDisconnected from None
        finally:
            del self._since[http]

    def sweep_once(self) -> None:
        now = self._clock()
        for http, since in self._since.items():
            if now - since > self._limit_s and http not in self._stalled:
                self._stalled.add(http)
                self._tasks[http].cancel()

    async def sweep(self) -> None:
        """Runs for the process's life."""
        while True:
            await asyncio.sleep(1.0)
            self.sweep_once()


@dataclass(frozen=True)
class Generator:
    """Runs plans."""

    context: Context
    writers: Writers

    async def run(self, http: Http, arrived: float, rid: str | None, prepare: Callable[[str], Awaitable[Plan]]) -> None:
        """Answer one request whose body has been read. `prepare` makes its plan, given the request's id."""
        rid = rid or mint_rid()
        timeout = http.timeout_s()
        exchange = Exchange(rid, arrived, deadline=float("inf") if timeout is None else arrived + timeout)
        status = 500
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self._watch(http, exchange))
            try:
                status = await self._answer(http, exchange, prepare)
            finally:
                watcher.cancel()
                reason = "the client disconnected" if exchange.disconnected else "the request ended"
                self.context.engine.abort(exchange, reason)
                self.context.finished(self._summary(http, exchange, status))

    async def _watch(self, http: Http, exchange: Exchange) -> None:
        await http.until_disconnect()
        if not exchange.finished_at:
            exchange.disconnect()
            # At once, not when the answer's task next runs: that may wait in a write.
            self.context.engine.abort(exchange, "the client disconnected")

    async def _answer(self, http: Http, exchange: Exchange, prepare: Callable[[str], Awaitable[Plan]]) -> int:
        """Returns the status for the log."""
        try:
            plan = await prepare(exchange.rid)
            if exchange.disconnected:
                return CLIENT_CLOSED
            exchange.stream = plan.stream
            self.context.engine.submit(exchange, plan.prompts)
            if plan.stream:
                return await self._stream(http, exchange, plan)
            await exchange.wait_over()
            self._raise_failure(exchange)
            await http.respond_json(200, plan.whole(exchange), self._headers(exchange))
            return 200
        except RequestError as error:
            await http.respond_error(error, self._headers(exchange))
            return error.status
        except ClientDisconnected:
            exchange.disconnect()
            return CLIENT_CLOSED

    async def _stream(self, http: Http, exchange: Exchange, plan: Plan) -> int:
        # Headers wait for the first output: until then a failure still has a status of its own.
        while not exchange.ready:
            await exchange.wait()
            self._raise_failure(exchange)
        with self.writers.streaming(http):
            return await self._events(http, exchange, plan)

    async def _events(self, http: Http, exchange: Exchange, plan: Plan) -> int:
        await http.start(200, HEADERS + self._headers(exchange))
        pending = plan.opening(exchange)
        while True:
            pending += plan.update(exchange)
            if exchange.disconnected:
                raise ClientDisconnected
            if exchange.failure is not None:
                await self.writers.write(http, pending + error_event(exchange.failure), last=True)
                return exchange.failure.status
            if exchange.open == 0:
                await self.writers.write(http, pending + plan.closing(exchange), last=True)
                return 200
            if pending:
                await self.writers.write(http, pending)
                pending = b""
            await exchange.wait()

    @staticmethod
    def _raise_failure(exchange: Exchange) -> None:
        if exchange.disconnected:
            raise ClientDisconnected
        if exchange.failure is not None:
            raise exchange.failure

    @staticmethod
    def _headers(exchange: Exchange) -> Headers:
        headers = [(b"x-request-id", header_value(exchange.rid))]
        used = exchange.prefills_used()
        if used:
            headers.append((b"x-pd-prefill-used", header_value(used)))
        return headers

    def _summary(self, http: Http, exchange: Exchange, status: int) -> dict[str, Any]:
        now = self.context.engine.clock()
        reasons = {choice.finish.reason.value for choice in exchange.choices() if choice.finish is not None}
        return {
            "rid": exchange.rid,
            "path": http.path,
            "status": status,
            "stream": exchange.stream,
            "prompts": len(exchange.generations),
            "prompt_tokens": exchange.prompt_tokens(),
            "completion_tokens": exchange.completion_tokens(),
            "cached_tokens": exchange.cached_tokens(),
            "prefill": exchange.prefills_used(),
            "finish": ",".join(sorted(reasons)),
            "error": exchange.failure.message if exchange.failure is not None else "",
            "first_token_s": round(exchange.first_at - exchange.arrived, 6) if exchange.first_at else None,
            "total_s": round(now - exchange.arrived, 6),
        }
