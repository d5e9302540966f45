"""A setting that is parsed but does not arrive where it acts: each gets a value of its own, which is looked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

import pd
from pd.abc import BackendInfo
from pd.api.service import ApiConfig
from pd.config import CacheConfig, ChatConfig, ControlConfig, SchedulerConfig, ServeConfig, TransferConfig
from pd.instance import Plan
from pd.runner.config import RunnerConfig
from pd.runner.transfer import backend_options, engine_config
from pd.scheduler import events as ev
from pd.scheduler.core import Core, SchedulerSettings
from pd.scheduler.handoff import HandoffConfig
from pd.scheduler.service import SchedulerProcessConfig
from pd.scheduler.state import Scheduler
from pd.testing.instance import TINY_MODEL, runner_ready
from pd.transfer.engine import EngineConfig

GROUPS: dict[str, type] = {
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "transfer": TransferConfig,
    "control": ControlConfig,
    "chat": ChatConfig,
}


@dataclass(frozen=True)
class Built:
    """What the processes of one instance make of its settings."""

    process: SchedulerProcessConfig
    core: Core
    handoff: HandoffConfig
    runner: RunnerConfig
    engine: EngineConfig
    api: ApiConfig

    @property
    def settings(self) -> SchedulerSettings:
        return self.process.settings

    def option(self, name: str) -> str | None:
        """What a backend that accepts this option is told."""
        return backend_options(self.runner, BackendInfo("b", _no_backend, accepts=frozenset({name}))).get(name)


def _no_backend(context: object) -> Any:
    raise AssertionError("no backend is made here")


Find = Callable[[Built], object]

#: Setting -> (a value of its own, where it must be found). A path instead of a finder is the module that reads the
#: value from the settings as they are, in a process that is not made here.
TABLE: dict[str, tuple[Any, Find | str]] = {
    "cache.page_size": (8, lambda b: {b.core.page_size, b.core.batcher.limits.page_size, b.api.page_size}),
    "cache.max_total_tokens": (640, "runner/device.py"),
    "cache.mem_fraction_static": (0.31, "runner/device.py"),
    "cache.kv_cache_dtype": ("fp8_e4m3", "runner/service.py"),
    "cache.disable_prefix_cache": (True, lambda b: not b.core.prefix.enabled),
    "scheduler.max_running_requests": (17, lambda b: b.core.batcher.limits.max_running),
    "scheduler.max_queued_requests": (33, "scheduler/state.py"),
    "scheduler.chunked_prefill_size": (48, lambda b: b.core.batcher.limits.chunk),
    "scheduler.max_prefill_tokens": (640, "scheduler/report.py"),  # and the step budget of a prefill instance
    "scheduler.local_prefill": ("short:5", lambda b: f"short:{b.settings.short_prefill}"),
    "scheduler.local_prefill_tokens": (96, lambda b: b.core.batcher.limits.prefill_tokens),
    "scheduler.local_prefill_queue": (1234, "scheduler/admission.py"),
    "scheduler.reserve_blocks": (3, lambda b: b.core.batcher.limits.reserve_blocks),
    "scheduler.request_timeout": (61.0, lambda b: b.api.request_timeout),
    "scheduler.step_timeout": (62.0, lambda b: b.handoff.step_timeout),
    "transfer.transfer": ("other", lambda b: b.settings.transfer),
    "transfer.ib_device": ("mlx5_7", lambda b: b.option("ib_device")),
    "transfer.transfer_threads": (7, lambda b: b.engine.threads),
    "transfer.transfer_queues": (9, lambda b: b.engine.queues),
    "transfer.transfer_timeout": (63.0, lambda b: b.engine.timeout),
    "transfer.transfer_memory": ("tcp", lambda b: b.option("transfer_memory")),
    "control.control_host": ("127.0.0.9", lambda b: b.process.control_host),
    "control.control_port": (4321, "scheduler/service.py"),
    "control.cluster_secret": ("whisper", lambda b: b.process.secret),
    "control.insecure_control_plane": (True, lambda b: b.option("insecure_control_plane") == "True"),
    "control.bootstrap_timeout": (64.0, "scheduler/prefill_side.py"),
    "control.waiting_timeout": (65.0, lambda b: b.handoff.waiting_timeout),
    "control.heartbeat_interval": (1.5, lambda b: b.handoff.heartbeat_interval),
    "control.heartbeat_max_failure": (4, lambda b: b.handoff.heartbeat_max_failure),
    "control.watchdog_timeout": (66.0, "instance.py"),
    "control.link_heartbeat": (0.7, "scheduler/links.py"),
    "control.connect_timeout": (2.5, lambda b: b.handoff.connect_timeout),
    "chat.chat_template": ("{{ 1 }}", lambda b: b.api.chat.chat_template),
    "chat.tool_call_parser": ("hermes", lambda b: b.api.chat.tool_call_parser),
    "chat.reasoning_parser": ("none", lambda b: b.api.chat.reasoning_parser),
}


def changed() -> ServeConfig:
    """Every setting of the table at the table's value."""
    config, made = ServeConfig(), {}
    for group in GROUPS:
        values = {name.partition(".")[2]: value for name, (value, _) in TABLE.items() if name.startswith(f"{group}.")}
        made[group] = replace(getattr(config, group), **values)
    return replace(config, **made)


