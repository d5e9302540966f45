"""The backend: one engine for each peer, on both sides, so that ending an engine is what makes memory quiet.

Measured, and the reason for it: a write that Mooncake reports as failed may still go on; only destroying the engine
that reads the source, or the one that owns the target, stops it. On TCP an engine costs less than a millisecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pd.abc import BackendContext, Peer, Region, Spans, TransferCapabilities
from pd.errors import BackendUnavailable, PdError, PeerLost, TransferError
from pd_transfer_mooncake import link
from pd_transfer_mooncake.engines import Engines, first_contact

#: Connections whose handshake is not over; more are closed at once.
UNPROVEN_LIMIT = 64


@dataclass(eq=False)
class Sender:
    """Who may write here, by its connection. `engine` is its alone; None: nothing of it can land."""

    sock: socket.socket
    thread: threading.Thread | None = None
    identity: str = ""
    engine: Any = None


@dataclass(eq=False)
class Receiver:
    """Where we write. `engine` None: it was reset, and nothing here is read for it."""

    identity: str
    sock: socket.socket
    welcome: link.Welcome
    engine: Any

    @property
    def end(self) -> str:
        """Why nothing more can be written to it, "" as far as its connection tells."""
        if self.engine is None:
            return "it was reset"
        return "it closed the connection" if link.ended(self.sock) else ""


@dataclass
class Ticket:
    """Writes of one post; those before `position` are applied."""

    peer: Receiver
    writes: list[int]
    position: int = 0


class MooncakeBackend:
    """See the module."""

    def __init__(self, context: BackendContext, module: Any, protocol: str, devices: str) -> None:
        self._context, self._protocol, self._key = context, protocol, context.secret or b""
        kinds = {"cuda"} if protocol == "nvlink_intra" else {"cpu", "cuda"} if module.SUPPORT_CUDA else {"cpu"}
        self.capabilities = TransferCapabilities(memory_kinds=frozenset(kinds), concurrent_posts=True)
        trusted = self._key or context.options.get("insecure_control_plane")
        self._host = context.host if trusted or context.host == "localhost" else "127.0.0.1"
        self._engines = Engines(module, protocol, devices, context.log)
        self._identity = ""
        self._regions: list[Region] = []
        self._mailbox = ctypes.create_string_buffer(4096)
        self._listener = socket.socket()
        self._acceptor = threading.Thread(target=self._accept, name="pd-mooncake-accept", daemon=True)
        self._lock = threading.Lock()
        self._closed = False
        self._senders: set[Sender] = set()
        self._expelled: set[str] = set()
        self._receivers: set[Receiver] = set()

    def open(self, identity: str) -> None:
        """Bind the plugin's own port, and see that Mooncake starts. Nobody is answered before `register`."""
        self._identity = identity
        try:
            self._listener.bind((self._host, 0))
        except OSError as error:
            raise BackendUnavailable(
                "mooncake", f"cannot bind to {self._host}: {error}", "use an IPv4 address of this host"
            ) from error
        self._engines.make(self._listener.getsockname()[0], None, ())

    def allocate(self, nbytes: int, device: str) -> Region | None:
        return None

    def register(self, regions: Sequence[Region]) -> None:
        """Engines register it, each when it is made: on TCP that is a line in a table."""
        for region in regions:
            if region.device.partition(":")[0] not in self.capabilities.memory_kinds:
                raise TransferError(f"mooncake by {self._protocol} does not move memory of {region.device}")
        self._regions = list(regions)
        self._listener.listen(128)
        self._acceptor.start()

    def descriptor(self) -> bytes:
        host, port = self._listener.getsockname()
        return msgspec.msgpack.encode(link.Descriptor(self._identity, _reachable(host), port))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            senders, receivers = list(self._senders), list(self._receivers)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes its thread
        for receiver in receivers:
            self.reset_peer(receiver)
        for sender in senders:
            self._end(sender)
        for thread in (self._acceptor, *(sender.thread for sender in senders)):
            if thread is not None and thread.is_alive():
                thread.join(link.HANDSHAKE_TIMEOUT)
        self._listener.close()

    # --- who writes here ---

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:  # closed, or out of descriptors: then the connection waits
                if not self._closed:
                    self._context.log("cannot accept a sender", reason=str(error))
                    time.sleep(0.05)
                continue
            sender = Sender(sock)
            sender.thread = threading.Thread(target=self._serve, args=(sender,), name="pd-mooncake-link", daemon=True)
            with self._lock:
                if self._closed or sum(not one.identity for one in self._senders) >= UNPROVEN_LIMIT:
                    sock.close()
                    continue
                self._senders.add(sender)
                sender.thread.start()

    def _serve(self, sender: Sender) -> None:
        with sender.sock as sock:
            try:
                hello = link.greet(sock, self._key)
                link.send(sock, self._admit(sender, hello))
                link.wait(sock)
            except link.FAILURES as error:
                self._context.log("a sender's connection ended", sender=sender.identity, reason=str(error))
            finally:
                self._end(sender)

    def _admit(self, sender: Sender, hello: link.Hello) -> link.Welcome:
        """An engine for this sender alone, behind a fence that lets in its host alone."""
        if hello.receiver != self._identity:
            return link.Welcome(refused=f"this is {self._identity}")
        if hello.protocol != self._protocol:
            return link.Welcome(refused=f"it moves KV by {self._protocol}, not {hello.protocol}")
        self._end_all(hello.identity)  # it was reset and connects again
        source, host = sender.sock.getpeername()[0], sender.sock.getsockname()[0]
        mailbox = Region(0, ctypes.addressof(self._mailbox), len(self._mailbox), "cpu")
        memory = [*self._regions, mailbox] if "cpu" in self.capabilities.memory_kinds else self._regions
        try:
            engine = self._engines.make(host, (source, host), memory)
        except PdError as error:
            self._context.log("no engine for a sender", sender=hello.identity, reason=str(error))
            return link.Welcome(refused=str(error))
        session = f"{host}:{engine.get_rpc_port()}"
        with self._lock:
            if self._closed or hello.identity in self._expelled:
                return link.Welcome(refused="it takes nothing from this sender any more")
            sender.identity, sender.engine = hello.identity, engine
        return link.Welcome(session, [(one.address, one.nbytes) for one in self._regions], mailbox.address)

    def _end(self, sender: Sender) -> None:
        """Afterwards nothing of this sender can land: its engine is gone, and with it every connection."""
        with self._lock:
            self._senders.discard(sender)
            sender.engine = None  # the last reference
        with contextlib.suppress(OSError):
            sender.sock.shutdown(socket.SHUT_RDWR)

    def _end_all(self, identity: str) -> None:
        with self._lock:
            found = [sender for sender in self._senders if sender.identity == identity]
        for sender in found:
            self._end(sender)

    def expel(self, identity: str) -> bool:
        with self._lock:
            self._expelled.add(identity)
        self._end_all(identity)
        self._context.log("expelled", sender=identity)
        return True

    def grant(self, tag: int, spans: Spans, sender: str) -> None:
        """Not asked for: not revocable."""

    def revoke(self, tag: int, sender: str) -> bool:
        return False

    def fence(self, identity: str) -> None:
        """A write is acknowledged when it is in memory; a device is told."""
        if self._context.device != "cpu":
            self._context.memory.fence()

    def take_digests(self, tag: int, sender: str) -> npt.NDArray[np.uint64]:
        return np.empty((0, 4), np.uint64)

    # --- where we write ---

    def connect(self, descriptor: bytes) -> Peer:
        """Raises TransferError for a foreign descriptor, PeerLost for a peer that is gone, refuses or hangs."""
        try:
            there = msgspec.msgpack.decode(descriptor, type=link.Descriptor)
        except msgspec.MsgspecError as error:
            raise TransferError(f"not a descriptor of mooncake: {error}") from error
        sock, welcome = link.dial(there, self._identity, self._protocol, self._key)
        try:
            engine = self._engines.make(sock.getsockname()[0], None, () if self._protocol == "tcp" else self._regions)
            if "cpu" in self.capabilities.memory_kinds:
                reached = first_contact(engine, welcome.session, welcome.mailbox, link.HANDSHAKE_TIMEOUT)
            else:
                reached = engine.send_probe(welcome.session) == 0
            if not reached:
                raise PeerLost(there.identity, f"its engine at {welcome.session} does not answer")
        except BaseException:
            sock.close()
            raise
        receiver = Receiver(there.identity, sock, welcome, engine)
        with self._lock:
            self._receivers.add(receiver)
        return receiver

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        """One write for each span: only single writes can be polled one by one."""
        assert isinstance(peer, Receiver)
        if peer.end:  # another process may have its ports by now
            raise PeerLost(peer.identity, peer.end)
        local = [(region.address, region.nbytes) for region in self._regions]
        sources = _addresses(spans[:, 0], spans[:, 1], spans[:, 4], local, "local")
        targets = _addresses(spans[:, 2], spans[:, 3], spans[:, 4], peer.welcome.regions, "remote")
        submit, session = peer.engine.transfer_submit_write, peer.welcome.session
        ticket = Ticket(peer, [])
        for source, target, length in zip(sources, targets, spans[:, 4].tolist(), strict=True):
            write = submit(session, source, target, length)
            if not write:
                raise PeerLost(peer.identity, "Mooncake takes no write to it")
            ticket.writes.append(write)
        return ticket

    def poll(self, ticket: Ticket) -> bool:
        """Mooncake tells no reasons; addresses were checked, so what is left is the peer."""
        writes, peer = ticket.writes, ticket.peer
        while ticket.position < len(writes):
            if peer.engine is None:
                raise PeerLost(peer.identity, peer.end)
            status = peer.engine.transfer_check_status(writes[ticket.position])
            if status == 0:
                return False
            if status != 1:
                raise PeerLost(peer.identity, f"a write failed ({status}): {peer.end or 'it does not answer'}")
            ticket.position += 1
        return True

    def progress(self) -> None:
        """Mooncake has threads of its own."""

    def reset_peer(self, peer: Peer) -> None:
        assert isinstance(peer, Receiver)
        peer.engine = None  # the last reference
        peer.sock.close()
        with self._lock:
            self._receivers.discard(peer)


def _addresses(
    index: npt.NDArray[np.uint64],
    offset: npt.NDArray[np.uint64],
    length: npt.NDArray[np.uint64],
    regions: Sequence[tuple[int, int]],
    what: str,
) -> list[int]:
    """Where spans begin. Raises TransferError for one outside its region, in arithmetic that cannot wrap around."""
    if len(index) and int(index.max()) >= len(regions):
        raise TransferError(f"no such {what} region")
    start, size = np.array(regions, np.uint64).reshape(-1, 2)[index.astype(np.int64)].T
    if np.any(length > size) or np.any(offset > size - length):
        raise TransferError(f"a span outside a {what} region")
    addresses: list[int] = (start + offset).tolist()
    return addresses


def _reachable(host: str) -> str:
    """An address for peers to dial: for the wildcard the one from which packets leave this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        if host == "0.0.0.0":
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return str(probe.getsockname()[0])
    return host if host != "0.0.0.0" else "127.0.0.1"
