"""A prefill instance whose scheduler's loop is stuck, while its sockets' threads go on: only heartbeats notice that."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_kit import prompt
from fault_kit import eventually, fault_cluster

pytestmark = [pytest.mark.process, pytest.mark.slow]

#: Where it stands still, for one second.
POINT = "prefill-0.scheduler.got:Prefill"


@pytest.mark.parametrize(("failures", "used"), [(2, "prefill-1"), (9, "prefill-0")])
def test_a_stuck_loop_is_given_up_after_so_many_heartbeats_and_not_before(
    tmp_path: Path, failures: int, used: str
) -> None:
    """Lost after 0.1 s x 2 and half a second, or within 0.1 s x 9 and half a second not at all."""
    flags = ("--heartbeat-interval", "0.1", "--heartbeat-max-failure", str(failures))
    with fault_cluster(tmp_path, *flags) as cluster:
        cluster.wait_until_healthy()
        warm = cluster.ask(prompt(70), stream=False).start().wait()  # both sessions are up
        assert (warm.outcome, warm.used) == ("tokens", "prefill-0")
        cluster.faults.arm(POINT)
        ask = cluster.ask(prompt(70, 1), stream=False).start()
        cluster.faults.wait((POINT,))
        ask.wait()
        assert (ask.outcome, ask.used) == ("tokens", used), ask
        lost = [line for line in cluster.command.logged("prefill_down") if line["reason"] == "heartbeats missed"]
        assert bool(lost) == (used == "prefill-1")
        eventually(lambda: cluster.clean("prefill-0") and cluster.clean("decode-0"), 10.0)
