"""The plugin's own connection from a sender to a receiver: all that tells the receiver whether the sender lives.

The vendor's library has no notion of a peer that goes. A sender dials before its first write and closes after its last;
the kernel closes for one that dies. So an end that came from the sender means that nothing of it is under way.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from pd.errors import PeerLost

#: Seconds for each message of a handshake, and its longest.
HANDSHAKE_TIMEOUT, MAX_MESSAGE = 3.0, 4096
NONCE = 16
#: Connections whose handshake is not over; more are closed at once.
UNPROVEN_LIMIT = 64


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="ascend/1"):
    sender: str
    receiver: str
    proof: bytes


def _proof(key: bytes, nonce: bytes, sender: str, receiver: str) -> bytes:
    return hmac.digest(key, msgspec.msgpack.encode((nonce, sender, receiver)), "sha256")


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("it ended the connection")
        data += piece
    return data


def dial(host: str, port: int, sender: str, receiver: str, key: bytes) -> socket.socket:
    """Raises PeerLost for one that is gone, hangs, is another one, or does not take this sender."""
    sock: socket.socket | None = None
    try:
        sock = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT)
        proof = _proof(key, _exactly(sock, NONCE), sender, receiver)
        hello = msgspec.msgpack.encode(Hello(sender, receiver, proof))
        sock.sendall(len(hello).to_bytes(4) + hello)
        _exactly(sock, 1)
        sock.setblocking(False)  # only ever looked at from now on
    except (OSError, OverflowError) as error:
        if sock is not None:
            sock.close()
        raise PeerLost(receiver, str(error)) from error
    return sock


def ended(sock: socket.socket) -> bool:
    """Whether the receiver has closed. It never sends after its handshake."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class Door:
    """The receiver's end: which senders are connected."""

    def __init__(self, host: str, identity: str, key: bytes, log: Callable[..., None]) -> None:
        """Raises OSError where it cannot bind. Nobody is answered before `start`."""
        self._identity, self._key, self._log = identity, key, log
        self._lock = threading.Lock()
        self._senders: dict[socket.socket, str] = {}  # "" during the handshake
        self._expelled: set[str] = set()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()
        try:
            self._listener.bind((host, 0))
        except OSError:
            self._listener.close()
            raise
        self.address: tuple[str, int] = self._listener.getsockname()

    def start(self) -> None:
        self._listener.listen(128)
        self._spawn(self._accept)

    def _spawn(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, name="pd-ascend-link", daemon=True)
        with self._lock:
            self._threads = [*(one for one in self._threads if one.is_alive()), thread]
            thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:  # closed, or out of descriptors: then the connection waits
                if not self._closed:
                    self._log("cannot accept a sender", reason=str(error))
                    time.sleep(0.05)
                continue
            with self._lock:
                if self._closed or list(self._senders.values()).count("") >= UNPROVEN_LIMIT:
                    sock.close()
                    continue
                self._senders[sock] = ""
            self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                sock.settimeout(HANDSHAKE_TIMEOUT)
                if self._admit(sock):
                    sock.settimeout(None)
                    while sock.recv(64):  # until the sender ends
                        pass
            except (OSError, msgspec.MsgspecError) as error:
                self._log("a sender's connection ended", reason=str(error))
            finally:
                with self._lock:
                    self._senders.pop(sock, None)

    def _admit(self, sock: socket.socket) -> bool:
        nonce = os.urandom(NONCE)
        sock.sendall(nonce)
        length = int.from_bytes(_exactly(sock, 4))
        if length > MAX_MESSAGE:
            return False
        hello = msgspec.msgpack.decode(_exactly(sock, length), type=Hello)
        wanted = _proof(self._key, nonce, hello.sender, self._identity)
        if hello.receiver != self._identity or not hmac.compare_digest(hello.proof, wanted):
            return False
        with self._lock:
            if self._closed or hello.sender in self._expelled:
                return False
            self._senders[sock] = hello.sender
        sock.sendall(b"\1")
        return True

    def expel(self, identity: str) -> bool:
        """Take nothing from it any more. True once it has closed itself, or never was here."""
        with self._lock:
            self._expelled.add(identity)
            found = [sock for sock, sender in self._senders.items() if sender == identity]
            for sock in found:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)  # it sees that before its next write, and closes
        return not found

    def close(self) -> None:
        with self._lock:
            self._closed = True
            threads, socks = list(self._threads), [self._listener, *self._senders]
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(HANDSHAKE_TIMEOUT)
        self._listener.close()
