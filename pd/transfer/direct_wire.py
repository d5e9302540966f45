"""What travels on a data connection of `direct`: the handshake, frames, and a non-blocking framed link.

The sender of KV blocks dials the receiver. Both prove the cluster's data-plane key by an HMAC over the other's nonce.
Then the sender posts spans, the receiver takes the bytes (from shared memory, or with PULL and DATA over the same
connection) and answers each post with one ACK.

Why a key and not a token that the control plane hands out: every runner of a cluster derives the key from the cluster
secret, so both ends are proven, a reconnect needs no new token, and nothing that travels here can be used again by who
saw it. What a connection may then write is not decided by who opened it but by grants (`direct_ledger`), and those do
come from the control plane.
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence

import msgspec

from pd.errors import ProtocolError
from pd.ipc.memory import peer_credentials

MAGIC = b"pd-direct/1\n"
NONCE = 16
HANDSHAKE_TIMEOUT = 3.0
HANDSHAKE_LIMIT = 1 << 16

#: kind, payload length, three arguments.
HEADER = struct.Struct("<IIQQQ")
POST = 1  # sender: ticket, tag; payload uint64[n, 5]
ACK = 2  # receiver: ticket, status; payload reason
PULL = 3  # receiver: ticket, first byte, bytes (of the post's spans laid end to end)
DATA = 4  # sender: the same arguments, followed by the bytes

MAX_SPANS = 1 << 14
PAYLOAD_LIMIT = MAX_SPANS * 40

OK, REFUSED = 0, 1  # ACK status

#: How the bytes go: see `ClientHello`.
SHM, DEVICE, STREAM = "shm", "device", "stream"

#: A host that vanished is noticed within about 10 s, whether or not data was on its way.
TCP_LIVENESS = (
    (socket.TCP_KEEPIDLE, 3),
    (socket.TCP_KEEPINTVL, 2),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 10_000),
)

#: Descriptors that one message may carry.
FDS = 64

#: Buffers per sendmsg/recvmsg_into call, below IOV_MAX.
IOVECS = 256


class ClientHello(msgspec.Struct, frozen=True, array_like=True):
    """`mode` is what the sender offers.

    shm: the descriptors of its regions and of its epoch page come with this message. device: the epoch page's does, and
    `handle` is its device memory's. stream: it serves bytes over this connection, as it can in any case.
    """

    nonce: bytes
    identity: str
    target: str
    mode: str
    regions: list[int]
    mac: bytes = b""
    handle: bytes = b""


class ServerHello(msgspec.Struct, frozen=True, array_like=True):
    """`mode` is what the receiver takes: the one that was offered, or stream and why not (`note`)."""

    problem: str
    mac: bytes = b""
    mode: str = STREAM
    note: str = ""


class LinkClosed(Exception):
    """The connection ended, here or there."""


def client_mac(key: bytes, server_nonce: bytes, hello: ClientHello) -> bytes:
    body = msgspec.msgpack.encode(msgspec.structs.replace(hello, mac=b""))
    return hmac.digest(key, b"client" + server_nonce + body, hashlib.sha256)


def server_mac(key: bytes, server_nonce: bytes, hello: ClientHello, mode: str) -> bytes:
    body = b"server" + server_nonce + hello.nonce + msgspec.msgpack.encode([hello.target, mode])
    return hmac.digest(key, body, hashlib.sha256)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE)


def _receive(sock: socket.socket, count: int, deadline: float) -> tuple[bytes, list[int]]:
    """Exactly `count` bytes before `deadline`, and the file descriptors that came with them."""
    data, fds = bytearray(), []
    try:
        while len(data) < count:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("handshake timed out")
            sock.settimeout(remaining)
            if sock.family == socket.AF_UNIX:
                part, got = _receive_fds(sock, count - len(data))
                fds += got
            else:
                part = sock.recv(count - len(data))
            if not part:
                raise LinkClosed("closed during the handshake")
            data += part
    except BaseException:
        close_all(fds)
        raise
    return bytes(data), fds


def _receive_fds(sock: socket.socket, count: int) -> tuple[bytes, list[int]]:
    """Not socket.recv_fds: it takes flags and does not pass them on (Python 3.11)."""
    room = socket.CMSG_SPACE(FDS * 4)
    data, ancillary, flags, _ = sock.recvmsg(count, room, socket.MSG_CMSG_CLOEXEC)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    fds = [
        fd
        for level, kind, raw in ancillary
        if (level, kind) == rights
        for (fd,) in struct.iter_unpack("i", raw[: len(raw) // 4 * 4])
    ]
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise ProtocolError("handshake", "too many descriptors")
    return data, fds


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def send_hello(sock: socket.socket, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
    body = msgspec.msgpack.encode(message)
    data = len(body).to_bytes(4, "little") + body
    sock.settimeout(HANDSHAKE_TIMEOUT)
    if fds:
        sent = socket.send_fds(sock, [data], list(fds))
        data = data[sent:]
    if data:
        sock.sendall(data)


def receive_hello(sock: socket.socket, kind: type, deadline: float) -> tuple[object, list[int]]:
    """One handshake message of type `kind` and the descriptors that came with it. Raises ProtocolError."""
    head, fds = _receive(sock, 4, deadline)
    try:
        size = int.from_bytes(head, "little")
        if size > HANDSHAKE_LIMIT:
            raise ProtocolError("handshake", f"{size} bytes")
        body, more = _receive(sock, size, deadline)
        fds += more
        return msgspec.msgpack.decode(body, type=kind), fds
    except msgspec.MsgspecError as error:
        close_all(fds)
        raise ProtocolError("handshake", str(error)) from error
    except BaseException:
        close_all(fds)
        raise


def receive_greeting(sock: socket.socket, deadline: float) -> bytes:
    """The listener's first bytes: its nonce."""
    data, fds = _receive(sock, len(MAGIC) + NONCE, deadline)
    close_all(fds)
    if not data.startswith(MAGIC):
        raise ProtocolError("handshake", "not a `direct` listener")
    return data[len(MAGIC) :]


