"""`pd serve`: one instance, the parent of an api, a scheduler and a runner process.

Start: the model is found (on the hub, if it is no directory) and checked before anything is opened; then the scheduler
binds its sockets, and the runner and the api attach to it. End: on a signal the scheduler drains, then the api and the
runner stop. When any child dies or hangs (the scheduler watches its runner, the parent the other two), the instance
ends with exit code 1: a runner's memory or a scheduler's decisions cannot be replaced inside one incarnation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog

from pd.access import server_tls
from pd.address import url_of
from pd.api.params import Defaults
from pd.api.service import ApiConfig
from pd.api.tokenizer import Tokenizer
from pd.child import ChildContext
from pd.config import ServeConfig, for_device, secret_values
from pd.errors import ProcessError
from pd.faults import fault_prefix
from pd.logs import configure
from pd.machine import has_cuda_gpu
from pd.models.checkpoint import read_json
from pd.models.hub import HuggingFaceHub, locate
from pd.models.info import check_config, check_model
from pd.plugins import Plugins, load_plugins
from pd.process import Child, ChildSpec
from pd.runner.config import RunnerConfig
from pd.scheduler.core import SchedulerSettings
from pd.scheduler.service import SchedulerProcessConfig
from pd.screen import LineScreen, Relay, Screen, open_screen
from pd.supervise import run_until_signalled, socket_folder
from pd.types import ModelInfo, Role

#: Loading weights takes the longest; a process that has not reported by then hangs.
START_TIMEOUT = 1800.0

#: Seconds for a process to end by itself once its work is over.
EXIT_TIMEOUT = 5.0

Ready = Callable[[dict[str, Any]], None]


def run(config: ServeConfig) -> int:
    """The `pd serve` command. Returns the exit code; raises ModelError, ConfigError, ProcessError."""
    screen = open_screen(config.log, sys.stderr)
    configure(config.role, config.name, config.log, secrets=secret_values(config), stream=screen.stream)
    plugins = load_plugins()
    config = located(config, plugins)
    model = check(config, plugins)
    check_text(model, config.chat.chat_template)
    server_tls(config.http)
    return run_until_signalled(lambda stop: serve(config, model, stop, lambda _: None, screen=screen))


async def main(config: ServeConfig, context: ChildContext) -> int:
    """Process target of `pd up`."""
    model, screen = check(config, load_plugins()), Relay(sys.stderr, context.report_progress)
    return await serve(config, model, context.stopping, context.report_ready, screen=screen)


def located(config: ServeConfig, plugins: Plugins) -> ServeConfig:
    """`config` with its model's directory in place of a hub id, which stays the name that is served.

    Only the process that the user started does this: every other one is given the directory. Raises ConfigError,
    ModelError.
    """
    log, wanted = structlog.get_logger(), config.model

    def servable(path: str) -> None:
        check_config(path, read_json(path, "config.json"), plugins.models())

    folder = locate(
        wanted.model,
        wanted.revision,
        HuggingFaceHub(),
        check=servable,
        downloading=lambda: log.info("downloading", model=wanted.model, revision=wanted.revision or "main"),
    )
    if folder == wanted.model:
        return config
    log.info("model_found", model=wanted.model, path=folder)
    name = wanted.served_model_name or wanted.model
    return replace(config, model=replace(wanted, model=folder, revision="", served_model_name=name))


def check(config: ServeConfig, plugins: Plugins) -> ModelInfo:
    """What the user named is servable. Raises ModelError."""
    return check_model(
        config.model.model,
        dtype=config.model.dtype,
        kv_cache_dtype=config.cache.kv_cache_dtype,
        name=config.model.served_model_name,
        context_length=config.model.context_length,
        supported=plugins.models(),
        dummy=config.model.load_format == "dummy",
    )


def check_text(model: ModelInfo, chat_template: str = "") -> None:
    """What only the api reads is sound, too: tokenizer, template, defaults. Raises ModelError, ConfigError."""
    Tokenizer(model.path, chat_template).close()
    Defaults.read(model.path)


@dataclass
class _Children:
    """The processes, and which of them has died. `apis` grows during start-up."""

    scheduler: Child
    apis: list[Child]
    runner: Child

    def all(self) -> tuple[Child, ...]:
        return self.scheduler, *self.apis, self.runner

    async def end(self) -> None:
        """Those that carry what the scheduler decides, once it is over."""
        await asyncio.gather(*(child.terminate(EXIT_TIMEOUT) for child in (*self.apis, self.runner)))

    async def one_exits(self) -> Child:
        await asyncio.wait([child.exited for child in self.all()], return_when=asyncio.FIRST_COMPLETED)
        return next(child for child in self.all() if child.exited.done())


async def serve(
    config: ServeConfig,
    model: ModelInfo,
    stop: asyncio.Event,
    ready: Ready,
    plan_type: type[Plan] | None = None,
    screen: Screen | None = None,
) -> int:
    """Run one instance until `stop` is set. Raises ProcessError when a child dies.

    `ready` gets its addresses once it takes requests. `screen` shows how it starts, and what its processes say.
    """
    log = structlog.get_logger()
    host = control_host(config)
    name = config.name or f"{socket.gethostname()}:{config.http.port or os.getpid()}"
    incarnation = time.time_ns() // 1_000_000
    config = for_device(config, has_cuda_gpu())
    if config.model.base_gpu_id and config.model.device == "cpu":
        log.warning("setting_without_effect", setting="base_gpu_id", reason="the runner computes on the CPU")
    log.info(
        "loading",
        model=model.name,
        dtype=model.dtype,
        kv_dtype=model.cache_dtype,
        role=config.role,
        device=config.model.device,
    )
    async with AsyncExitStack() as resources:
        plan = (plan_type or Plan)(config, model, name, incarnation, host, resources.enter_context(socket_folder()))
        screen = screen or LineScreen(sys.stderr)
        try:
            children = await _start(plan, resources, stop, screen)
        except ProcessError as error:
            raise error.wrong_setting() or error from error
        finally:
            screen.started("")
        if children is None:
            return 0
        addresses = plan.addresses
        log.info("ready", **addresses)
        ready(addresses)
        stopped = asyncio.ensure_future(stop.wait())
        died = asyncio.ensure_future(children.one_exits())
        await asyncio.wait((stopped, died), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if died.done():
            await _after_death(children, died.result())
        died.cancel()
        log.info("draining", bound=config.http.drain_timeout)
        # New requests are refused from here on; the api still carries what runs.
        await children.scheduler.terminate(config.http.drain_timeout + EXIT_TIMEOUT)
        await children.end()
        log.info("stopped")
    return 0


def control_host(config: ServeConfig) -> str:
    """Where control and data planes listen. Without a secret they stay on this host."""
    control = config.control
    if control.control_host:
        return control.control_host
    return config.http.host if control.cluster_secret or control.insecure_control_plane else "127.0.0.1"


@dataclass
class Plan:
    """How the children are configured and, once they run, where they listen."""

    config: ServeConfig
    model: ModelInfo
    name: str
    incarnation: int
    host: str
    folder: Path
    control_endpoint: str = ""
    http: tuple[str, int] = ("", 0)

    def endpoint(self, name: str) -> str:
        return f"ipc://{self.folder / name}"

    def _spec(self, name: str, target: str, config: Any, silence: float = 0.0) -> ChildSpec:
        return ChildSpec(name, target, config, instance=self.name, log=self.config.log, silence=silence)

    def _url(self, host: str, port: int) -> str:
        return url_of("https" if self.config.http.ssl_certfile else "http", host, port)

    def _known_url(self) -> str:
        """The same before and after a restart. An address that stands for all of a host's is the same on every host."""
        http = self.config.http
        return self._url(socket.gethostname() if http.host in ("0.0.0.0", "::") else http.host, http.port)

    def scheduler(self) -> ChildSpec:
        config = self.config
        settings = SchedulerSettings(
            Role(config.role),
            self.name,
            self.incarnation,
            config.transfer.transfer,
            context_length=self.model.context_length,
            http=config.name or (self._known_url() if config.http.port else self.name),
            scheduler=config.scheduler,
            cache=config.cache,
            control=replace(config.control, cluster_secret=""),
        )
        process = SchedulerProcessConfig(
            settings,
            self.endpoint("api"),
            self.endpoint("steps"),
            self.endpoint("transfer"),
            control_host=self.host,
            secret=config.control.cluster_secret,
            drain_timeout=config.http.drain_timeout,
            log=config.log,
            fault=fault_prefix(config.fault, self.name, "scheduler"),
        )
        return self._spec("scheduler", "pd.scheduler.service:main", process, config.control.watchdog_timeout)

    def runner(self) -> ChildSpec:
        config = self.config
        process = RunnerConfig(
            role=config.role,
            identity=f"{self.name}/{self.incarnation}/0",
            step_endpoint=self.endpoint("steps"),
            transfer_endpoint=self.endpoint("transfer"),
            host=self.host,
            model=config.model,
            cache=config.cache,
            max_running=config.scheduler.max_running_requests,
            transfer=config.transfer,
            control=config.control,
            profile_dir=config.profile_dir,
            log=config.log,
            fault=fault_prefix(config.fault, self.name, "runner"),
        )
        return self._spec("runner", "pd.runner.service:main", process)

    def api(self, worker: int) -> ChildSpec:
        """The first takes the port, the others share it."""
        config, workers = self.config, self.config.http.api_workers
        http = config.http if worker == 0 else replace(config.http, port=self.http[1])
        port = int(self.control_endpoint.rpartition(":")[2]) if self.control_endpoint else None
        process = ApiConfig(
            self.model,
            self.endpoint("api"),
            role=config.role,
            worker=worker,
            workers=workers,
            shared=str(self.folder),
            http=http,
            chat=config.chat,
            page_size=config.cache.page_size,
            request_timeout=config.scheduler.request_timeout,
            log=config.log,
            created=self.incarnation // 1000,
            info={
                "name": self.name,
                "incarnation": self.incarnation,
                "transfer": config.transfer.transfer,
                "bootstrap_port": port,
                "max_running_requests": config.scheduler.max_running_requests,
                "local_prefill": config.scheduler.local_prefill,
            },
        )
        name = f"api-{worker}" if workers > 1 else "api"
        return self._spec(name, "pd.api.service:main", process, config.control.watchdog_timeout)

    @property
    def addresses(self) -> dict[str, Any]:
        host, port = self.http
        addresses: dict[str, Any] = {"url": self._url(host, port), "host": host, "port": port}
        if self.control_endpoint:
            addresses["control_endpoint"] = self.control_endpoint
        return addresses