def build(config: ServeConfig, role: str) -> Built:
    plan = Plan(replace(config, role=role), TINY_MODEL, "name", 1, config.control.control_host, Path("folder"))
    process, runner, api = plan.scheduler().config, plan.runner().config, plan.api(0).config
    scheduler = Scheduler(process.settings)
    scheduler.handle(ev.RunnerUp(0.0, runner_ready(65)))
    side = scheduler.decode or scheduler.prefill
    assert scheduler.core is not None and side is not None
    return Built(process, scheduler.core, side.handoffs.config, runner, engine_config(runner), api)


def settings_of(config: ServeConfig) -> dict[str, Any]:
    return {
        f"{group}.{item.name}": getattr(getattr(config, group), item.name)
        for group, kind in GROUPS.items()
        for item in fields(kind)
    }


def test_every_setting_of_these_groups_is_in_the_table_at_a_value_that_is_not_its_default() -> None:
    defaults = settings_of(ServeConfig())
    assert set(TABLE) == set(defaults)
    assert not [name for name, (value, _) in TABLE.items() if value == defaults[name]]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_every_setting_arrives_where_it_acts(role: str) -> None:
    built = build(changed(), role)
    for name, (value, find) in TABLE.items():
        if isinstance(find, str) or (role == "prefill" and name == "scheduler.local_prefill_tokens"):
            continue
        found = find(built)
        assert (found == {value}) if isinstance(found, set) else (found == value), f"{name} is {found!r}"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_part_that_has_a_field_of_a_settings_name_has_its_value(role: str) -> None:
    """What was forgotten in the table's finders as well: a new field of that name that nobody fills."""
    config = changed()
    built = build(config, role)
    by_name = {name.partition(".")[2]: value for name, value in settings_of(config).items()}
    for part in (built.handoff, built.engine, built.core.batcher.limits):
        for item in fields(part):  # type: ignore[arg-type]
            name = {"threads": "transfer_threads", "queues": "transfer_queues", "timeout": "transfer_timeout"}
            setting = name.get(item.name, item.name)
            if setting in by_name:
                assert getattr(part, item.name) == by_name[setting], f"{type(part).__name__}.{item.name}"


def test_a_prefill_instance_computes_as_many_prompt_tokens_per_step_as_it_is_told() -> None:
    built = build(changed(), "prefill")
    assert built.core.batcher.limits.prefill_tokens == TABLE["scheduler.max_prefill_tokens"][0]


def test_settings_that_only_a_running_process_uses_are_read_where_the_table_says() -> None:
    root = Path(pd.__file__).parent
    for name, (_, find) in TABLE.items():
        if isinstance(find, str):
            assert f".{name.partition('.')[2]}" in (root / find).read_text(), f"{find} does not read {name}"


def test_the_schedulers_and_the_runners_process_get_the_settings_as_they_are() -> None:
    config = changed()
    built = build(config, "decode")
    assert (built.settings.scheduler, built.settings.cache) == (config.scheduler, config.cache)
    assert built.settings.control == replace(config.control, cluster_secret=""), "the secret travels by itself"
    assert (built.runner.cache, built.runner.transfer, built.runner.control) == (
        config.cache,
        config.transfer,
        config.control,
    )
