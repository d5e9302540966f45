"""`direct` over TCP."""

from typing import ClassVar

import pytest

from pd.testing import TransferConformance
from tests.suite_kit import SHORT, in_short, run_alone


@pytest.mark.slow
class TestDirectTcp(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    options: ClassVar = {"transfer_memory": "tcp"}
    secret = "cluster secret"
    receiver_driven = True
    authenticates = True


@in_short({TestDirectTcp: SHORT})
def test_in_short(kind: type[TestDirectTcp], name: str) -> None:
    run_alone(kind, name)