async def _start(plan: Plan, resources: AsyncExitStack, stop: asyncio.Event, screen: Screen) -> _Children | None:
    """Start the children; None when asked to stop meanwhile. What fails to start takes the others with it."""

    async def start(spec: ChildSpec) -> Child:
        child = await Child.start(spec, screen.lines, partial(screen.progress, ""))
        resources.push_async_callback(child.terminate, EXIT_TIMEOUT)
        return child

    scheduler = await start(plan.scheduler())
    plan.control_endpoint = (await scheduler.ready(START_TIMEOUT))["control_endpoint"]
    runner, api = await start(plan.runner()), await start(plan.api(0))
    children = _Children(scheduler, [api], runner)

    async def everything() -> None:
        _, where = await _all_up(
            children, runner.ready(START_TIMEOUT), _healthy(api, bool(plan.config.http.ssl_certfile))
        )
        plan.http = where["host"], where["port"]
        children.apis += [await start(plan.api(worker)) for worker in range(1, plan.config.http.api_workers)]
        await _all_up(children, *(other.ready(START_TIMEOUT) for other in children.apis[1:]))

    stopped = asyncio.ensure_future(stop.wait())
    up = asyncio.ensure_future(everything())
    try:
        await asyncio.wait((stopped, up), return_when=asyncio.FIRST_COMPLETED)
        if not up.done():
            return None
        up.result()
    finally:
        stopped.cancel()
        up.cancel()
    return children


