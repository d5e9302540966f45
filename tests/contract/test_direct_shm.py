"""`direct` between processes of one host, over shared memory."""

from typing import ClassVar

import pytest

from pd.testing import NO_AUTHENTICATION, TransferConformance
from tests.suite_kit import SHORT_REVOCABLE, in_short, run_alone


class TestDirectShmSecret(TransferConformance):
    """The default memory, with a cluster secret: the suite that is never shortened."""

    factory = "pd.transfer.plugin:make_direct"
    secret = "cluster secret"
    receiver_driven = True
    authenticates = True


@pytest.mark.slow
class TestDirectShm(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    options: ClassVar = {"transfer_memory": "shm"}
    receiver_driven = True
    exceptions: ClassVar = dict.fromkeys(NO_AUTHENTICATION, "no secret is set: the same tests with one are above")


@in_short(
    {
        TestDirectShm: (
            *(name for name in SHORT_REVOCABLE if name not in NO_AUTHENTICATION),
            "test_nothing_listens_beyond_the_configured_host",
        )
    }
)
def test_in_short(kind: type[TransferConformance], name: str) -> None:
    run_alone(kind, name)
