"""`pd up`: a local cluster in one command: prefill and decode instances and a router, each a process tree of its own.

An instance that dies or hangs is started again, with back-off, on the same ports and as a new incarnation; so is the
router. On a signal the router stops first, then decode, then prefill, each drained within a bound.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import structlog

from pd.access import server_tls
from pd.api.server import bind
from pd.config import HttpConfig, RouteConfig, ServeConfig, UpConfig, secret_values
from pd.errors import ConfigError, ProcessError
from pd.instance import EXIT_TIMEOUT, START_TIMEOUT, check, check_text, located
from pd.logs import configure
from pd.plugins import load_plugins
from pd.process import Child, ChildSpec
from pd.screen import LineScreen, Screen, open_screen
from pd.supervise import run_until_signalled

#: Seconds before a member that died is started again: first, and at most. A life of STEADY resets it.
BACKOFF_FIRST, BACKOFF_MOST, STEADY = 0.25, 10.0, 30.0

Ready = Callable[[str], None]


def run(config: UpConfig) -> int:
    """The `pd up` command. Returns the exit code; raises ConfigError, ModelError, ProcessError."""
    log = config.serve.log
    screen = open_screen(log, sys.stderr)
    configure("up", "", log, secrets=secret_values(config), stream=screen.stream)
    plugins = load_plugins()
    config = replace(config, serve=located(config.serve, plugins))
    check_text(check(config.serve, plugins), config.serve.chat.chat_template)
    server_tls(config.route.http)
    _check_port(config.route.http)
    try:
        return run_until_signalled(lambda stop: up(config, stop, _greet, screen))
    except ProcessError as error:
        raise error.wrong_setting() or error from error


def _check_port(http: HttpConfig) -> None:
    """The router listens last, when every model is loaded: that its port is taken must be known before. ConfigError."""
    try:
        bind(http.host, http.port).close()
    except OSError as error:
        raise ConfigError("--port", f"cannot listen on {http.host}:{http.port}: {error}") from error


def _greet(url: str) -> None:
    """For the person at the terminal; logs go to stderr."""
    body = '{"messages": [{"role": "user", "content": "What is 3 plus 4?"}]}'
    print(f"\npd is ready at {url}. Try:\n", flush=True)
    print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n", flush=True)


@dataclass
class Member:
    """One process of the cluster and how to start it again. `pin` fixes its ports once they are known."""

    name: str
    target: str
    config: Any
    pin: Callable[[Any, dict[str, Any]], Any]
    drain: float
    silence: float = 0.0
    screen: Screen = field(default_factory=lambda: LineScreen(sys.stderr))
    child: Child | None = None
    addresses: dict[str, Any] | None = None
    failures: int = 0

    async def start(self) -> dict[str, Any]:
        """Start and wait until it is ready. Raises ProcessError."""
        log = self.config.log
        spec = ChildSpec(self.name, self.target, self.config, instance=self.name, log=log, silence=self.silence)
        try:
            self.child = await Child.start(spec, self.screen.lines, partial(self.screen.progress, self.name))
            self.addresses = await self.child.ready(START_TIMEOUT)
        finally:
            self.screen.started(self.name)
        self.config = self.pin(self.config, self.addresses)
        return self.addresses

    async def stop(self) -> None:
        if self.child is not None:
            # Its own children are drained within `drain` and then get EXIT_TIMEOUT each.
            await self.child.terminate(self.drain + 3 * EXIT_TIMEOUT)


def _pin_instance(config: ServeConfig, addresses: dict[str, Any]) -> ServeConfig:
    control = config.control
    if "control_endpoint" in addresses:
        control = replace(control, control_port=int(addresses["control_endpoint"].rpartition(":")[2]))
    return replace(config, http=replace(config.http, port=addresses["port"]), control=control)


def _pin_router(config: RouteConfig, addresses: dict[str, Any]) -> RouteConfig:
    return replace(config, http=replace(config.http, port=addresses["port"]))


def members(config: UpConfig, screen: Screen) -> list[Member]:
    """The instances, prefill first."""
    found = []
    for role, count in (("prefill", config.prefill), ("decode", config.decode), ("unified", config.unified)):
        if config.unified and role != "unified":
            continue
        for index in range(count):
            serve = replace(config.serve, role=role, name=f"{role}-{index}")
            drain, silence = serve.http.drain_timeout, serve.control.watchdog_timeout
            found.append(Member(f"{role}-{index}", "pd.instance:main", serve, _pin_instance, drain, silence, screen))
    return found


async def up(config: UpConfig, stop: asyncio.Event, ready: Ready, screen: Screen) -> int:
    """Run the cluster until `stop` is set. Raises ProcessError when it cannot start."""
    log = structlog.get_logger()
    instances = members(config, screen)
    router: Member | None = None
    try:
        if not await _start_all(instances, stop):
            return 0
        router = _router(config, instances, screen)
        url = (await router.start())["url"]
        log.info("cluster_ready", url=url, instances=len(instances))
        ready(url)
        await _watch([*instances, router], config.restart, stop)
        log.info("cluster_stopping")
    finally:
        if router is not None:
            await router.stop()
        for role in ("decode", "unified", "prefill"):
            await asyncio.gather(*(m.stop() for m in instances if m.config.role == role))
    return 0


async def _start_all(instances: list[Member], stop: asyncio.Event) -> bool:
    """All at once; False when asked to stop meanwhile."""
    stopped = asyncio.ensure_future(stop.wait())
    starts = asyncio.gather(*(member.start() for member in instances))
    try:
        await asyncio.wait((stopped, starts), return_when=asyncio.FIRST_COMPLETED)
        if starts.done():
            starts.result()
        return starts.done()
    finally:
        stopped.cancel()
        starts.cancel()


def _router(config: UpConfig, instances: list[Member], screen: Screen) -> Member:
    def urls(*roles: str) -> tuple[str, ...]:
        return tuple(m.addresses["url"] for m in instances if m.addresses and m.config.role in roles)

    route = replace(config.route, prefill=urls("prefill"), decode=urls("decode", "unified"))
    silence = config.serve.control.watchdog_timeout
    return Member("router", "pd.router.service:main", route, _pin_router, route.http.drain_timeout, silence, screen)


async def _watch(cluster: list[Member], restart: bool, stop: asyncio.Event) -> None:
    """Until `stop`: restart who dies. Without `restart` the first death ends the cluster."""
    stopped = asyncio.ensure_future(stop.wait())
    keepers = {asyncio.ensure_future(_keep(member, restart)) for member in cluster}
    try:
        done, _ = await asyncio.wait({stopped, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & keepers:
            task.result()
    finally:
        for task in (stopped, *keepers):
            task.cancel()
        await asyncio.wait(keepers)


async def _keep(member: Member, restart: bool) -> None:
    """Restart one member for ever. Raises ProcessError when it died and may not be restarted."""
    log, loop = structlog.get_logger(), asyncio.get_running_loop()
    while True:
        began = loop.time()
        assert member.child is not None
        await member.child.wait()
        how = member.child.describe_exit()
        if not restart:
            raise ProcessError(member.name, f"died ({how})", member.child.exited.result())
        member.failures = 1 if loop.time() - began > STEADY else member.failures + 1
        delay = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** (member.failures - 1))
        log.error("restarting", member=member.name, how=how, delay=delay)
        await asyncio.sleep(delay)
        try:
            await member.start()
            log.info("restarted", member=member.name)
        except ProcessError as error:
            print(f"pd: {error}", file=sys.stderr)
            await member.stop()  # one that is not ready in time still runs, and nobody would wait for it