async def _all_up(children: _Children, *ups: Coroutine[Any, Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of `ups` answers; the death of any child ends the wait."""
    waits = [asyncio.ensure_future(up) for up in ups]
    exits = asyncio.ensure_future(children.one_exits())
    pending = set(waits)
    try:
        while pending:
            done, _ = await asyncio.wait((*pending, exits), return_when=asyncio.FIRST_COMPLETED)
            for wait in pending & done:
                wait.result()
            pending -= done
            if exits.done():
                child = exits.result()
                if child is children.scheduler:  # it ends when the runner does, whose own word is the one to tell
                    await asyncio.wait(waits, timeout=EXIT_TIMEOUT, return_when=asyncio.FIRST_EXCEPTION)
                    for wait in waits:
                        if wait.done():
                            wait.result()
                raise ProcessError(child.name, f"died during start-up ({child.describe_exit()})", child.exited.result())
    finally:
        for task in (*waits, exits):
            task.cancel()
    return [wait.result() for wait in waits]


async def _healthy(api: Child, tls: bool) -> dict[str, Any]:
    """Until the api says so itself: its processes are up, but the scheduler's word may still be on its way to it."""
    where = await api.ready(START_TIMEOUT)
    host, port = where["host"], where["port"]
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    # It is our own child that is asked, by an address that its certificate need not name.
    context = ssl._create_unverified_context() if tls else None
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        with contextlib.suppress(OSError):  # an api that has died is noticed by who waits for exits
            reader, writer = await asyncio.open_connection(address, port, ssl=context)
            writer.write(f"GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
            status = await asyncio.wait_for(reader.readline(), EXIT_TIMEOUT)
            writer.close()
            if b" 200 " in status:
                return where
        await asyncio.sleep(0.02)
    raise ProcessError(api.name, f"not healthy within {START_TIMEOUT:g} s")


async def _after_death(children: _Children, dead: Child) -> NoReturn:
    """A child died: the others tell their clients and peers, within a bound, and the instance ends. ProcessError."""
    log = structlog.get_logger()
    log.error("process_died", process=dead.name, how=dead.describe_exit())
    if dead is not children.scheduler:
        # A dead runner is an event to the scheduler, which fails every request and ends by itself.
        await asyncio.wait({children.scheduler.exited}, timeout=EXIT_TIMEOUT if dead is children.runner else 0)
        await children.scheduler.terminate(EXIT_TIMEOUT)
    await children.end()
    raise ProcessError(dead.name, f"died ({dead.describe_exit()})")
