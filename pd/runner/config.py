"""The runner's slice of the configuration. No torch: the parent makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pd.config import CacheConfig, ControlConfig, LogConfig, ModelConfig, TransferConfig


@dataclass(frozen=True)
class RunnerConfig:
    """`identity` names this incarnation and rank to peers. `host` is where its data plane listens.

    The endpoints are the scheduler's, `ipc://`; a unified instance needs no `transfer_endpoint`. `threads` 0 means one
    for small models (more would only wait for each other) and torch's own number otherwise. `max_running` requests
    at most are decoded at once. `fault` as `pd.faults` makes it.
    """

    role: str
    identity: str
    step_endpoint: str
    transfer_endpoint: str = ""
    rank: int = 0
    host: str = "127.0.0.1"
    threads: int = 0
    max_running: int = 256
    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    profile_dir: str = "/tmp"
    log: LogConfig = field(default_factory=LogConfig)
    fault: str = ""
