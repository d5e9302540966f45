"""`direct` over TCP."""

from typing import ClassVar

import pytest

from pd.testing import TransferConformance
from tests.suite_kit import SHORT_REVOCABLE, in_short, run_alone


@pytest.mark.slow
class TestDirectTcp(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    options: ClassVar = {"transfer_memory": "tcp"}
    secret = "cluster secret"
    receiver_driven = True
    authenticates = True


@in_short(
    {
        TestDirectTcp: (
            *SHORT_REVOCABLE,
            "test_nothing_listens_beyond_the_configured_host",
            "test_a_frozen_receiver_holds_up_nobody_else",
            "test_threads_may_post_to_different_peers_at_the_same_time",
            "test_an_idle_peer_costs_no_cpu",
        )
    }
)
def test_in_short(kind: type[TransferConformance], name: str) -> None:
    run_alone(kind, name)
