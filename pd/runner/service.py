"""The runner's process: loads the model, opens the data plane, then executes step orders until it is stopped."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import zmq

from pd import logs
from pd.abc import TransferBackend
from pd.faults import FaultPoints
from pd.ipc.channel import SyncChannel
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkOptions, Sockets
from pd.messages import (
    GrammarCompile,
    RunnerFailed,
    RunnerReady,
    RunnerToScheduler,
    SchedulerToRunner,
    StartProfile,
    StepDone,
    StepOrder,
    StopProfile,
)
from pd.models.info import check_model
from pd.plugins import Plugins, load_plugins
from pd.runner.config import RunnerConfig
from pd.runner.device import mib, open_device
from pd.runner.ends import StepEnds
from pd.runner.grammar import Grammars
from pd.runner.profiler import Profiler
from pd.runner.transfer import HIGH_WATER, command_port, make_engine, open_backend
from pd.screen import KV_POOL, Report, Stage
from pd.transfer.digest import DIGEST_NAME
from pd.transfer.engine import TransferEngine
from pd.types import Role

if TYPE_CHECKING:
    from pd.process import ChildContext

#: Seconds to wait for room in the scheduler's queue: it always reads, so a full queue means that it hangs.
SEND_TIMEOUT = 10.0

#: Seconds that RunnerFailed may spend on its way when the process ends.
LINGER = 1.0

#: Where computing and copying take the same cores as the processes that decide and answer, those go first. Measured
#: on two busy cores: the scheduler's loop is late by p99 4.5 ms instead of 6.2.
CPU_NICE = 5


class Alarm:
    """Carries the first exception of another thread to the main one, which polls `fd`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._error: BaseException | None = None

    def ring(self, error: BaseException) -> None:
        """From any thread."""
        self._error = self._error or error
        os.eventfd_write(self.fd, 1)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        os.close(self.fd)


class Steps(Protocol):
    """A worker: `launch` as orders come, `finish` once for each step that has ended."""

    def launch(self, order: StepOrder) -> None: ...

    def finish(self) -> StepDone: ...


@dataclass(frozen=True)
class Runner:
    """What start-up made."""

    worker: Steps
    ends: StepEnds
    ready: RunnerReady
    grammars: Grammars


def main(config: RunnerConfig, context: ChildContext) -> None:
    """Process target. Whatever goes wrong, in a step or before, is told to the scheduler and then raised."""
    log = logs.get_logger(rank=config.rank)
    if config.model.device != "cuda":
        os.nice(CPU_NICE)
    with ExitStack() as resources:
        sockets = Sockets()
        resources.callback(sockets.close)
        link = sockets.dial(
            zmq.PAIR, config.step_endpoint, LinkOptions(heartbeat=0, high_water=HIGH_WATER, linger=LINGER)
        )
        results: Codec[RunnerToScheduler] = Codec(RunnerToScheduler)
        orders: Codec[SchedulerToRunner] = Codec(SchedulerToRunner)
        channel = SyncChannel(link, results, orders, "steps")
        resources.callback(channel.close)
        try:
            alarm = Alarm()
            resources.callback(alarm.close)
            plugins = load_plugins()
            runner = build(config, plugins, sockets, alarm, resources, log.info, context.report_progress)
            # What start-up made lives as long as the process: the collector need not walk it again and again.
            gc.collect()
            gc.freeze()
            channel.send(runner.ready, SEND_TIMEOUT)
            context.report_ready({"num_blocks": runner.ready.num_blocks, "block_bytes": runner.ready.block_bytes})
            plugins.process_started("runner", config)
            resources.callback(plugins.process_stopping, "runner")
            profiler = Profiler(_label(config), config.profile_dir, lambda said: channel.send(said, SEND_TIMEOUT))
            resources.callback(profiler.close)
            serve(channel, runner, context, alarm, profiler, FaultPoints.of(config.fault))
        except Exception as error:
            channel.send(RunnerFailed(config.rank, _one_line(error)), SEND_TIMEOUT)
            raise


