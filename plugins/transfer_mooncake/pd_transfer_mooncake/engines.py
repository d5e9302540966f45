"""Mooncake's engines: made with their listeners fenced, and ended in milliseconds.

Mooncake listens on every interface without authentication: a handshake port that tells anyone the addresses of
registered memory, and a data port that reads and writes them. So each listener gets a socket filter before anything is
registered: packets pass from one peer's address to the address where it was expected, or none at all. And the handshake
thread looks only once a second whether its engine ends, while the destructor waits for it with the interpreter's lock
held: a shorter timeout of accept shortens that.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pd.abc import Region
from pd.errors import BackendUnavailable, TransferError

#: Microseconds between looks of the handshake thread at whether its engine ends.
ACCEPT_TICK = 20_000
SO_ATTACH_FILTER = 26
IP_HEADER = 0xFFF00000  # of a classic BPF program's offsets: SKF_NET_OFF


def packet_filter(allowed: tuple[str, str] | None) -> bytes:
    """Classic BPF that lets pass what goes from one IPv4 address to another (None: nothing)."""
    drop, program = (0x06, 0, 0, 0), []
    if allowed is not None:
        source, target = (int.from_bytes(socket.inet_aton(host)) for host in allowed)
        program += [(0x30, 0, 0, IP_HEADER), (0x54, 0, 0, 0xF0), (0x15, 0, 5, 0x40)]  # version 4, or drop
        program += [(0x20, 0, 0, IP_HEADER + 12), (0x15, 0, 3, source)]
        program += [(0x20, 0, 0, IP_HEADER + 16), (0x15, 0, 1, target), (0x06, 0, 0, 0xFFFFFFFF)]
    return b"".join(struct.pack("HBBI", *line) for line in [*program, drop])


def own_sockets() -> Iterator[tuple[int, bool, tuple[Any, ...], socket.socket]]:
    """(inode, whether it listens, address, a duplicate) of each TCP socket of this process."""
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:  # the listing's own
            continue
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode):
            os.close(fd)
            continue
        with socket.socket(fileno=fd) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                yield status.st_ino, listens, sock.getsockname(), sock


class Engines:
    """Makes engines of one protocol, from any thread. Whoever drops the last reference to one ends it."""

    def __init__(self, module: Any, protocol: str, devices: str, log: Callable[..., None]) -> None:
        self._module, self._protocol, self._devices, self._log = module, protocol, devices, log
        self._lock = threading.Lock()

    def make(self, host: str, allowed: tuple[str, str] | None, memory: Sequence[Region]) -> Any:
        """An engine that answers on `host` to packets `allowed` (source, target), with `memory` registered.

        Raises BackendUnavailable, TransferError.
        """
        with self._lock:
            before = {inode for inode, *_ in own_sockets()}
            engine = self._module.TransferEngine()
            if engine.initialize(host, "P2PHANDSHAKE", self._protocol, self._devices) != 0:
                raise BackendUnavailable("mooncake", f"{self._protocol} did not start", "see Mooncake's own log lines")
            self._fence(before, engine.get_rpc_port(), allowed)
        if self._protocol == "rdma":  # Mooncake takes TCP where a device is missing, and says so nowhere
            found = {name for both in json.loads(engine.get_local_topology()).values() for one in both for name in one}
            wanted = set(filter(None, self._devices.split(",")))
            if not found or wanted - found:
                missing = ", ".join(sorted(wanted - found))
                raise BackendUnavailable("mooncake", f"RDMA device {missing}", "Mooncake does not see it")
        for region in memory:
            place = "*" if region.device == "cpu" else region.device
            if engine.register_memory(region.address, region.nbytes, place) != 0:
                raise TransferError(f"Mooncake cannot register {region.nbytes} bytes of {region.device}")
        return engine

    def _fence(self, before: set[int], rpc_port: int, allowed: tuple[str, str] | None) -> None:
        """Filter the listeners that are new, and end who was quicker."""
        code = packet_filter(allowed)
        program = ctypes.create_string_buffer(code, len(code))
        pointer = struct.pack("HL", len(code) // 8, ctypes.addressof(program))
        ports: set[int] = set()
        for inode, listens, (host, port, *_), sock in own_sockets():
            if inode in before or not listens or host not in ("0.0.0.0", "::"):
                continue
            ports.add(port)
            if port == rpc_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, ACCEPT_TICK))
                with contextlib.suppress(OSError):  # ends the wait that began before
                    socket.create_connection(("127.0.0.1", rpc_port), 1.0).close()
            try:
                sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, pointer)
            except OSError as error:
                self._log("mooncake listens without a fence", port=port, reason=str(error))
        for _, listens, (_, port, *_), sock in own_sockets():
            if port in ports and not listens:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


def first_contact(engine: Any, session: str, mailbox: int, timeout: float) -> bool:
    """Write one word to the peer: what Mooncake asks it first is cached then, and no later call waits for the peer.

    Mooncake waits 60 s for a peer that stops right here. The thread that waits then keeps the engine until it returns.
    """
    statuses: list[int] = []

    def write(engine: Any) -> None:
        word = ctypes.c_uint64()
        ticket = engine.transfer_submit_write(session, ctypes.addressof(word), mailbox, ctypes.sizeof(word))
        deadline = time.monotonic() + timeout
        while ticket and not statuses and time.monotonic() < deadline:
            statuses.extend(filter(None, [engine.transfer_check_status(ticket)]))
            time.sleep(0.0002)

    thread = threading.Thread(target=write, args=(engine,), name="pd-mooncake-contact", daemon=True)
    thread.start()
    thread.join(timeout)
    return statuses == [1]
