"""The api process: `main` is what `pd.process` starts. One event loop; HTTP on one side, the scheduler on the other."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zmq

from pd.access import Access
from pd.api.app import App
from pd.api.context import ChatFormats, Context, Limits, Served
from pd.api.engine import Engine, SchedulerChannel
from pd.api.exchange import Prompt
from pd.api.metrics import Latencies
from pd.api.params import Defaults, ModelLimits
from pd.api.server import HttpServer, bind
from pd.api.tokenizer import Tokenizer
from pd.child import ChildContext
from pd.config import ChatConfig, HttpConfig, LogConfig
from pd.errors import ConfigError, ProcessError
from pd.ipc.channel import Channel
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkEventKind, LinkOptions, Monitor, Sockets
from pd.logs import get_logger
from pd.messages import ApiToScheduler, SchedulerToApi
from pd.plugins import load_plugins
from pd.types import InstanceState, ModelInfo

#: After a lost scheduler or at the end of draining: for clients to be told.
FAREWELL_S = 2.0


@dataclass(frozen=True)
class ApiConfig:
    """What this process needs. `scheduler` is the endpoint of the scheduler's ROUTER, "ipc://…"; `model` what
    `pd.models.info.check_model` found. `worker` counts from 0; with `workers` > 1 all listen on one port, the first
    chooses it, and `shared` is a folder for what they have in common. `info` is shown by /server_info as it is:
    transfer, bootstrap_port, max_running_requests and what else the parent knows.
    """

    model: ModelInfo
    scheduler: str
    role: str = "unified"
    worker: int = 0
    workers: int = 1
    shared: str = ""
    http: HttpConfig = field(default_factory=HttpConfig)
    page_size: int = 32
    request_timeout: float = 600.0  # longest time without a new token, seconds
    limits: Limits = field(default_factory=Limits)
    chat: ChatConfig = field(default_factory=ChatConfig)
    log: LogConfig = field(default_factory=LogConfig)
    info: dict[str, Any] = field(default_factory=dict)
    created: int = 0  # when this instance began, in seconds: what /v1/models says of its model


Finished = Callable[[dict[str, Any]], None]


async def main(config: ApiConfig, context: ChildContext) -> None:
    """Serve until the parent asks to stop or the scheduler is lost. Raises ConfigError for a port that is taken."""
    log, plugins = get_logger(), load_plugins()
    sockets = Sockets()
    try:
        link = sockets.dial(
            zmq.DEALER,
            config.scheduler,
            # Patient: a starved machine must not cost an instance. A dead scheduler closes its connection anyway.
            LinkOptions(reconnect=False, identity=b"api-%d" % config.worker, heartbeat_misses=10),
            monitored=True,
        )
        send: Codec[ApiToScheduler] = Codec(ApiToScheduler)
        receive: Codec[SchedulerToApi] = Codec(SchedulerToApi)
        channel: Channel[ApiToScheduler, SchedulerToApi] = Channel(link, send, receive, "scheduler")
        assert link.monitor is not None

        def finished(summary: dict[str, Any]) -> None:
            log.info("request_finished", **summary)
            plugins.request_finished(summary)

        service = Service(config, channel, finished)
        plugins.process_started("api", config)
        # What start-up made lives as long as the process: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        try:
            await service.run(context.stopping, context.report_ready, link.monitor)
        finally:
            plugins.process_stopping("api")
            channel.close()
    finally:
        sockets.close()


class Service:
    """The process's parts and their order of start and end. `finished` observes every generating request."""

    def __init__(self, config: ApiConfig, channel: SchedulerChannel, finished: Finished) -> None:
        self.config = config
        self.tokenizer = Tokenizer(config.model.path, config.chat.chat_template)
        latencies = Latencies.shared(Path(config.shared), config.worker) if config.workers > 1 else Latencies()
        self.engine = Engine(
            channel,
            self._detokenizer,
            latencies,
            worker=config.worker,
            idle_timeout_s=config.request_timeout,
        )
        formats = ChatFormats.of(self.tokenizer.templates, config.chat.tool_call_parser, config.chat.reasoning_parser)
        limits = replace(config.limits, body_bytes=config.http.max_request_bytes)
        access = Access.of(config.http)
        context = Context(
            self.engine, self.tokenizer, latencies, served(config), limits, finished, formats, access=access
        )
        self.app = App(context, _report)

    def _detokenizer(self, prompt: Prompt) -> Any:
        return self.tokenizer.detokenizer(
            prompt.tokens, skip_special_tokens=prompt.skip_special_tokens, shown=prompt.shown_tokens
        )

    async def run(
        self,
        stopping: asyncio.Event,
        report_ready: Callable[[Mapping[str, Any]], None],
        monitor: Monitor | None = None,
    ) -> None:
        """Bind, serve, and on `stopping` refuse new requests, finish running ones within the drain bound, end.

        Raises ProcessError when the scheduler is lost before it was drained: its clients have been told by then.
        """
        listener = self._listen() if self.config.worker == 0 else None
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(self.engine.run()),
                group.create_task(self.engine.sweep()),
                group.create_task(self.app.writers.sweep()),
            ]
            if monitor is not None:
                background.append(group.create_task(self._watch(monitor)))
            if listener is None:
                # Who joins the port of others must be able to serve what the kernel hands over from then on.
                await self._either(self.engine.heard, stopping, self.engine.lost)
                listener = self._listen()
            host, port = self.config.http.host, listener.getsockname()[1]
            server = HttpServer(self.app, lambda: report_ready({"host": host, "port": port}), self.config.http)
            serving = group.create_task(server.serve([listener]))
            try:
                await self._until_end(stopping)
                reason = self.engine.lost_reason
            finally:
                server.should_exit = True
                await serving
                for task in background:
                    task.cancel()
                self.tokenizer.close()
        if reason and self.engine.info.state is not InstanceState.DRAINING:
            raise ProcessError("scheduler", reason)

    def _listen(self) -> socket.socket:
        http, shared = self.config.http, self.config.workers > 1
        try:
            if shared and self.config.worker == 0 and http.port:
                bind(http.host, http.port).close()  # a shared port would not notice that another instance has it
            return bind(http.host, http.port, shared=shared)
        except OSError as error:
            raise ConfigError("--port", f"cannot listen on {http.host}:{http.port}: {error}") from error

    @staticmethod
    async def _either(*events: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _until_end(self, stopping: asyncio.Event) -> None:
        await self._either(stopping, self.engine.lost)
        self.engine.stop_accepting()
        if not self.engine.lost.is_set():
            await self._idle(self.config.http.drain_timeout)
            self.engine.fail_all("the instance is shutting down", status=503)
        await self._idle(FAREWELL_S)

    async def _idle(self, bound_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.app.idle.wait(), bound_s)

    async def _watch(self, monitor: Monitor) -> None:
        """A closed or silent connection is known at once; the scheduler never comes back as the same one."""
        async for event in monitor:
            if event.kind is LinkEventKind.DISCONNECTED:
                self.engine.disconnected()
                return


def served(config: ApiConfig) -> Served:
    model = config.model
    limits = ModelLimits(model.vocab_size, model.context_length, model.eos_token_ids, Defaults.read(model.path))
    info = {"page_size": config.page_size, "dtype": model.dtype, "kv_cache_dtype": model.cache_dtype, **config.info}
    return Served(model.name, model.path, config.role, limits, info, created=config.created)


def _report(error: BaseException) -> None:
    get_logger().error("request_crashed", exc_info=error)
