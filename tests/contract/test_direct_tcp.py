"""`direct` over TCP."""

from typing import ClassVar

from pd.testing import TransferConformance


class TestDirectTcp(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    options: ClassVar = {"transfer_memory": "tcp"}
    secret = "cluster secret"
    receiver_driven = True
    authenticates = True
