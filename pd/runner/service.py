"""The runner's process: loads the model, opens the data plane, then executes step orders until it is stopped."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import zmq

from pd import logs
from pd.abc import TransferBackend
from pd.errors import ConfigError
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
    StopProfile,
)
from pd.models.checkpoint import read_checkpoint
from pd.models.info import check_model
from pd.models.registry import Model
from pd.plugins import Plugins, load_plugins
from pd.runner.config import RunnerConfig
from pd.runner.grammar import Grammars
from pd.runner.kv_pool import KvPool, allocate_region, count_blocks, free_memory
from pd.runner.loading import TORCH_DTYPES, load_model
from pd.runner.memory import HostMemory
from pd.runner.profiler import Profiler
from pd.runner.transfer import HIGH_WATER, command_port, make_engine, open_backend
from pd.runner.worker import Worker
from pd.transfer.digest import DIGEST_NAME, DigestGeometry, digest_blocks
from pd.transfer.engine import TransferEngine
from pd.types import BlockShape, ModelInfo, Role

if TYPE_CHECKING:
    from pd.process import ChildContext

#: Seconds to wait for room in the scheduler's queue: it always reads, so a full queue means that it hangs.
SEND_TIMEOUT = 10.0

#: Seconds that RunnerFailed may spend on its way when the process ends.
LINGER = 1.0

#: Seconds between two lines of loading progress.
PROGRESS_INTERVAL = 2.0

#: Where computing and copying take the same cores as the processes that decide and answer, those go first. Measured
#: on two busy cores: the scheduler's loop is late by p99 4.5 ms instead of 6.2.
CPU_NICE = 5

#: Models with fewer bytes of weights compute faster on one thread than on several that wait for each other.
SMALL_MODEL = 256 << 20


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


@dataclass(frozen=True)
class Runner:
    """What start-up made."""

    worker: Worker
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
            runner = build(config, plugins, sockets, alarm, resources, log.info)
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
) -> Runner:
    """Everything that a runner needs before its first order. `resources` closes what this opens."""
    if config.model.device == "cuda":
        raise ConfigError("--device", "cuda: this runner computes on the CPU only", "use --device cpu")
    info = check_model(
        config.model.model,
        dtype=config.model.dtype,
        name=config.model.served_model_name,
        context_length=config.model.context_length,
        supported=plugins.models(),
        tokenizer=False,
    )
    grammars = Grammars(info.path, info.vocab_size, info.eos_token_ids)
    resources.callback(grammars.close)
    model = _load(config, info, plugins, log)
    memory = HostMemory()
    backend: TransferBackend | None = None
    if config.role != Role.UNIFIED.value:
        backend = open_backend(config, plugins.backends(), memory, log)
    pool = _make_pool(config, info, backend)
    engine: TransferEngine | None = None
    if backend is not None:
        engine = make_engine(config, backend, pool.region, pool.shape, memory, alarm.ring)
        resources.callback(engine.close)
    geometry = DigestGeometry(pool.shape)
    worker = Worker(
        model,
        pool,
        vocab_size=info.vocab_size,
        rank=config.rank,
        digest=lambda ids, tokens: digest_blocks(pool.bytes, pool.shape.nbytes, ids, tokens, geometry),
        push=engine.push if engine is not None else None,
        grammars=grammars,
    )
    worker.warm_up()
    log(
        "kv pool",
        blocks=pool.num_blocks,
        tokens=(pool.num_blocks - 1) * pool.shape.tokens,
        mib=_mib(pool.region.nbytes),
    )
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
    return Runner(worker, ready, grammars)


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
    for source in (channel.link.socket, context.stop_fd, alarm.fd, runner.grammars.compiled_fd, profiler.written_fd):
        poller.register(source, zmq.POLLIN)
    while not context.stop_requested():
        alarm.check()
        for compiled in runner.grammars.take_compiled():
            channel.send(compiled, SEND_TIMEOUT)
        profiler.written()
        order = channel.recv(0)
        if order is None:
            poller.poll()
        elif isinstance(order, GrammarCompile):
            runner.grammars.compile(order)
        elif isinstance(order, StartProfile | StopProfile):
            profiler.command(order)
        else:
            profiler.before(order)
            if faults is not None:
                faults.reached("step")
            done = runner.worker.step(order)
            if faults is not None and order.pushes:  # they are on their way, and nobody knows yet
                faults.reached("push")
            channel.send(done, SEND_TIMEOUT)
            profiler.after()


def _load(config: RunnerConfig, info: ModelInfo, plugins: Plugins, log: Callable[..., None]) -> Model:
    nbytes = sum(size for _, size in read_checkpoint(info.path).files.values())
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    elif nbytes < SMALL_MODEL:
        torch.set_num_threads(1)
    log("loading model", model=info.name, architecture=info.architecture, dtype=info.dtype, mib=_mib(nbytes))
    started = reported = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > PROGRESS_INTERVAL:
            reported = time.monotonic()
            log("loading model", tensors=f"{done}/{total}")

    model = load_model(info, plugins.models(), progress=progress)
    log("model loaded", seconds=round(time.monotonic() - started, 2), threads=torch.get_num_threads())
    return model


def _make_pool(config: RunnerConfig, info: ModelInfo, backend: TransferBackend | None) -> KvPool:
    dtype = TORCH_DTYPES[info.dtype]
    shape = BlockShape(config.cache.page_size, info.num_kv_heads, info.num_layers, info.head_dim, dtype.itemsize)
    blocks = count_blocks(
        shape,
        max_total_tokens=config.cache.max_total_tokens,
        fraction=config.cache.mem_fraction_static,
        free_bytes=free_memory(),
    )
    region = allocate_region(blocks * shape.nbytes, backend.allocate if backend is not None else None)
    return KvPool(region, shape, blocks, dtype)


def _label(config: RunnerConfig) -> str:
    """How its traces call it: INSTANCE-ROLE-rankN."""
    return f"{config.identity.rsplit('/', 2)[0]}-{config.role}-rank{config.rank}"


def _mib(nbytes: int) -> float:
    return round(nbytes / 2**20, 1)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
