"""The plugin's own connection from a sender to a receiver: who it is, that it answers, and where to write.

It is made before Mooncake is asked for anything and stays open: its end tells the receiver that the sender is gone.
Both sides prove that they know the cluster's secret, if there is one.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from typing import Any, TypeVar

import msgspec

from pd.errors import PeerLost

#: Seconds for each message of a handshake, and the longest one.
HANDSHAKE_TIMEOUT, MAX_MESSAGE = 3.0, 1 << 16

#: What a handshake with somebody else, or with nobody, ends in.
FAILURES = (OSError, OverflowError, msgspec.MsgspecError)

T = TypeVar("T")


class Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="mooncake/1"):
    identity: str
    host: str
    port: int


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="mooncake/1"):
    """A sender, to the receiver that it takes `receiver` for."""

    identity: str
    receiver: str
    protocol: str
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, array_like=True):
    nonce: bytes
    proof: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The engine for this sender alone: its session, (address, bytes) of each region, a word for first contact."""

    session: str = ""
    regions: list[tuple[int, int]] = []
    mailbox: int = 0
    refused: str = ""


def send(sock: socket.socket, message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    sock.sendall(struct.pack("!I", len(data)) + data)


def _receive(sock: socket.socket, kind: type[T]) -> T:
    (length,) = struct.unpack("!I", _exactly(sock, 4))
    if length > MAX_MESSAGE:
        raise ConnectionError(f"a message of {length} bytes")
    return msgspec.msgpack.decode(_exactly(sock, length), type=kind)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("it ended the connection")
        data += piece
    return data


def _proof(key: bytes, role: str, hello: Hello, nonce: bytes) -> bytes:
    return hmac.digest(key, msgspec.msgpack.encode((role, hello, nonce)), "sha256")


def dial(there: Descriptor, identity: str, protocol: str, key: bytes) -> tuple[socket.socket, Welcome]:
    """Raises PeerLost. The socket is only ever looked at from then on: it does not block."""
    sock: socket.socket | None = None
    hello = Hello(identity, there.identity, protocol, os.urandom(16))
    try:
        sock = socket.create_connection((there.host, there.port), timeout=HANDSHAKE_TIMEOUT)
        send(sock, hello)
        challenge = _receive(sock, Challenge)
        if not hmac.compare_digest(challenge.proof, _proof(key, "receiver", hello, challenge.nonce)):
            raise ConnectionError("it does not know this cluster's secret")
        send(sock, _proof(key, "sender", hello, challenge.nonce))
        welcome = _receive(sock, Welcome)
        if welcome.refused:
            raise ConnectionError(welcome.refused)
        sock.setblocking(False)
    except FAILURES as error:
        if sock is not None:
            sock.close()
        raise PeerLost(there.identity, str(error)) from error
    return sock, welcome


def greet(sock: socket.socket, key: bytes) -> Hello:
    """The other end of `dial`, up to the welcome. Raises one of FAILURES."""
    sock.settimeout(HANDSHAKE_TIMEOUT)
    hello, nonce = _receive(sock, Hello), os.urandom(16)
    send(sock, Challenge(nonce, _proof(key, "receiver", hello, nonce)))
    if not hmac.compare_digest(_receive(sock, bytes), _proof(key, "sender", hello, nonce)):
        raise ConnectionError("it does not know this cluster's secret")
    return hello


def wait(sock: socket.socket) -> None:
    """Until the sender ends, or its host has not answered for half a minute. Raises OSError."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    while sock.recv(64):
        pass


def ended(sock: socket.socket) -> bool:
    """Whether the other side of a dialled socket has closed. It never sends after its welcome."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
