"""The sending end of one data connection of `direct`: announces spans, serves them where no memory is shared."""

from __future__ import annotations

import hmac
import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from pd.abc import Spans
from pd.errors import PdError, PeerLost, ProtocolError, TransferError
from pd.transfer.direct_shm import EpochPage
from pd.transfer.direct_tcp import ReadRegion, StreamSource
from pd.transfer.direct_wire import (
    ACK,
    DATA,
    DEVICE,
    HANDSHAKE_TIMEOUT,
    HEADER,
    OK,
    POST,
    PULL,
    SHM,
    STREAM,
    ClientHello,
    Link,
    LinkClosed,
    ServerHello,
    client_mac,
    new_nonce,
    receive_greeting,
    receive_hello,
    same_user,
    send_hello,
    server_mac,
)

#: Seconds for a handshake in which the receiver maps device memory, which takes longest the first time.
MAPPING_TIMEOUT = 5.0


@dataclass(frozen=True)
class Sender:
    """What all outgoing connections of one backend share.

    `fds`: one per region of host memory, `handle`: of device memory; empty when it cannot be shared.
    """

    identity: str
    key: bytes
    sizes: Sequence[int]
    read: ReadRegion
    fds: Sequence[int]
    handle: bytes
    enter: Callable[[], None]  # for a thread that reads
    log: Callable[..., None]
    failed: Callable[[BaseException], None]


class Ticket:
    """One post. `error` stays None until the receiver said no, or the connection ended first."""

    __slots__ = ("done", "error", "source")

    def __init__(self, source: StreamSource | None = None) -> None:
        self.done = False
        self.error: TransferError | None = None
        self.source = source


def dial(sock: socket.socket, sender: Sender, target: str, offer: str) -> tuple[str, str, EpochPage | None]:
    """Prove and ask proof, and offer a way.

    Returns the way that the receiver took, why if it is another one, and what ends it. Raises PeerLost.
    """
    deadline = time.monotonic() + (MAPPING_TIMEOUT if offer == DEVICE else HANDSHAKE_TIMEOUT)
    page = EpochPage() if offer != STREAM else None
    try:
        if sock.family == socket.AF_UNIX and not same_user(sock):
            raise ProtocolError("handshake", "the listener is another user's process")
        nonce = receive_greeting(sock, deadline)
        handle = sender.handle if offer == DEVICE else b""
        hello = ClientHello(new_nonce(), sender.identity, target, offer, list(sender.sizes), handle=handle)
        hello = msgspec.structs.replace(hello, mac=client_mac(sender.key, nonce, hello))
        shared = [*(sender.fds if offer == SHM else ()), *([page.fd] if page else ())]
        send_hello(sock, hello, shared)
        answer, _ = receive_hello(sock, ServerHello, deadline)
        assert isinstance(answer, ServerHello)
        if answer.problem:
            raise ProtocolError("handshake", answer.problem)
        if not hmac.compare_digest(server_mac(sender.key, nonce, hello, answer.mode), answer.mac):
            raise ProtocolError("handshake", "the listener's token is not this cluster's")
        if answer.mode not in (offer, STREAM):
            raise ProtocolError("handshake", f"mode {answer.mode}")
    except (OSError, LinkClosed, PdError) as error:
        if page is not None:
            page.close()
        raise PeerLost(target, str(error)) from error
    if page is not None and answer.mode == STREAM:
        page.close()
        page = None
    return answer.mode, answer.note, page


class Outgoing:
    """A connected receiver (`pd.abc.Peer`), with a thread of its own for acknowledgements and requests."""

    def __init__(self, sock: socket.socket, sender: Sender, identity: str, sizes: np.ndarray, page: EpochPage | None):
        self._identity = identity
        self.sizes = sizes
        self._shared = sender
        self._page = page
        self._link = Link(sock)
        self._lock = threading.Lock()
        self._pending: dict[int, Ticket] = {}
        self._lost: str | None = None
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="pd-direct-out", daemon=True)
        self._thread.start()

    @property
    def identity(self) -> str:
        return self._identity

    def post(self, spans: Spans, tag: int) -> Ticket:
        """Announce checked spans. Raises PeerLost."""
        ticket = Ticket(StreamSource(spans) if self._page is None else None)
        number = next(self._numbers)
        with self._lock:
            if self._lost is not None:
                raise PeerLost(self._identity, self._lost)
            self._pending[number] = ticket
        try:
            payload = spans.astype("<u8", copy=False).tobytes()
            self._link.send_buffers([memoryview(HEADER.pack(POST, len(payload), number, tag, 0)), memoryview(payload)])
        except LinkClosed as error:
            self._end(str(error))
        return ticket

    def reset(self, reason: str = "reset") -> None:
        """When it returns, no byte is served and nothing that the receiver reads later counts as landed."""
        if self._page is not None:
            self._page.end()
        self._link.close()
        self._end(reason)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        if self._page is not None:
            self._page.close()

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._lost is None:
                self._lost = reason
            for ticket in self._pending.values():
                ticket.error = PeerLost(self._identity, self._lost)
            self._pending.clear()

    def _run(self) -> None:
        reason = "closed"
        try:
            self._shared.enter()
            self._serve()
        except (LinkClosed, OSError, PdError) as error:
            reason = str(error)
        except BaseException as error:
            reason = f"defect: {error}"
            self._shared.failed(error)
        finally:
            if self._page is not None:
                self._page.end()
            self._end(reason)
            self._link.release()
            self._shared.log("data connection ended", receiver=self._identity, reason=reason)

    def _serve(self) -> None:
        link = self._link
        while True:
            kind, size, a, b, c = link.read_header()
            if kind == ACK:
                self._acknowledged(a, b, bytes(link.read_payload(size)))
            elif kind == PULL and not size:
                ticket = self._pending.get(a)
                if ticket is None or ticket.source is None:
                    raise ProtocolError("frame", "asked for an unknown post")
                views = ticket.source.views(b, c, self._shared.read)
                link.send_buffers([memoryview(HEADER.pack(DATA, 0, a, b, c)), *views])
            else:
                raise ProtocolError("frame", f"kind {kind}")

    def _acknowledged(self, number: int, status: int, reason: bytes) -> None:
        with self._lock:
            ticket = self._pending.pop(number, None)
        if ticket is None:
            raise ProtocolError("frame", "acknowledged an unknown post")
        if status == OK:
            ticket.done = True
        else:
            ticket.error = TransferError(f"refused by the receiver: {reason[:200].decode(errors='replace')}")
