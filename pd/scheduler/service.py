"""The scheduler's process: an asyncio shell that moves events in and actions out. It decides nothing."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import structlog
import zmq

from pd import messages as m
from pd.config import LogConfig
from pd.errors import ChannelClosed, ChannelFull, ConfigError, ProtocolError
from pd.faults import FaultPoints
from pd.ipc.channel import Channel, Router
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkEventKind, LinkOptions, Sockets
from pd.plugins import load_plugins
from pd.scheduler import actions as ac
from pd.scheduler import events as ev
from pd.scheduler.core import SchedulerSettings
from pd.scheduler.links import Links
from pd.scheduler.state import Scheduler
from pd.types import Role

if TYPE_CHECKING:
    from pd.child import ChildContext

#: Seconds between ticks: how late a deadline or heartbeat may be noticed.
TICK = 0.05

#: Seconds for the last messages to reach the api and the peers before the sockets close.
LAST_WORDS = 0.1


@dataclass(frozen=True)
class SchedulerProcessConfig:
    """Endpoints are `ipc://` paths that this process binds; `control_host` is where a prefill instance listens.

    `fault` as `pd.faults` makes it.
    """

    settings: SchedulerSettings
    api_endpoint: str
    step_endpoint: str
    transfer_endpoint: str
    control_host: str = "127.0.0.1"
    secret: str = ""
    drain_timeout: float = 30.0
    log: LogConfig = field(default_factory=LogConfig)
    fault: str = ""


def api_identity(worker: int) -> bytes:
    """ZMQ identity of an api worker's DEALER."""
    return b"api-%d" % worker


