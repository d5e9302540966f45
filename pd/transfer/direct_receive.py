"""The receiving end of one data connection of `direct`: proves who dialled, then applies what is granted."""

from __future__ import annotations

import contextlib
import hmac
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pd.abc import within
from pd.errors import PdError, ProtocolError
from pd.transfer.direct_ledger import Grant, Ledger, cut
from pd.transfer.direct_shm import PeerMemory, Target, copy_chunks
from pd.transfer.direct_tcp import Stream, StreamReceiver
from pd.transfer.direct_wire import (
    ACK,
    DATA,
    HANDSHAKE_TIMEOUT,
    MAGIC,
    OK,
    POST,
    REFUSED,
    ClientHello,
    Link,
    LinkClosed,
    ServerHello,
    client_mac,
    close_all,
    new_nonce,
    receive_hello,
    same_user,
    send_hello,
    server_mac,
)

#: Seconds that a post waits for the order that grants it; it holds up this connection only.
GRANT_PATIENCE = 1.0


@dataclass(frozen=True)
class Receiver:
    """What all incoming connections of one backend share."""

    identity: str
    key: bytes
    ledger: Ledger
    target: Target
    log: Callable[..., None]
    failed: Callable[[BaseException], None]  # an exception that is a defect, not a peer's doing


class Incoming:
    """One connection, with a thread of its own that ends with it."""

    def __init__(self, sock: socket.socket, receiver: Receiver, ended: Callable[[Incoming], None]) -> None:
        self.sender = ""  # known after the handshake
        self._sock = sock
        self._shared = receiver
        self._ended = ended
        self._link: Link | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._memory: PeerMemory | None = None
        self._streams: StreamReceiver | None = None
        self._sizes = np.zeros(0, np.uint64)
        self.thread = threading.Thread(target=self._run, name="pd-direct-in", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """From any thread; the connection's thread ends soon after. Grants are not its business."""
        with self._lock:
            self._closing = True
            if self._link is not None:
                self._link.close()
            else:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def join(self, timeout: float) -> None:
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(max(0.0, timeout))

    def _run(self) -> None:
        try:
            self._handshake()
            self._serve()
        except (LinkClosed, OSError) as error:
            self._shared.log("data connection ended", sender=self.sender, reason=str(error))
        except PdError as error:
            # The peer broke the protocol: its connection ends, nothing else.
            self._shared.log("data connection refused", sender=self.sender, reason=str(error))
        except BaseException as error:
            self._shared.failed(error)
        finally:
            self._memory = None
            with self._lock:
                self._closing = True
                if self._link is not None:
                    self._link.release()
                else:
                    self._sock.close()
            self._ended(self)

    def _handshake(self) -> None:
        sock, shared = self._sock, self._shared
        if sock.family == socket.AF_UNIX and not same_user(sock):
            raise ProtocolError("handshake", "another user's process")
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        nonce = new_nonce()
        sock.settimeout(HANDSHAKE_TIMEOUT)
        sock.sendall(MAGIC + nonce)
        hello, fds = receive_hello(sock, ClientHello, deadline)
        try:
            assert isinstance(hello, ClientHello)
            problem = self._problem(hello, nonce)
            if problem:
                send_hello(sock, ServerHello(problem))
                raise ProtocolError("handshake", problem)
            if hello.mode == "shm":
                self._memory = PeerMemory(fds, hello.regions)
        finally:
            close_all(fds)
        self._sizes = np.array(hello.regions, dtype=np.uint64)
        self.sender = hello.identity
        send_hello(sock, ServerHello("", server_mac(shared.key, nonce, hello)))
        with self._lock:
            if self._closing or shared.ledger.is_expelled(self.sender):
                raise LinkClosed("closed here")
            self._link = Link(sock)
        if self._memory is None:
            self._streams = StreamReceiver(self._link, shared.target)

    def _problem(self, hello: ClientHello, nonce: bytes) -> str:
        if not hmac.compare_digest(client_mac(self._shared.key, nonce, hello), hello.mac):
            return "the token is not this cluster's"
        if hello.target != self._shared.identity:
            return f"this is {self._shared.identity}, not {hello.target}"
        if self._shared.ledger.is_expelled(hello.identity):
            return f"{hello.identity} is expelled"
        if hello.mode not in ("shm", "stream") or (hello.mode == "shm" and self._sock.family != socket.AF_UNIX):
            return f"mode {hello.mode}"
        if any(not 0 < size < 1 << 48 for size in hello.regions):
            return "region sizes"
        return ""

    def _serve(self) -> None:
        link = self._link
        assert link is not None
        while True:
            kind, size, a, b, c = link.read_header()
            if kind == POST:
                self._post(link, a, b, size)
            elif kind == DATA and self._streams is not None and not size:
                for stream in self._streams.receive((a, b, c)):
                    self._stream_ended(link, stream)
            else:
                raise ProtocolError("frame", f"kind {kind}")

    def _post(self, link: Link, ticket: int, tag: int, size: int) -> None:
        if size % 40 or not size:
            raise ProtocolError("frame", f"a post of {size} bytes")
        spans = np.frombuffer(link.read_payload(size), dtype="<u8").reshape(-1, 5)
        problem, grant = self._check(spans, tag)
        if grant is None:
            link.send(ACK, ticket, REFUSED, payload=problem.encode())
            return
        chunks = cut(spans, self._shared.target.regions)
        if self._streams is not None:
            stream = Stream(ticket, tag, grant, chunks, int(spans[:, 4].sum()))
            for ended in self._streams.add(stream):
                self._stream_ended(link, ended)
            return
        assert self._memory is not None
        sums = copy_chunks(chunks, self._memory, self._shared.target, grant)
        if sums is None:
            link.send(ACK, ticket, REFUSED, payload=b"revoked")
            return
        if chunks.digested:
            self._shared.ledger.record(self.sender, tag, chunks.applied(sums))
        link.send(ACK, ticket, OK)

    def _check(self, spans: np.ndarray, tag: int) -> tuple[str, Grant | None]:
        """Nothing of a post is applied unless all of it is inside both sides' regions and granted."""
        if not within(spans[:, 0], spans[:, 1], spans[:, 4], self._sizes):
            return "outside the sender's regions", None
        if not within(spans[:, 2], spans[:, 3], spans[:, 4], self._shared.ledger.sizes):
            return "outside the receiver's regions", None
        grant = self._shared.ledger.find(self.sender, tag, GRANT_PATIENCE)
        local = spans.astype(np.int64)
        if grant is None or not grant.live or not grant.covers(local[:, 2], local[:, 3], local[:, 4]):
            return "not granted", None
        return "", grant

    def _stream_ended(self, link: Link, stream: Stream) -> None:
        if not stream.landed:
            link.send(ACK, stream.ticket, REFUSED, payload=b"revoked")
            return
        if stream.chunks.digested:
            self._shared.ledger.record(self.sender, stream.tag, stream.chunks.applied(stream.sums))
        link.send(ACK, stream.ticket, OK)
