"""The workers that the router knows: who is there, who is well, and how much each one has to do.

A worker's condition changes on two occasions: its health check (every `health_interval`, each worker on its own, so
that a hanging one delays nobody), and a connection that failed on the request path, which makes it suspect at once
and brings its next check forward. In-flight counts change only through `acquire` and `release`.
"""

from __future__ import annotations

import asyncio
import enum
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pd.abc import WorkerView
from pd.access import Access, client_tls
from pd.address import url_of
from pd.config import RouteConfig
from pd.errors import ConfigError
from pd.logs import get_logger
from pd.router.prompt import NOT_JSON
from pd.router.upstream import ConnectionPool, fetch
from pd.types import InstanceState, Load

log = get_logger()

#: A check that was brought forward starts this much after the last one at the earliest.
_CHECK_SPACING = 0.1

#: A view is rebuilt when it is this old, so that `load_age` is right; earlier whenever anything else in it changed.
_VIEW_AGE = 0.25

#: What may go into a header as a host name or address.
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")


class Health(enum.Enum):
    """UNKNOWN until the first check; SUSPECT after a connection failed; OUT after `health_failures` checks in a row."""

    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    OUT = "out"


@dataclass(frozen=True)
class Address:
    """A worker as the user wrote it. `control_port`, if not 0, replaces the one that a prefill instance reports."""

    url: str
    host: str
    port: int
    control_port: int = 0


def parse_address(flag: str, url: str, control_port: int = 0) -> Address:
    """`http://HOST:PORT`, or with https. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as err:
        raise ConfigError(flag, f"{url!r}: {err}") from None
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/") or parts.query:
        raise ConfigError(flag, f"{url!r} is not of the form http://HOST:PORT")
    return Address(url_of(parts.scheme, host, port), host, port, control_port)


class Worker:
    """One worker in one pool. `pool` is what the user says that it is, `role` what it says itself."""

    def __init__(self, address: Address, pool: str, connections: ConnectionPool) -> None:
        self.address, self.pool, self.connections = address, pool, connections
        self.url = address.url
        self.host_header = address.url.partition("://")[2].encode("latin-1")
        self.role = pool
        self.health = Health.UNKNOWN
        self.state = InstanceState.STARTING
        self.failures = 0
        self.in_flight = 0
        self.load: Load | None = None
        self.load_at = 0.0
        self.info: dict[str, Any] = {}
        self.control_endpoint = ""
        self.check_now = asyncio.Event()
        self._view: WorkerView | None = None
        self._view_at = 0.0

    @property
    def accepting(self) -> bool:
        """Neither starting nor draining, and of a kind that can do its pool's work."""
        if self.state is not InstanceState.READY:
            return False
        return bool(self.control_endpoint) if self.pool == "prefill" else self.role != "prefill"

    @property
    def routable(self) -> bool:
        return self.health is Health.HEALTHY and self.accepting

    @property
    def can_prefill_itself(self) -> bool:
        return self.role == "unified" or self.info.get("local_prefill", "fallback") != "never"

    def acquire(self) -> None:
        self.in_flight += 1
        self._view = None

    def release(self) -> None:
        assert self.in_flight > 0, f"{self.url} released more often than acquired"
        self.in_flight -= 1
        self._view = None

    def view(self, now: float) -> WorkerView:
        if self._view is None or now - self._view_at > _VIEW_AGE:
            age = now - self.load_at if self.load is not None else 0.0
            self._view = WorkerView(self.url, self.role, self.in_flight, self.load, age)
            self._view_at = now
        return self._view

    def suspect(self, reason: str) -> None:
        """A connection failed on the request path: out of the rotation until the next check says otherwise."""
        if self.health is Health.HEALTHY:
            self.health = Health.SUSPECT
            log.warning("worker_suspect", worker=self.url, pool=self.pool, reason=reason)
        self.check_now.set()

    def passed(self, info: dict[str, Any], now: float) -> None:
        self.failures = 0
        if info or not self.info:
            self._learn(info, now)
        if self.health is not Health.HEALTHY:
            self.health = Health.HEALTHY
            log.info("worker_healthy", worker=self.url, pool=self.pool, serves=self.role, control=self.control_endpoint)
            if not self.accepting and self.state is InstanceState.READY:
                why = "has no control endpoint" if self.pool == "prefill" else f"is a {self.role} instance"
                log.error("worker_cannot_do_its_pool_work", worker=self.url, pool=self.pool, problem=why)

    def failed(self, reason: str, limit: int) -> None:
        self.failures += 1
        if self.failures >= limit and self.health is not Health.OUT:
            self.health = Health.OUT
            self.load, self._view = None, None
            log.warning("worker_out", worker=self.url, pool=self.pool, failures=self.failures, reason=reason)

    def _learn(self, info: dict[str, Any], now: float) -> None:
        self.info = info
        self._view = None
        self.role = str(info.get("role") or self.pool)
        state = info.get("state")
        self.state = next((known for known in InstanceState if known.value == state), InstanceState.READY)
        load = _load(info.get("load"))
        if load is not None:
            self.load, self.load_at = load, now
        if self.pool == "prefill":
            self.control_endpoint = _control_endpoint(str(info.get("control_endpoint") or ""), self.address)