class Service:
    """Owns the sockets and the loop's tasks; the machine's actions are carried out in order, one event at a time."""

    def __init__(self, config: SchedulerProcessConfig, tasks: asyncio.TaskGroup) -> None:
        self.config, self._group = config, tasks
        self._tasks: set[asyncio.Task[None]] = set()
        self.log = structlog.get_logger()
        self.clock = time.monotonic  # the loop's own clock counts milliseconds, a push takes less
        self.exit: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._events: deque[ev.Event] = deque()
        self._busy = False
        self._faults = FaultPoints.of(config.fault)
        self.sockets = Sockets(config.secret)
        ipc = LinkOptions(heartbeat=0, high_water=65536)
        self.api: Router[m.SchedulerToApi, m.ApiToScheduler] = Router(
            self.sockets.listen(zmq.ROUTER, config.api_endpoint, ipc), Codec(m.SchedulerToApi), Codec(m.ApiToScheduler)
        )
        runner = LinkOptions(heartbeat=config.settings.control.link_heartbeat, heartbeat_misses=6, high_water=65536)
        self.steps: Channel[m.SchedulerToRunner, m.RunnerToScheduler] = Channel(
            self.sockets.listen(zmq.PAIR, config.step_endpoint, runner, monitored=True),
            Codec(m.SchedulerToRunner),
            Codec(m.RunnerToScheduler),
            "runner",
        )
        self.transfer: Channel[m.TransferCommand, m.TransferEvent] = Channel(
            self.sockets.listen(zmq.PAIR, config.transfer_endpoint, ipc),
            Codec(m.TransferCommand),
            Codec(m.TransferEvent),
        )
        control = config.settings.control
        self.links = Links(self.sockets, self.apply, self.spawn, control, config.control_host)
        self._workers: set[bytes] = set()
        self._info: m.InstanceInfo | None = None
        self.endpoint = ""
        if config.settings.role is Role.PREFILL:
            self.endpoint = self._listen(control.control_port)
        settings = replace(config.settings, control_endpoint=self.endpoint)
        self.scheduler = Scheduler(settings)

    def _listen(self, port: int) -> str:
        try:
            return self.links.listen(port)
        except zmq.ZMQError as error:
            raise ConfigError(
                "--control-port",
                f"cannot listen on {self.config.control_host}:{port}: {error.strerror}",
                "give each prefill instance of a host a port of its own (--disaggregation-bootstrap-port is the same)",
            ) from error

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a coroutine that ends with the service; its failure ends the process."""
        task = self._group.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- events in, actions out ---

    def apply(self, event: ev.Event) -> None:
        """Handle an event now, or after the one that is being handled (a failed send is an event, too)."""
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                event = self._events.popleft()
                if self._faults is not None and isinstance(event, ev.PeerSaid):
                    self._faults.reached(f"got:{type(event.message).__name__}")
                for action in self.scheduler.handle(event):
                    self._do(action)
        finally:
            self._busy = False

    def _do(self, action: ac.Action) -> None:
        match action:
            case ac.RunStep(order):
                self._to_runner(self.steps, order)
            case ac.CompileGrammar(message) | ac.Profile(message):
                self._to_runner(self.steps, message)
            case ac.Reply(worker, message):
                self._reply(worker, message)
            case ac.SendPeer(session, message):
                self.links.send(session, message)
                if self._faults is not None:
                    self._faults.reached(f"sent:{type(message).__name__}")
            case ac.Transfer(command):
                self._to_runner(self.transfer, command)
            case ac.OpenSession(endpoint, hello, timeout):
                self.links.open(endpoint, hello, timeout)
            case ac.WelcomePeer(conn, welcome):
                self.links.welcome(conn, welcome)
            case ac.RefusePeer(conn, unwelcome):
                self.links.refuse(conn, unwelcome)
            case ac.CloseSession(session, _):
                self.links.close(session)
            case ac.Log(event, fields, level):
                getattr(self.log, level)(event, **dict(fields))
            case ac.Exit(code, reason):
                if not self.exit.done():
                    self.exit.set_result((code, reason))

    def _to_runner(self, channel: Channel, message: m.SchedulerToRunner | m.TransferCommand) -> None:
        try:
            channel.send_nowait(message)
        except (ChannelFull, ChannelClosed) as error:
            self.apply(ev.RunnerDied(self.clock(), f"cannot be reached: {error}"))

    def _reply(self, worker: int, message: m.SchedulerToApi) -> None:
        if isinstance(message, m.InstanceInfo):
            self._info = message
        for identity in self._workers if worker < 0 else (api_identity(worker),):
            try:
                self.api.send_nowait(identity, message)
            except ChannelClosed:
                self._api_gone(identity, "it is gone")
            except ChannelFull:
                self._api_gone(identity, "it does not read")

    def _api_gone(self, identity: bytes, reason: str) -> None:
        """Its requests have no reader any more."""
        self.log.warning("api_lost", worker=identity.decode(), reason=reason)
        self._workers = self._workers - {identity}
        self.apply(ev.ApiLost(self.clock(), int(identity.removeprefix(b"api-"))))

    # --- readers ---

    async def read_api(self) -> None:
        while True:
            try:
                identity, message = await self.api.recv()
            except ProtocolError as error:
                self.log.error("bad_message", sender="api", error=str(error))
                continue
            if identity not in self._workers:
                self._workers = self._workers | {identity}
                if self._info is not None:
                    self.api.send_nowait(identity, self._info)
            now, worker = self.clock(), int(identity.removeprefix(b"api-"))
            match message:
                case m.Submit():
                    self.apply(ev.RequestSubmitted(now, message))
                case m.Abort(key, reason, choice):
                    self.apply(ev.AbortRequested(now, key, reason, choice))
                case m.Ask():
                    self.apply(ev.Asked(now, worker, message))
                case m.AbortMatching() | m.Pause() | m.Continue():
                    self.apply(ev.Commanded(now, worker, message))
                case m.StartProfile() | m.StopProfile():
                    self.apply(ev.ProfileAsked(now, worker, message))
                case m.Drain(bound_ms):
                    self.apply(ev.DrainRequested(now, bound_ms / 1000))

    async def read_runner(self) -> None:
        while True:
            try:
                message = await self.steps.recv()
            except ProtocolError as error:
                self.apply(ev.RunnerDied(self.clock(), str(error)))
                return
            match message:
                case m.StepDone():
                    self.apply(ev.StepFinished(self.clock(), message))
                case m.GrammarCompiled(number, problem):
                    self.apply(ev.GrammarCompiled(self.clock(), number, problem))
                case m.ProfileAnswer() | m.ProfileBusy():
                    self.apply(ev.ProfileSaid(self.clock(), message))
                case m.RunnerReady():
                    self.apply(ev.RunnerUp(self.clock(), message))
                case m.RunnerFailed(_, reason):
                    self.apply(ev.RunnerDied(self.clock(), reason))
                    return

    async def read_transfer(self) -> None:
        while True:
            try:
                event = await self.transfer.recv()
            except ProtocolError as error:
                self.apply(ev.RunnerDied(self.clock(), f"transfer thread: {error}"))
                return
            self.apply(ev.TransferSaid(self.clock(), event))

    async def watch_runner(self) -> None:
        """A closed or silent connection is a dead or frozen runner."""
        monitor = self.steps.link.monitor
        assert monitor is not None
        async for event in monitor:
            if event.kind is LinkEventKind.DISCONNECTED:
                self.apply(ev.RunnerDied(self.clock(), "its connection is gone"))
                return

    async def tick(self) -> None:
        while True:
            due = self.clock() + TICK
            await asyncio.sleep(TICK)
            self.apply(ev.Tick(self.clock(), max(0.0, self.clock() - due)))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.links.close_all()
        for channel in (self.api, self.steps, self.transfer):
            channel.close()
        self.sockets.close()


async def main(config: SchedulerProcessConfig, context: ChildContext) -> int:
    """Process target. Returns the exit code: 0 after a drain, 1 when the runner is gone."""
    async with asyncio.TaskGroup() as tasks:
        service = Service(config, tasks)
        # What start-up made lives as long as the process: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        service.spawn(service.read_api(), "api")
        service.spawn(service.read_runner(), "runner")
        service.spawn(service.read_transfer(), "transfer")
        service.spawn(service.watch_runner(), "runner watch")
        service.spawn(service.tick(), "tick")
        service.spawn(_drain_on_stop(service, config, context), "drain")
        plugins = load_plugins()
        plugins.process_started("scheduler", config)
        context.report_ready({"control_endpoint": service.endpoint})
        code, reason = await service.exit
        service.log.info("scheduler_exit", code=code, reason=reason)
        plugins.process_stopping("scheduler")
        if code:
            context.fail(f"the runner died: {reason}")
        await asyncio.sleep(LAST_WORDS)
        service.close()
    return code


async def _drain_on_stop(service: Service, config: SchedulerProcessConfig, context: ChildContext) -> None:
    await context.stopping.wait()
    service.apply(ev.DrainRequested(service.clock(), config.drain_timeout))
