"""`direct`, the built-in transfer backend: no third party, driven by the receiver.

The sender only announces what is ready. The receiver copies it out of the sender's memory under a lock that `revoke`
also takes, applies only what is granted, digests it while it is in the cache, and acknowledges. On one host it maps the
sender's pool (a memfd whose descriptor came over a unix socket, or the memory of a GPU), otherwise it pulls the bytes
through TCP. Where a pool is device memory that the peer cannot map, these bytes are staged in host memory here, window
by window; so the core need not stage anything.

Threads: one accepts, one per connection serves it, and one more pulls where device memory is mapped; all of them cost
nothing while idle.
"""

from __future__ import annotations

import collections
import os
import select
import socket
import threading
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from pd.abc import (
    BackendContext,
    Peer,
    Region,
    SharedDeviceMemory,
    Spans,
    TransferCapabilities,
    host_region,
    machine_id,
    reachable_address,
    within,
)
from pd.abc.doors import UNPROVEN_LIMIT
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd.ipc.memory import SharedMemory
from pd.transfer.digest import WORD
from pd.transfer.direct_ledger import Ledger, sizes_of
from pd.transfer.direct_receive import Incoming, Receiver
from pd.transfer.direct_send import Outgoing, Sender, Ticket, dial
from pd.transfer.direct_shm import Target
from pd.transfer.direct_staged import DeviceSource
from pd.transfer.direct_tcp import HostSource
from pd.transfer.direct_wire import DEVICE, HANDSHAKE_TIMEOUT, MAX_SPANS, SHM, STREAM, new_nonce

#: Longest wait of revoke and expel for a copy that is under way (one takes well under a millisecond).
QUIET_TIMEOUT = 5.0


class DirectDescriptor(msgspec.Struct, frozen=True, array_like=True, tag="direct/1"):
    """`machine` and `path` reach the unix socket, `host` and `port` the TCP one; "" where it does not listen.

    `device` is the kind of memory of the regions: "cpu", "cuda", …
    """

    identity: str
    machine: str
    path: str
    host: str
    port: int
    regions: list[int]
    device: str = "cpu"


def way_to_offer(near: bool, here: str, there: str, shareable: bool) -> str:
    """How bytes may go to a peer: `near` says that a unix socket reaches it, `here` and `there` are kinds of memory.

    `shareable`: ours can be mapped by others. Whether this peer can map it, it finds out itself.
    """
    if not near or not shareable or here != there:
        return STREAM
    return SHM if here == "cpu" else DEVICE


