"""What an instance says of its KV blocks to its peers."""

from __future__ import annotations

from msgspec.structs import replace

from pd.messages import KvGroup
from pd.scheduler import events as ev
from pd.scheduler.state import Scheduler
from pd.testing.instance import TINY_MODEL, runner_ready, settings
from pd.types import ModelInfo, Role


def group(model: ModelInfo) -> KvGroup:
    scheduler = Scheduler(settings(Role.PREFILL))
    scheduler.handle(ev.RunnerUp(0.0, replace(runner_ready(65), model=model)))
    assert scheduler.prefill is not None
    (found,) = scheduler.prefill.handoffs.peers.identity.groups
    return found


def test_the_kv_dtype_and_the_scales_are_part_of_what_peers_compare() -> None:
    plain = group(TINY_MODEL)
    assert (plain.dtype, plain.scales) == ("float32", "")
    fp8 = group(replace(TINY_MODEL, kv_dtype="fp8_e4m3"))
    assert (fp8.dtype, fp8.scales) == ("fp8_e4m3", "")
    scaled = [group(replace(TINY_MODEL, kv_dtype="fp8_e4m3", kv_scales=((k, 0.5),))).scales for k in (1.0, 0.25)]
    assert len({"", *scaled}) == 3 and all(len(one) == 16 for one in scaled)
