"""`direct` between processes of one host, over shared memory."""

from typing import ClassVar

import pytest

from pd.testing import NO_AUTHENTICATION, TransferConformance


@pytest.mark.slow
class TestDirectShm(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    options: ClassVar = {"transfer_memory": "shm"}
    receiver_driven = True
    exceptions: ClassVar = dict.fromkeys(NO_AUTHENTICATION, "no secret is set: the same tests with one are below")


class TestDirectShmSecret(TransferConformance):
    """The default memory, with a cluster secret."""

    factory = "pd.transfer.plugin:make_direct"
    secret = "cluster secret"
    receiver_driven = True
    authenticates = True
