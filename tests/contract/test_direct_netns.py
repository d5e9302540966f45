"""`direct` between two network namespaces: no shared abstract sockets, another address, the default `auto`."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts_kit import ip

from pd.testing.transfer_harness import BLOCK, MIB
from pd.testing.transfer_peer import RemoteSide, checksum, pattern

FACTORY = "pd.transfer.plugin:make_direct"


def wait_applied(sender, ticket, timeout=20):
    deadline = time.monotonic() + timeout
    while not sender.call("poll", ticket):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_blocks_cross_hosts_with_a_secret_and_only_with_it(two_hosts):
    nbytes = 8 * MIB
    ends = []
    try:
        for (namespace, address), identity in zip(two_hosts, ("P", "D"), strict=True):
            # The wildcard: the descriptor must carry an address that the other side can dial.
            host = address if identity == "P" else "0.0.0.0"
            end = RemoteSide(FACTORY, host, "secret", {}, ["ip", "netns", "exec", namespace])
            ends.append(end)
            end.call("open", identity, nbytes, BLOCK)
        stranger = RemoteSide(FACTORY, two_hosts[0][1], "", {}, ["ip", "netns", "exec", two_hosts[0][0]])
        ends.append(stranger)
        stranger.call("open", "S", nbytes, BLOCK)
        sender, receiver = ends[:2]
        # Without a route the wildcard is not known to be reachable; the kernel then offers loopback.
        ip("-n", two_hosts[1][0], "route", "add", "default", "via", two_hosts[0][1])
        descriptor = receiver.call("descriptor")
        assert sender.call("connect", descriptor) == "D"
        sender.call("pattern", 4)
        receiver.call("grant", 1, [[0, nbytes]], "P")
        count = nbytes // BLOCK
        rows = [[0, (i * 5 % count) * BLOCK, 0, i * BLOCK, BLOCK] for i in range(count)]
        wait_applied(sender, sender.call("post", "D", rows, 1))
        source = pattern(4, nbytes).reshape(count, BLOCK)
        assert receiver.call("checksum") == checksum(source[[i * 5 % count for i in range(count)]].reshape(-1))
        with pytest.raises(Exception, match="token"):
            stranger.call("connect", descriptor)
        assert set(stranger.call("listeners")) == {"127.0.0.1"}
    finally:
        for end in ends:
            end.kill()


def test_a_link_that_goes_down_does_not_hold_up_revoke_expel_or_reset(two_hosts):
    nbytes = 8 * MIB
    ends = []
    try:
        for (namespace, address), identity in zip(two_hosts, ("P", "D"), strict=True):
            end = RemoteSide(FACTORY, address, "secret", {}, ["ip", "netns", "exec", namespace])
            ends.append(end)
            end.call("open", identity, nbytes, BLOCK)
        sender, receiver = ends
        assert sender.call("connect", receiver.call("descriptor")) == "D"
        sender.call("fill", 255)
        receiver.call("grant", 1, [[0, nbytes]], "P")
        ip("-n", two_hosts[0][0], "link", "set", "pd0", "down")
        ticket = sender.call("post", "D", [[0, 0, 0, 0, nbytes]], 1)
        start = time.monotonic()
        assert receiver.call("revoke", 1, "P") and receiver.call("expel", "P")
        assert sender.call("poll", ticket) is False
        sender.call("reset_peer", "D")
        assert time.monotonic() - start < 5
        ip("-n", two_hosts[0][0], "link", "set", "pd0", "up")
        time.sleep(0.5)
        assert receiver.call("count", 255) == 0
    finally:
        for end in ends:
            end.kill()


@pytest.mark.slow
def test_the_conformance_suite_passes_between_two_hosts(two_hosts):
    (namespace, here), (other, there) = two_hosts
    suite = Path(__file__).with_name("between_hosts.py")
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "pytest", str(suite)]
    environment = {**os.environ, "BETWEEN_HOSTS": f"{here} {there} {other}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 20, done.stdout
