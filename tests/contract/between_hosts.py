"""The conformance suite with this process on one host and every peer on another one.

Not collected by itself: test_direct_netns.py runs it inside a network namespace, with the addresses and the other's
name in the environment.
"""

from __future__ import annotations

import os

from pd.testing import TransferConformance
from pd.testing.transfer_harness import BLOCK
from pd.testing.transfer_peer import RemoteSide

HERE, THERE, NAMESPACE = os.environ["BETWEEN_HOSTS"].split()


class TestBetweenHosts(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    secret = "cluster secret"
    host = HERE
    receiver_driven = True
    authenticates = True

    def remote(self, identity: str, secret: str | None = None, regions: int = 1) -> RemoteSide:
        known = self.secret if secret is None else secret
        remote = RemoteSide(self.factory, THERE, known, self.options, ["ip", "netns", "exec", NAMESPACE])
        self._remotes.append(remote)
        remote.identity = identity
        remote.call("open", identity, self.region, BLOCK, regions)
        return remote

    def test_nothing_listens_beyond_the_configured_host(self) -> None:
        remote = self.connected("there")
        self.works(remote)
        assert set(remote.call("listeners")) == {THERE}