def _load(raw: Any) -> Load | None:
    if not isinstance(raw, dict):
        return None
    try:
        return Load(**{name: int(raw[name]) for name in Load.__struct_fields__ if name in raw})
    except (TypeError, ValueError):
        return None


def _control_endpoint(endpoint: str, address: Address) -> str:
    """What the worker says, with the port that the user gave, and with the URL's host in place of a wildcard."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", address.control_port or parts.port
    except ValueError:
        host, port = "", address.control_port
    if not port:
        return ""
    if host in ("", "0.0.0.0", "::", "*") or not _HOST.fullmatch(host):
        host = address.host
    return url_of("tcp", host, port)


class Fleet:
    """Both pools and their health checks."""

    def __init__(self, config: RouteConfig) -> None:
        self.config = config
        ports = config.prefill_bootstrap_ports or (0,) * len(config.prefill)
        if len(ports) != len(config.prefill):
            raise ConfigError("--prefill-bootstrap-ports", f"{len(ports)} ports for {len(config.prefill)} instances")
        self.prefill = self._workers(
            "prefill", [parse_address("--prefill", url, port) for url, port in zip(config.prefill, ports, strict=True)]
        )
        self.decode = self._workers("decode", [parse_address("--decode", url) for url in config.decode])
        if not self.decode:
            raise ConfigError("--decode", "no decode instance given", "name at least one URL")
        if config.worker_ca_certs and not any(worker.connections.tls for worker in self.all()):
            raise ConfigError("--worker-ca-certs", "no worker is asked by https", "leave it out")

    def _workers(self, pool: str, addresses: list[Address]) -> list[Worker]:
        https = any(address.url.startswith("https:") for address in addresses)
        tls = client_tls(self.config.worker_ca_certs) if https else None

        def connections(address: Address) -> ConnectionPool:
            return ConnectionPool(
                address.host,
                address.port,
                connect_timeout=self.config.connect_timeout,
                max_idle=256,
                idle_timeout=30.0,
                tls=tls if address.url.startswith("https:") else None,
                authorization=Access.of(self.config.http).authorization,
            )

        return [Worker(address, pool, connections(address)) for address in addresses]

    def all(self) -> list[Worker]:
        return self.prefill + self.decode

    @staticmethod
    def candidates(workers: list[Worker]) -> list[Worker]:
        """Who may get a request, in a stable order: the healthy, or, if there is none, the merely suspect."""
        routable = [worker for worker in workers if worker.routable]
        return routable or [worker for worker in workers if worker.health is Health.SUSPECT and worker.accepting]

    @property
    def ready(self) -> bool:
        """Whether a request could be served: a decode, and somebody to prefill for it."""
        decodes = [worker for worker in self.decode if worker.routable]
        prefills = any(worker.routable for worker in self.prefill)
        return any(prefills or worker.can_prefill_itself for worker in decodes)

    async def check_all(self) -> None:
        """One check of every worker, at once. Bounded by `health_timeout`."""
        await asyncio.gather(*(self.check(worker) for worker in self.all()))

    async def watch(self, worker: Worker) -> None:
        """Checks one worker for ever: on time, or earlier when the request path asks."""
        while True:
            try:
                async with asyncio.timeout(self.config.health_interval):
                    await asyncio.sleep(min(_CHECK_SPACING, self.config.health_interval / 2))
                    await worker.check_now.wait()
            except TimeoutError:
                pass
            worker.check_now.clear()
            await self.check(worker)
            worker.connections.prune(asyncio.get_running_loop().time())

    async def check(self, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self.config.health_timeout):
                info = await self._server_info(worker)
                answer = await fetch(worker.connections, "GET", "/health")
        except OSError as err:
            worker.failed(f"{type(err).__name__}: {err}" if str(err) else "timeout", self.config.health_failures)
            return
        if info.get("state") == InstanceState.DRAINING.value and worker.state is not InstanceState.DRAINING:
            worker.state = InstanceState.DRAINING
            log.info("worker_draining", worker=worker.url, pool=worker.pool)
        if answer.status == 200:
            worker.passed(info, time.monotonic())
        else:
            worker.failed(f"/health answered {answer.status}", self.config.health_failures)

    async def _server_info(self, worker: Worker) -> dict[str, Any]:
        """What the worker says of itself; empty if it does not."""
        answer = await fetch(worker.connections, "GET", "/server_info")
        if answer.status == 401:
            raise ConnectionError("it wants another key: give the router its --api-key")
        if answer.status != 200:
            return {}
        try:
            info = msgspec.json.decode(answer.body)
        except NOT_JSON:
            return {}
        return info if isinstance(info, dict) else {}

    async def close(self) -> None:
        """Ends every connection to a worker, and returns when they have ended."""
        for worker in self.all():
            await worker.connections.close()
