"""The runner's side of the data plane: opens the backend, lays the KV pool into its memory, starts the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import zmq

from pd.abc import BackendContext, BackendInfo, DeviceMemory, Region, TransferBackend
from pd.errors import BackendUnavailable, ConfigError
from pd.ipc.channel import SyncChannel
from pd.ipc.codec import Codec
from pd.ipc.keys import derive_keys
from pd.ipc.zmq import LinkOptions, Sockets
from pd.messages import TransferCommand, TransferEvent
from pd.runner.config import RunnerConfig
from pd.transfer.engine import EngineConfig, TransferEngine
from pd.transfer.port import ChannelPort
from pd.transfer.spans import Pool
from pd.types import BlockShape

#: Messages in either direction that may wait; the scheduler reads all the time.
HIGH_WATER = 65536


def backend_options(config: RunnerConfig, info: BackendInfo) -> dict[str, str]:
    """The settings that the backend accepts, by field name, as text; unset ones and False are left out."""
    values: dict[str, object] = {**vars(config.transfer), **vars(config.control)}
    return {name: str(values[name]) for name in sorted(info.accepts) if values.get(name)}


def open_backend(
    config: RunnerConfig, backends: Mapping[str, BackendInfo], memory: DeviceMemory, log: Callable[..., None]
) -> TransferBackend:
    """The configured backend, opened under this runner's identity. Raises ConfigError, BackendUnavailable."""
    name = config.transfer.transfer
    info = backends.get(name)
    if info is None:
        raise ConfigError("--transfer", f"no transfer backend {name!r}", f"installed: {', '.join(sorted(backends))}")
    reason = info.unavailable()
    if reason:
        raise BackendUnavailable(name, "not usable here", reason)
    secret = config.control.cluster_secret
    backend = info.factory(
        BackendContext(
            host=config.host,
            device=memory.device,
            memory=memory,
            secret=derive_keys(secret).data if secret else None,
            options=backend_options(config, info),
            log=log,
            role=config.role,
        )
    )
    backend.open(config.identity)
    return backend


def engine_config(config: RunnerConfig) -> EngineConfig:
    settings = config.transfer
    return EngineConfig(
        threads=settings.transfer_threads,
        queues=settings.transfer_queues,
        timeout=settings.transfer_timeout,
        rank=config.rank,
    )


def make_engine(
    config: RunnerConfig,
    backend: TransferBackend,
    region: Region,
    shape: BlockShape,
    memory: DeviceMemory,
    failed: Callable[[BaseException], None],
) -> TransferEngine:
    """An engine whose pool is registered. It owns the backend from now on; `failed` may be called from any thread."""
    engine = TransferEngine(backend, [Pool(region, shape)], memory, engine_config(config), failed)
    engine.register()
    return engine


def command_port(sockets: Sockets, endpoint: str) -> ChannelPort:
    """Dial the scheduler's transfer socket."""
    link = sockets.dial(zmq.PAIR, endpoint, LinkOptions(heartbeat=0, high_water=HIGH_WATER))
    events: Codec[TransferEvent] = Codec(TransferEvent)
    commands: Codec[TransferCommand] = Codec(TransferCommand)
    return ChannelPort(SyncChannel(link, events, commands, "transfer"))