def same_user(sock: socket.socket) -> bool:
    """Whether the other end of a unix socket runs under our user id."""
    return peer_credentials(sock).uid == os.geteuid()


class Link:
    """A framed, non-blocking connection: one thread reads, any thread may send.

    What the kernel does not take at once waits in the outbox and is sent by the reading thread. After `close` no buffer
    that was handed to `send` is read any more.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in TCP_LIVENESS:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.sock = sock
        self.closed = False
        self._lock = threading.Lock()
        self._outbox: collections.deque[memoryview] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._header = bytearray(HEADER.size)

    def send(self, kind: int, a: int = 0, b: int = 0, c: int = 0, payload: bytes = b"") -> None:
        """Queue one frame. Raises LinkClosed."""
        self.send_buffers([memoryview(HEADER.pack(kind, len(payload), a, b, c) + payload)])

    def send_buffers(self, buffers: Sequence[memoryview]) -> None:
        with self._lock:
            if self.closed:
                raise LinkClosed("closed")
            idle = not self._outbox
            self._outbox.extend(buffers)
            if idle:
                self._flush()
            if self._outbox:
                os.eventfd_write(self._wake, 1)

    def _flush(self) -> None:
        """Send until the kernel takes no more. Called with the lock; an error is left for the reading thread to see."""
        outbox = self._outbox
        try:
            while outbox:
                sent = self.sock.sendmsg([outbox[i] for i in range(min(IOVECS, len(outbox)))])
                while outbox and sent >= len(outbox[0]):
                    sent -= len(outbox.popleft())
                if sent:
                    outbox[0] = outbox[0][sent:]
        except BlockingIOError:
            return
        except OSError:
            outbox.clear()
            self.closed = True
            os.eventfd_write(self._wake, 1)

    def wait_readable(self) -> None:
        """Until there is something to read, sending meanwhile. Ended by data, the peer's end, or `close`."""
        while True:
            with self._lock:
                if self.closed:
                    raise LinkClosed("closed")
                events = select.POLLIN | (select.POLLOUT if self._outbox else 0)
            self._poll.register(self.sock, events)
            ready = dict(self._poll.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            state = ready.get(self.sock.fileno(), 0)
            if state & select.POLLOUT:
                with self._lock:
                    if not self.closed:
                        self._flush()
            if state & ~select.POLLOUT:
                return

    def read_into(self, view: memoryview) -> None:
        """Fill `view`. Raises LinkClosed."""
        while view:
            count = self.read_some([view])
            if count:
                view = view[count:]
            else:
                self.wait_readable()

    def read_some(self, views: Sequence[memoryview]) -> int:
        """What is there now, at most the views' size; 0 when nothing is. Raises LinkClosed."""
        try:
            count = self.sock.recv_into(views[0]) if len(views) == 1 else self.sock.recvmsg_into(views)[0]
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkClosed(str(error)) from error
        if count == 0:
            raise LinkClosed("closed by the peer")
        return count

    def read_header(self) -> tuple[int, int, int, int, int]:
        """kind, payload length and three arguments of the next frame."""
        self.read_into(memoryview(self._header))
        kind, size, a, b, c = HEADER.unpack(self._header)
        if size > PAYLOAD_LIMIT:
            raise ProtocolError("frame", f"payload of {size} bytes")
        return kind, size, a, b, c

    def read_payload(self, size: int) -> bytearray:
        payload = bytearray(size)
        self.read_into(memoryview(payload))
        return payload

    def close(self) -> None:
        """From any thread: nothing is sent or received any more; the reading thread gets LinkClosed."""
        with self._lock:
            self.closed = True
            self._outbox.clear()
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # not connected any more, or released
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def release(self) -> None:
        """Free the descriptors. By the reading thread, when it no longer reads."""
        self.close()
        with self._lock:
            self.sock.close()
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