class DirectBackend:
    """See the module.

    Options: `transfer_memory` auto | shm | tcp, shm standing for any memory that is mapped on one host;
    `insecure_control_plane` opens TCP beyond this host without a secret.
    """

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._kind = context.device.partition(":")[0]
        self.capabilities = TransferCapabilities(
            memory_kinds=frozenset({"cpu", self._kind}),
            # A copy by the host is longer than what surrounds it; a device copies 1,024 small spans in less time.
            max_spans_per_post=1024 if self._kind == "cpu" else MAX_SPANS,
            concurrent_posts=True,
            revocable=True,
            returns_digests=True,
            allocates=True,
            quiet_errors=True,
        )
        #: Connections made as sender, by the way that their bytes go.
        self.ways: collections.Counter[str] = collections.Counter()
        self._memory = context.options.get("transfer_memory", "auto")
        if self._memory not in ("auto", "shm", "tcp"):
            raise BackendUnavailable("direct", f"transfer_memory={self._memory}", "use auto, shm or tcp")
        self._host = context.data_host
        self._identity = ""
        self._regions: Sequence[Region] = ()
        self._shared: dict[int, SharedMemory] = {}  # address -> what allocate() made
        self._receiver: Receiver | None = None
        self._sender: Sender | None = None
        self._listeners: list[socket.socket] = []
        self._path = ""
        self._port = 0
        self._wake = -1
        self._acceptor: threading.Thread | None = None
        self._lock = threading.Lock()
        self._incoming: set[Incoming] = set()
        self._outgoing: set[Outgoing] = set()
        self._closed = False
        self._failure: BaseException | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    def open(self, identity: str) -> None:
        """Bind. Nobody is answered before `register`."""
        self._identity = identity
        try:
            if self._memory != "tcp":
                # The abstract namespace leaves no file behind and belongs to a network namespace.
                self._path = f"pd-direct-{new_nonce().hex()}"
                unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._listeners.append(unix)
                unix.bind("\0" + self._path)
            if self._memory != "shm":
                family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
                tcp = socket.socket(family, socket.SOCK_STREAM)
                self._listeners.append(tcp)
                tcp.bind((self._host, 0))
                self._port = tcp.getsockname()[1]
        except OSError as error:
            self.close()
            raise BackendUnavailable(
                "direct", f"cannot bind to {self._host}: {error}", "check --control-host"
            ) from error

    def allocate(self, nbytes: int, device: str) -> Region | None:
        """Host memory that peers on this host can map; zeroed, touched by nobody yet."""
        if device != "cpu":
            return None
        memory = SharedMemory.create("pd-kv", nbytes)
        region = host_region(memory.buffer, memory)
        self._shared[region.address] = memory
        return region

    def register(self, regions: Sequence[Region]) -> None:
        for region in regions:
            if region.device.partition(":")[0] != self._kind or (region.buffer is None) != (self._kind != "cpu"):
                raise TransferError(f"a region of {region.device} in a backend for {self._context.device}")
        self._regions = tuple(regions)
        key = self._context.secret or b""
        log = self._context.log
        ledger, target = Ledger(regions), Target(regions)
        self._receiver = Receiver(self._identity, key, ledger, target, self._context.memory, log, self._fail)
        self._sender = Sender(
            self._identity,
            key,
            [region.nbytes for region in regions],
            DeviceSource(regions, self._context.memory) if target.on_device else HostSource(regions),
            self._descriptors(regions),
            self._export(regions),
            self._context.memory.enter,
            log,
            self._fail,
        )
        for listener in self._listeners:
            listener.listen(128)
            listener.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._acceptor = threading.Thread(target=self._accept, name="pd-direct-accept", daemon=True)
        self._acceptor.start()

    def _descriptors(self, regions: Sequence[Region]) -> list[int]:
        """Of the regions' shared memory; none where one of them is not."""
        owned = [self._shared.get(region.address) for region in regions]
        fds = [one.fd for one in owned if one is not None]
        return fds if len(fds) == len(regions) else []

    def _export(self, regions: Sequence[Region]) -> bytes:
        """What lets others map the regions, if they are device memory; empty where that is impossible."""
        memory = self._context.memory
        if self._kind == "cpu" or self._memory == "tcp" or not isinstance(memory, SharedDeviceMemory):
            return b""
        try:
            return memory.export(regions)
        except TransferError as error:
            self._context.log("device memory cannot be shared", reason=error.reason)
            return b""

    def descriptor(self) -> bytes:
        host = reachable_address(self._host) if self._port else ""
        sizes = [region.nbytes for region in self._regions]
        return msgspec.msgpack.encode(
            DirectDescriptor(self._identity, machine_id(), self._path, host, self._port, sizes, self._kind)
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            incoming, outgoing = list(self._incoming), list(self._outgoing)
        if self._wake >= 0 and self._acceptor is not None:
            os.eventfd_write(self._wake, 1)
            self._acceptor.join(QUIET_TIMEOUT)
            os.close(self._wake)
            self._wake = -1
        for listener in self._listeners:
            listener.close()
        for peer in outgoing:
            self.reset_peer(peer)
        for connection in incoming:
            connection.close()
        deadline = time.monotonic() + QUIET_TIMEOUT
        for connection in incoming:
            connection.join(deadline - time.monotonic())
        self._receiver = self._sender = None
        for memory in self._shared.values():
            memory.close()
        self._shared.clear()

    def _fail(self, error: BaseException) -> None:
        """A thread met a defect: the next call raises it, so that the owner hears of it."""
        self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError("a thread of the direct backend failed") from self._failure

    # --- connections --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        by_fd = {listener.fileno(): listener for listener in self._listeners}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        try:
            while True:
                for fd, _ in poll.poll():
                    if fd == self._wake:
                        return
                    try:
                        sock, _ = by_fd[fd].accept()
                    except (BlockingIOError, ConnectionError):
                        continue
                    except OSError as error:  # out of descriptors: the connection waits in the backlog
                        self._context.log("cannot accept a data connection", reason=str(error))
                        time.sleep(0.05)
                        continue
                    self._take(sock)
        except BaseException as error:
            self._fail(error)

    def _take(self, sock: socket.socket) -> None:
        receiver = self._receiver
        with self._lock:
            unproven = sum(not one.sender for one in self._incoming)
            if receiver is None or self._closed or unproven >= UNPROVEN_LIMIT:
                sock.close()
                return
            connection = Incoming(sock, receiver, self._forget)
            self._incoming.add(connection)
        connection.start()

    def _forget(self, connection: Incoming) -> None:
        with self._lock:
            self._incoming.discard(connection)

    def connect(self, descriptor: bytes) -> Peer:
        """Raises TransferError for a foreign descriptor, PeerLost for a peer that is gone or refuses."""
        self._check()
        try:
            there = msgspec.msgpack.decode(descriptor, type=DirectDescriptor)
        except msgspec.MsgspecError as error:
            raise TransferError(f"not a descriptor of direct: {error}") from error
        sender = self._sender
        if sender is None or self._closed:
            raise PeerLost(there.identity, "this backend is closed")
        if any(not 0 < size < 1 << 48 for size in there.regions):
            raise TransferError("not a descriptor of direct: region sizes")
        sock, near = self._reach(there)
        try:
            offer = way_to_offer(near, self._kind, there.device, bool(sender.fds or sender.handle))
            way, note, page = dial(sock, sender, there.identity, offer)
        except BaseException:
            sock.close()
            raise
        self._context.log("connected", receiver=there.identity, way=way, near=near, note=note)
        peer = Outgoing(sock, sender, there.identity, np.array(there.regions, dtype=np.uint64), page)
        with self._lock:
            self._outgoing.add(peer)
            self.ways[way] += 1
        return peer

    def _reach(self, there: DirectDescriptor) -> tuple[socket.socket, bool]:
        """A connected socket, and whether it is a unix one: whether memory can be shared over it."""
        reason = "it does not listen for what transfer_memory allows here"
        if self._memory != "tcp" and there.path and there.machine == machine_id():
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            unix.settimeout(HANDSHAKE_TIMEOUT)
            try:
                unix.connect("\0" + there.path)
                return unix, True
            except (OSError, ValueError) as error:  # gone, or in another network namespace: try TCP
                unix.close()
                reason = str(error)
        if self._memory != "shm" and there.port:
            try:
                return socket.create_connection((there.host, there.port), timeout=HANDSHAKE_TIMEOUT), False
            except (OSError, OverflowError) as error:
                reason = str(error)
        raise PeerLost(there.identity, reason)

    # --- sender -------------------------------------------------------------------------------------------------

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        self._check()
        assert isinstance(peer, Outgoing)
        spans = np.ascontiguousarray(spans, dtype=np.uint64).reshape(-1, 5)
        if len(spans) > MAX_SPANS:
            raise TransferError(f"{len(spans)} spans in one post, at most {MAX_SPANS}")
        if not within(spans[:, 0], spans[:, 1], spans[:, 4], sizes_of(self._regions)):
            raise TransferError("a span outside the local regions")
        if not within(spans[:, 2], spans[:, 3], spans[:, 4], peer.sizes):
            raise TransferError("a span outside the peer's regions")
        words = spans[:, 1] | spans[:, 3] | spans[:, 4]
        if self._kind != "cpu" and int(np.bitwise_or.reduce(words, initial=0)) & (WORD - 1):
            raise TransferError(f"spans of device memory are whole words of {WORD} bytes")
        if not len(spans):
            ticket = Ticket()
            ticket.done = True
            return ticket
        return peer.post(spans, tag)

    def poll(self, ticket: Ticket) -> bool:
        if ticket.error is not None:
            raise ticket.error
        if not ticket.done:
            self._check()
        return ticket.done

    def progress(self) -> None:
        self._check()

    def reset_peer(self, peer: Peer) -> None:
        assert isinstance(peer, Outgoing)
        peer.reset()
        peer.join(QUIET_TIMEOUT)
        with self._lock:
            self._outgoing.discard(peer)

    # --- receiver -----------------------------------------------------------------------------------------------

    def _ledger(self) -> Ledger:
        self._check()
        if self._receiver is None:
            raise TransferError("not open")
        return self._receiver.ledger

    def grant(self, tag: int, spans: Spans, sender: str) -> None:
        self._ledger().grant(tag, spans, sender)

    def revoke(self, tag: int, sender: str) -> bool:
        return self._ledger().revoke(tag, sender, QUIET_TIMEOUT)

    def take_digests(self, tag: int, sender: str) -> npt.NDArray[np.uint64]:
        return self._ledger().take(tag, sender)

    def fence(self, identity: str) -> None:
        """Nothing to do: this process's own threads wrote, before they reported."""
        self._check()

    def expel(self, identity: str) -> bool:
        ledger = self._ledger()
        deadline = time.monotonic() + QUIET_TIMEOUT
        quiet = ledger.expel(identity, QUIET_TIMEOUT)
        with self._lock:
            connections = [one for one in self._incoming if one.sender == identity]
        for connection in connections:
            connection.close()
        for connection in connections:
            connection.join(deadline - time.monotonic())
        self._context.log("expelled", sender=identity, quiet=quiet)
        return quiet
