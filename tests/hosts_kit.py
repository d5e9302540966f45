"""Two hosts for tests: network namespaces that a veth pair joins."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Names and addresses of two namespaces that a veth pair joins."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    names = [f"pdtest{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.231.7.1", "10.231.7.2"]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", "pd0", "netns", names[0], "type", "veth", "peer", "name", "pd0", "netns", names[1])
            for name, address in zip(names, addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "pd0")
                ip("-n", name, "link", "set", "pd0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces do not work here: {error.stderr.decode().strip()}")
        yield list(zip(names, addresses, strict=True))
