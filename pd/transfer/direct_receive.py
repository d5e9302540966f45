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

from pd.abc import DeviceMemory, SharedDeviceMemory, within
from pd.errors import PdError, ProtocolError, TransferError
from pd.transfer.digest import WORD
from pd.transfer.direct_device import PULL_BYTES, DevicePost, PeerDevice, Puller
from pd.transfer.direct_ledger import Grant, Ledger, cut
from pd.transfer.direct_shm import PeerMemory, Target, copy_chunks
from pd.transfer.direct_staged import STAGE, StagedReceiver
from pd.transfer.direct_tcp import Stream, StreamReceiver
from pd.transfer.direct_wire import (
    ACK,
    DATA,
    DEVICE,
    HANDSHAKE_TIMEOUT,
    MAGIC,
    OK,
    POST,
    REFUSED,
    SHM,
    STREAM,
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
    memory: DeviceMemory
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
        self._puller: Puller | None = None
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
            self._shared.memory.enter()
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
            self._unmap()
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
            mode, note = self._map(hello, fds)
        finally:
            close_all(fds)
        self._sizes = np.array(hello.regions, dtype=np.uint64)
        self.sender = hello.identity
        send_hello(sock, ServerHello("", server_mac(shared.key, nonce, hello, mode), mode, note))
        shared.log("data connection", sender=self.sender, way=mode, note=note)
        with self._lock:
            if self._closing or shared.ledger.is_expelled(self.sender):
                raise LinkClosed("closed here")
            self._link = Link(sock)
        if mode == STREAM:
            self._streams = (
                StagedReceiver(self._link, shared.target, shared.memory)
                if shared.target.on_device
                else StreamReceiver(self._link, shared.target)
            )

    def _map(self, hello: ClientHello, fds: list[int]) -> tuple[str, str]:
        """Take what is offered if it can be used here: the way that the bytes go, and why it is not the offered one."""
        shared = self._shared
        if hello.mode == SHM and not shared.target.on_device:
            self._memory = PeerMemory(fds, hello.regions)
            return SHM, ""
        if hello.mode == DEVICE and shared.target.on_device and isinstance(shared.memory, SharedDeviceMemory):
            try:
                source = PeerDevice(shared.memory, hello.handle, fds, hello.regions)
            except TransferError as error:
                return STREAM, error.reason
            self._puller = Puller(source, shared.target, shared.memory, self._pulled, self._broken)
            return DEVICE, ""
        return STREAM, "" if hello.mode == STREAM else f"this pool cannot take {hello.mode}"

    def _unmap(self) -> None:
        if self._puller is not None:
            try:
                self._puller.close()
            except TransferError as error:  # it stays mapped, and harms nobody
                self._shared.log("a peer's device memory cannot be unmapped", sender=self.sender, reason=error.reason)

    def _broken(self, error: BaseException) -> None:
        self._shared.failed(error)
        self.close()

    def _problem(self, hello: ClientHello, nonce: bytes) -> str:
        if not hmac.compare_digest(client_mac(self._shared.key, nonce, hello), hello.mac):
            return "the token is not this cluster's"
        if hello.target != self._shared.identity:
            return f"this is {self._shared.identity}, not {hello.target}"
        if self._shared.ledger.is_expelled(hello.identity):
            return f"{hello.identity} is expelled"
        if hello.mode not in (SHM, DEVICE, STREAM) or (hello.mode != STREAM and self._sock.family != socket.AF_UNIX):
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
        rows = np.frombuffer(link.read_payload(size), dtype="<u8").reshape(-1, 5)
        spans = np.ascontiguousarray(rows.T).T  # by column, as all that follows wants it
        problem, grant = self._check(spans, tag)
        if grant is None:
            link.send(ACK, ticket, REFUSED, payload=problem.encode())
            return
        longest = PULL_BYTES if self._puller is not None else STAGE if self._shared.target.on_device else 0
        chunks = cut(spans, self._shared.target.regions, longest)
        if self._puller is not None:
            self._puller.add(DevicePost(ticket, tag, grant, chunks))
            return
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
        source, at, region, to, length = spans.T
        if not within(source, at, length, self._sizes):
            return "outside the sender's regions", None
        if not within(region, to, length, self._shared.ledger.sizes):
            return "outside the receiver's regions", None
        if self._shared.target.on_device and int(np.bitwise_or.reduce(at | to | length)) & (WORD - 1):
            return f"not in words of {WORD} bytes", None
        grant = self._shared.ledger.find(self.sender, tag, GRANT_PATIENCE)
        if grant is None or not grant.live or not grant.covers(*spans.T[2:].view(np.int64)):
            return "not granted", None
        return "", grant

    def _pulled(self, post: DevicePost) -> None:
        link = self._link
        assert link is not None
        if not post.landed:
            link.send(ACK, post.ticket, REFUSED, payload=b"revoked")
            return
        if post.chunks.digested:
            self._shared.ledger.record(self.sender, post.tag, post.chunks.applied(np.concatenate(post.sums)))
        link.send(ACK, post.ticket, OK)

    def _stream_ended(self, link: Link, stream: Stream) -> None:
        if not stream.landed:
            link.send(ACK, stream.ticket, REFUSED, payload=b"revoked")
            return
        if stream.chunks.digested:
            self._shared.ledger.record(self.sender, stream.tag, stream.chunks.applied(stream.sums))
        link.send(ACK, stream.ticket, OK)
