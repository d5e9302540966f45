"""`direct` between processes of one host, over shared memory."""

from typing import ClassVar

from pd.testing import TransferConformance


class TestDirectShm(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    options: ClassVar = {"transfer_memory": "shm"}
    receiver_driven = True


class TestDirectShmSecret(TransferConformance):
    """The default memory, with a cluster secret."""

    factory = "pd.transfer.plugin:make_direct"
    secret = "cluster secret"
    receiver_driven = True
    authenticates = True