def build(
    config: RunnerConfig,
    plugins: Plugins,
    sockets: Sockets,
    alarm: Alarm,
    resources: ExitStack,
    log: Callable[..., None],
    report: Report,
) -> Runner:
    """Everything that a runner needs before its first order. `resources` closes what this opens."""
    device = open_device(config, report)
    info = check_model(
        config.model.model,
        dtype=config.model.dtype,
        kv_cache_dtype=config.cache.kv_cache_dtype,
        name=config.model.served_model_name,
        context_length=config.model.context_length,
        supported=plugins.models(),
        tokenizer=False,
        dummy=config.model.load_format == "dummy",
    )
    grammars = Grammars(info.path, info.vocab_size, info.eos_token_ids)
    resources.callback(grammars.close)
    ends = StepEnds(alarm.ring)
    resources.callback(ends.close)
    device.load(info, plugins.models(), log)
    stage = Stage(report, KV_POOL, 1)
    backend: TransferBackend | None = None
    if config.role != Role.UNIFIED.value:
        backend = open_backend(config, plugins.backends(), device.memory, log)
    pool = device.make_pool(info, backend)
    engine: TransferEngine | None = None
    if backend is not None:
        engine = make_engine(config, backend, pool.region, pool.shape, device.memory, alarm.ring)
        resources.callback(engine.close)
    stage.end()
    log(
        "kv pool",
        blocks=pool.num_blocks,
        tokens=(pool.num_blocks - 1) * pool.shape.tokens,
        mib=mib(pool.region.nbytes),
    )
    worker = device.make_worker(info, engine.push if engine is not None else None, grammars, ends, log)
    ready = RunnerReady(
        rank=config.rank,
        num_blocks=pool.num_blocks,
        identity=config.identity,
        descriptor=engine.descriptor() if engine is not None else b"",
        layers=(0, info.num_layers),
        kv_heads=(0, info.num_kv_heads),
        block_bytes=pool.shape.nbytes,
        digest=DIGEST_NAME,
        model=info,
    )
    if engine is not None:
        engine.start(command_port(sockets, config.transfer_endpoint))
    return Runner(worker, ends, ready, grammars)


def serve(
    channel: SyncChannel[RunnerToScheduler, SchedulerToRunner],
    runner: Runner,
    context: ChildContext,
    alarm: Alarm,
    profiler: Profiler,
    faults: FaultPoints | None = None,
) -> None:
    """Execute orders as they come; returns when a stop is requested."""
    poller = zmq.Poller()
    ends, pushing = runner.ends, deque[bool]()
    readable = (
        channel.link.socket,
        context.stop_fd,
        alarm.fd,
        runner.grammars.compiled_fd,
        profiler.written_fd,
        ends.fd,
    )
    for source in readable:
        poller.register(source, zmq.POLLIN)
    while not context.stop_requested():
        while ends.take():  # first: clients wait for it
            done = runner.worker.finish()
            if pushing.popleft() and faults is not None:  # they are on their way, and nobody knows yet
                faults.reached("push")
            channel.send(done, SEND_TIMEOUT)
        order = channel.recv(0)
        if order is None:
            alarm.check()
            for compiled in runner.grammars.take_compiled():
                channel.send(compiled, SEND_TIMEOUT)
            profiler.written()
            poller.poll()
        elif isinstance(order, GrammarCompile):
            runner.grammars.compile(order)
        elif isinstance(order, StartProfile | StopProfile):
            profiler.command(order)
        else:
            profiler.before(order)
            if faults is not None:
                faults.reached("step")
            pushing.append(bool(order.pushes))
            runner.worker.launch(order)
            profiler.after()


def _label(config: RunnerConfig) -> str:
    """How its traces call it: INSTANCE-ROLE-rankN."""
    return f"{config.identity.rsplit('/', 2)[0]}-{config.role}-rank{config.rank}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
