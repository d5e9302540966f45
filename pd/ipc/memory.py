"""Memory that unrelated processes of one host share: a memfd, handed over by its descriptor on a unix socket.

Nothing has a name in a file system, so a killed process leaves nothing behind and the size of /dev/shm does not matter.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from dataclasses import dataclass

from pd.errors import ProtocolError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class SharedMemory:
    """One mapping of one memfd. `buffer` is its bytes, writable.

    The size is sealed, so that no other holder can pull pages from under a reader (SIGBUS). `close` closes the
    descriptor; the mapping goes with it, or with the last array or view over `buffer` where some are still alive.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes ownership of `fd`. Use `create` or `attach`."""
        self.fd = fd
        self.nbytes = nbytes
        self._map: mmap.mmap | None = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, name: str, nbytes: int) -> SharedMemory:
        """New zeroed memory. `name` is seen in /proc/PID/maps only. Pages are taken when first touched."""
        if nbytes <= 0:
            raise ValueError(f"shared memory of {nbytes} bytes")
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> SharedMemory:
        """Map a descriptor received from another process; takes ownership of it, also on failure.

        Raises ProtocolError when it is not a sealed memfd of that size: touching it could then kill this process.
        """
        try:
            size = os.fstat(fd).st_size
            if size != nbytes or nbytes <= 0:
                raise ProtocolError("memory", f"{size} bytes instead of {nbytes}")
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError as error:
                raise ProtocolError("memory", "not a memfd") from error
            if seals & _SEALS != _SEALS:
                raise ProtocolError("memory", "its size is not sealed")
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        if self._map is None:
            return
        mapping, self._map = self._map, None
        os.close(self.fd)
        self.fd = -1
        try:
            self.buffer.release()
            mapping.close()
        except BufferError:
            pass  # views are alive: the last of them unmaps

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def send_fd(connection: socket.socket, fd: int, payload: bytes) -> None:
    """Send `payload` (not empty, at most 64 KiB) and a descriptor in one message; the caller keeps its own copy."""
    if not 0 < len(payload) <= _MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes")
    header = struct.pack("<I", len(payload))
    sent = socket.send_fds(connection, [header + payload], [fd])
    if sent < len(header) + len(payload):
        connection.sendall((header + payload)[sent:])


def recv_fd(connection: socket.socket) -> tuple[int, bytes]:
    """Receive what `send_fd` sent on a blocking (or timed) socket; the caller owns the descriptor.

    Raises ProtocolError when the peer closed or sent something else; OSError (TimeoutError) from the socket.
    """
    # Not socket.recv_fds: it takes flags and does not pass them on (Python 3.11).
    room = socket.CMSG_LEN(struct.calcsize("i"))
    data, ancillary, flags, _ = connection.recvmsg(_HEADER, room, socket.MSG_CMSG_CLOEXEC)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    fds = [fd for *kind, raw in ancillary if tuple(kind) == rights for (fd,) in struct.iter_unpack("i", raw)]
    try:
        if len(fds) != 1 or flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptor", "the peer closed or sent none")
        data += _recv_exactly(connection, _HEADER - len(data))
        (length,) = struct.unpack("<I", data)
        if not 0 < length <= _MAX_PAYLOAD:
            raise ProtocolError("descriptor", f"payload of {length} bytes")
        return fds[0], _recv_exactly(connection, length)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


@dataclass(frozen=True)
class PeerCredentials:
    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Who connected, as the kernel says: an abstract unix socket has no file permissions of its own."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return PeerCredentials(*struct.unpack("3i", raw))


_HEADER = 4
_MAX_PAYLOAD = 64 << 10


def _recv_exactly(connection: socket.socket, nbytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < nbytes:
        part = connection.recv(nbytes - len(parts))
        if not part:
            raise ProtocolError("descriptor", "the peer closed in the middle of a message")
        parts += part
    return bytes(parts)
