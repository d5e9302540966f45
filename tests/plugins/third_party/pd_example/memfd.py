"""A transfer backend for processes of one host and one user: the sender copies straight into the receiver's memory.

The receiver allocates its KV pool as memfds, which the sender opens through /proc/PID/fd (the kernel lets the same user
do so) and maps. No sockets, no threads, no messages; a frozen receiver holds nobody up.

Who is connected is written in locks. The receiver keeps one more memfd, the ledger. A connected sender holds a lock on
one byte of it, at a hash of the sender's identity. The kernel drops the lock with the last descriptor, however the
process ends. So a receiver that can take the lock itself knows that this sender neither writes nor ever will.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import secrets
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from pd.abc import BackendContext, Peer, Region, Spans, Ticket, TransferCapabilities, host_region, within
from pd.errors import PeerLost, TransferError

TOKEN = 16  # random bytes at the start of a ledger: a process number may be used again, a token is not


class Descriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    identity: str
    pid: int
    token: str
    ledger: int
    regions: list[tuple[int, int]]  # (file descriptor in the process `pid`, bytes)


@dataclass
class MemfdPeer:
    identity: str
    process: int  # pidfd
    ledger: int  # file descriptor; the lock lives as long as it is open
    regions: list[npt.NDArray[np.uint8]]

    def gone(self) -> bool:
        poll = select.poll()
        poll.register(self.process, select.POLLIN)  # a pidfd is readable once the process has ended
        return bool(poll.poll(0))

    def close(self) -> None:
        self.regions.clear()  # unmaps
        _close([self.ledger, self.process])


class MemfdBackend:
    """One-sided and blocking: `post` returns when the bytes are there."""

    capabilities = TransferCapabilities(blocking_post=True, allocates=True, quiet_errors=True)

    def __init__(self, context: BackendContext) -> None:
        self._log = context.log
        self._identity = ""
        self._ledger = -1
        self._token = secrets.token_bytes(TOKEN)
        self._files: dict[int, int] = {}  # address -> memfd
        self._regions: list[Region] = []
        self._local: list[npt.NDArray[np.uint8]] = []
        self._peers: list[MemfdPeer] = []

    def open(self, identity: str) -> None:
        self._identity = identity
        self._ledger = _memfd("ledger", self._token)

    def allocate(self, nbytes: int, device: str) -> Region | None:
        if device != "cpu":
            return None
        fd = _memfd("pool", b"", nbytes)
        region = host_region(memoryview(mmap.mmap(fd, nbytes)))
        self._files[region.address] = fd
        return region

    def register(self, regions: Sequence[Region]) -> None:
        self._regions = list(regions)  # all from `allocate`
        self._local = [np.frombuffer(region.buffer, np.uint8) for region in regions if region.buffer is not None]

    def descriptor(self) -> bytes:
        regions = [(self._files[region.address], region.nbytes) for region in self._regions]
        return msgspec.json.encode(Descriptor(self._identity, os.getpid(), self._token.hex(), self._ledger, regions))

    def connect(self, descriptor: bytes) -> Peer:
        try:
            remote = msgspec.json.decode(descriptor, type=Descriptor)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise TransferError(f"not a descriptor of memfd: {error}") from error
        opened: list[int] = []
        try:
            opened.append(os.pidfd_open(remote.pid))
            opened.append(ledger := _open(remote.pid, remote.ledger))
            if os.pread(ledger, TOKEN, 0).hex() != remote.token:
                raise ValueError(f"process {remote.pid} is another one")
            _lock(ledger, self._identity)
            regions = [_map(remote.pid, fd, nbytes) for fd, nbytes in remote.regions]
        except (OSError, ValueError, OverflowError) as error:
            _close(opened)
            raise PeerLost(remote.identity, str(error)) from error
        peer = MemfdPeer(remote.identity, *opened, regions)
        self._peers.append(peer)
        self._log("memfd_connected", peer=peer.identity)
        return peer

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        assert isinstance(peer, MemfdPeer)
        if not within(spans[:, 0], spans[:, 1], spans[:, 4], _sizes(self._local)):
            raise TransferError("a span outside the local regions")
        if not within(spans[:, 2], spans[:, 3], spans[:, 4], _sizes(peer.regions)):
            raise TransferError("a span outside the peer's regions")
        if peer.gone():
            raise PeerLost(peer.identity, "its process has ended")
        for source, offset, target, at, length in spans.tolist():
            peer.regions[target][at : at + length] = self._local[source][offset : offset + length]
        return peer

    def poll(self, ticket: Ticket) -> bool:
        return True  # a post that raised has no ticket

    def reset_peer(self, peer: Peer) -> None:
        assert isinstance(peer, MemfdPeer)
        self._peers.remove(peer)
        peer.close()

    def expel(self, identity: str) -> bool:
        """Take the sender's lock: true when it holds it no longer, and then for good."""
        try:
            _lock(self._ledger, identity)
        except BlockingIOError:
            return False
        return True

    def grant(self, tag: int, spans: Spans, sender: str) -> None:
        """Not asked for: not revocable."""

    def revoke(self, tag: int, sender: str) -> bool:
        return False

    def fence(self, identity: str) -> None:
        """Processors see each other's memory; what the sender said after writing came through the kernel."""

    def take_digests(self, tag: int, sender: str) -> npt.NDArray[np.uint64]:
        return np.empty((0, 4), np.uint64)

    def progress(self) -> None:
        """Nothing to drive."""

    def close(self) -> None:
        while self._peers:
            self._peers.pop().close()
        _close([fd for fd in (self._ledger, *self._files.values()) if fd >= 0])
        self._ledger, self._files = -1, {}


def _memfd(name: str, content: bytes, nbytes: int = 0) -> int:
    fd = os.memfd_create(f"pd-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, nbytes or len(content))
    os.pwrite(fd, content, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # whoever maps it can rely on its size
    return fd


def _open(pid: int, fd: int) -> int:
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _map(pid: int, fd: int, nbytes: int) -> npt.NDArray[np.uint8]:
    opened = _open(pid, fd)
    try:
        return np.frombuffer(mmap.mmap(opened, nbytes), np.uint8)  # raises if the file is shorter
    finally:
        os.close(opened)


def _lock(ledger: int, identity: str) -> None:
    """Lock the byte of `identity` on this open file. Raises BlockingIOError where another open file has it."""
    place = int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest()) >> 1 or 1
    flock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, place - 1, 1, 0)
    fcntl.fcntl(ledger, fcntl.F_OFD_SETLK, flock)


def _sizes(regions: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    return np.array([region.size for region in regions], np.uint64)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
