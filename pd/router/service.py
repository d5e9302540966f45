"""`pd route`: the process around the data path. Listens, checks workers, stops in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from pd.access import Access, server_tls
from pd.address import url_of
from pd.child import ChildContext
from pd.config import RouteConfig, secret_values
from pd.errors import ConfigError
from pd.logs import configure, get_logger
from pd.plugins import load_plugins
from pd.router.client import ClientConnection, Handler, Limits
from pd.router.http import Request, Response, error
from pd.router.metrics import Stats
from pd.router.operations import LocalAnswer, Operations, Refusal
from pd.router.proxy import Core, Exchange
from pd.router.selection import PolicyEntry, Selection
from pd.router.workers import Fleet
from pd.supervise import run_until_signalled

log = get_logger()

#: Is told the router's address: {"url", "host", "port"}.
Ready = Callable[[dict[str, Any]], None]

#: What goes to a decode instance, by path, with the methods that it allows.
PROXIED: dict[str, tuple[bytes, ...]] = {
    "/v1/completions": (b"POST",),
    "/v1/chat/completions": (b"POST",),
    "/generate": (b"POST", b"PUT"),
    "/health_generate": (b"GET",),
}

#: Seconds that an answer that is not streamed may take, and that a client may leave its answer unread; more if the
#: silence of a stream may be longer.
_LONGEST_WAIT = 1800.0

#: How often deadlines of clients and requests are looked at.
_TICK = 0.1


class Router:
    """Hands every request to its handler, and ends what has had its time."""

    def __init__(
        self,
        config: RouteConfig,
        policies: Mapping[str, PolicyEntry],
        spawn: Callable[[ClientConnection, Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        fleet = Fleet(config)
        self.fleet = fleet
        self.stats = Stats()
        selection = Selection(config, fleet, policies)
        self.core = Core(fleet, selection, self.stats, spawn)
        self.operations = Operations(self.core)
        self.access = Access.of(config.http)
        longest = max(_LONGEST_WAIT, config.request_timeout)
        self.limits = Limits(
            max_body=config.http.max_request_bytes,
            request_timeout=config.request_timeout,
            answer_timeout=longest,
            stall_timeout=longest,
        )
        self.clients: set[ClientConnection] = set()
        self.draining = False
        self._empty = asyncio.Event()

    def joined(self, client: ClientConnection) -> None:
        self.clients.add(client)
        self._empty.clear()

    def left(self, client: ClientConnection) -> None:
        self.clients.discard(client)
        if not self.clients:
            self._empty.set()

    def handler(self, client: ClientConnection, request: Request) -> Handler:
        path, access = request.path.rstrip("/") or "/", self.access
        if access.origins:
            origin = request.header(b"origin")
            request.extra = access.cors(origin)
            if request.method == b"OPTIONS" and origin and request.header(b"access-control-request-method"):
                return self._preflight(client, request, origin)
        if access.api_key and not access.permits(path, request.header(b"authorization")):
            self.refused(401)
            problem = "a valid API key is needed: Authorization: Bearer KEY"
            return Refusal(client, error(401, problem, "invalid_api_key", (b"www-authenticate", b"Bearer")))
        proxied = PROXIED.get(path)
        if proxied is not None:
            if request.method in proxied:
                return Exchange(self.core, client, request)
            return self._wrong_method(client, request, proxied)
        found = self.operations.find(path)
        if found is None:
            self.refused(404)
            return Refusal(client, error(404, f"no such path: {path}", "not_found"))
        methods, operation = found
        if request.method not in methods:
            return self._wrong_method(client, request, methods)
        return LocalAnswer(self.core, client, request, operation)

    def _preflight(self, client: ClientConnection, request: Request, origin: str) -> Refusal:
        """A web page's browser asks first; it has no key yet."""
        path = request.path.rstrip("/")
        local = self.operations.find(path)
        methods = PROXIED.get(path) or (local[0] if local is not None else ())
        wanted = request.header(b"access-control-request-headers")
        headers = self.access.preflight(origin, tuple(method.decode() for method in methods), wanted)
        if headers is None:
            self.refused(403)
            return Refusal(
                client, error(403, "pages of this origin may not ask (--allowed-origins)", "origin_not_allowed")
            )
        request.extra = headers
        self.refused(200)
        return Refusal(client, Response(200, b"", "text/plain"))

    def _wrong_method(self, client: ClientConnection, request: Request, methods: tuple[bytes, ...]) -> Refusal:
        self.refused(405)
        message = f"{request.method.decode('latin-1')} is not allowed for {request.path}"
        return Refusal(client, error(405, message, "method_not_allowed", (b"allow", b", ".join(methods))))

    def refused(self, status: int) -> None:
        self.stats.finished(status, 0.0)

    async def tick(self) -> None:
        """For ever: tells every client connection when its deadline has passed."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK)
            now = loop.time()
            for client in [client for client in self.clients if client.deadline <= now]:
                client.expired()

    async def drain(self, bound: float) -> None:
        """Ends idle connections now and the others with their answers; after `bound` seconds all of them."""
        self.draining = True
        if not self.clients:
            return
        for client in list(self.clients):
            client.drain()
        try:
            async with asyncio.timeout(bound):
                await self._empty.wait()
        except TimeoutError:
            log.warning("requests_cut_off", clients=len(self.clients), drain_timeout=bound)
            for client in list(self.clients):
                client.transport.abort()
            await self._empty.wait()


async def serve(
    config: RouteConfig,
    ready: Ready,
    stop: asyncio.Event,
    policies: Mapping[str, PolicyEntry],
) -> None:
    """Routes until `stop` is set, then drains. `ready` is called once requests are accepted.

    Every worker has been checked once by then. Raises ConfigError.
    """
    loop = asyncio.get_running_loop()
    tls = server_tls(config.http)
    async with asyncio.TaskGroup() as group:
        router = Router(config, policies, lambda client, work: group.create_task(_owned(client, work)))
        await router.fleet.check_all()
        try:
            server = await loop.create_server(
                lambda: ClientConnection(router), config.http.host, config.http.port, backlog=2048, ssl=tls
            )
        except OSError as err:
            await router.fleet.close()
            raise ConfigError("--port", f"cannot listen on {config.http.host}:{config.http.port}: {err}") from err
        background = [group.create_task(router.tick())]
        background += [group.create_task(router.fleet.watch(worker)) for worker in router.fleet.all()]
        try:
            host, port = server.sockets[0].getsockname()[:2]
            url = url_of("https" if tls else "http", host, port)
            log.info("router_listening", url=url)
            ready({"url": url, "host": host, "port": port})
            await stop.wait()
            log.info("router_draining", clients=len(router.clients), active=router.stats.active)
            server.close()
            await router.drain(config.http.drain_timeout)
        finally:
            server.close()
            for task in background:
                task.cancel()
            await router.fleet.close()
    log.info("router_stopped")


async def _owned(client: ClientConnection, work: Coroutine[Any, Any, None]) -> None:
    """One request's piece of work. A defect in it ends that client's connection, not the whole router."""
    try:
        await work
    except Exception:
        log.exception("defect_in_a_request_task")
        client.transport.abort()


async def main(config: RouteConfig, context: ChildContext) -> int:
    """Process target of `pd up`: reports what `serve` says, and stops when the parent asks."""
    return await _serve_with_plugins(config, context.report_ready, context.stopping)


def run(config: RouteConfig) -> int:
    """The `pd route` command. Returns the exit code; raises ConfigError and PluginError."""
    configure("router", "", config.log, secrets=secret_values(config))
    return run_until_signalled(lambda stop: _serve_with_plugins(config, lambda _: None, stop))


async def _serve_with_plugins(config: RouteConfig, ready: Callable[[dict[str, Any]], None], stop: asyncio.Event) -> int:
    plugins = load_plugins()
    plugins.process_started("router", config)
    try:
        await serve(config, ready, stop, plugins.policies())
    finally:
        plugins.process_stopping("router")
    return 0
