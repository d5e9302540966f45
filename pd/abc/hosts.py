"""What backends need to know of the machine that they run on."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import psutil

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_HOST = ("0.0.0.0", "::", "")

RDMA_DEVICES = Path("/sys/class/infiniband")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_id() -> str:
    """The same for processes of one running kernel."""
    return BOOT_ID.read_text().strip()


def reachable_address(host: str) -> str:
    """An address for peers to dial: `host`, or for a wildcard the address from which packets leave this machine."""
    if host not in ANY_HOST:
        return host
    six = host == "::"
    with socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("2001:db8::1" if six else "192.0.2.1", 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if six else "127.0.0.1"


def interface_of(host: str) -> str | None:
    """The network interface that has this address; None for a wildcard. Raises OSError if no interface has it."""
    if host in ANY_HOST:
        return None
    wanted = {ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, None)}
    for name, addresses in psutil.net_if_addrs().items():
        found = {one.address.partition("%")[0] for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)}
        if wanted & {ipaddress.ip_address(one) for one in found}:
            return name
    raise OSError("no interface has it")


def missing_rdma_devices(names: str) -> str | None:
    """What is wrong with a list of RDMA devices ("mlx5_0,mlx5_1:1"), or None if this machine has them all.

    An empty list asks for any device.
    """
    here = sorted(path.name for path in RDMA_DEVICES.iterdir()) if RDMA_DEVICES.is_dir() else []
    missing = [one.strip() for one in names.split(",") if one and one.partition(":")[0].strip() not in here]
    if here and not missing:
        return None
    return f"no RDMA device {', '.join(missing)} on this machine (there: {', '.join(here) or 'none'})"
