"""What a transfer backend is: a small, synchronous data plane that knows nothing of requests.

The core (`pd.transfer.engine`) owns the driving threads and does slicing, coalescing, chunking, queues, deadlines,
digests, staging and quarantine. It sends nothing twice: a push that fails ends its hand-off. Failed or cancelled never
means quiet: a backend promises quiet memory only where a method's docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from pd.abc.hosts import LOOPBACK
from pd.errors import TransferError

#: uint64[n, 5]: local region index, local offset, remote region index, remote offset, length in bytes.
#: Sorted by (remote region, remote offset), neighbours already merged.
Spans: TypeAlias = npt.NDArray[np.uint64]
U64: TypeAlias = npt.NDArray[np.uint64]

T = TypeVar("T", bound=msgspec.Struct)

#: A number that a peer sends: an address, a length. It fits a column of Spans.
Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


@dataclass(frozen=True)
class TransferCapabilities:
    """What the core may assume of a backend."""

    memory_kinds: frozenset[str] = frozenset({"cpu"})  # of "cpu", "cuda", "npu"
    max_spans_per_post: int = 1024
    needs_progress: bool = False  # progress() is called as its docstring says
    concurrent_posts: bool = False  # post/poll may be called from several threads at once (for different peers)
    blocking_post: bool = False  # post() returns when the data has been applied
    revocable: bool = False  # grant/revoke fence single hand-offs at the receiver
    returns_digests: bool = False  # the receiver's side digests what it applied: see `take_digests`
    allocates: bool = False  # allocate() must supply the KV pool
    quiet_errors: bool = False  # a TransferError of poll (not a PeerLost) means that this post's write is over


@dataclass(frozen=True)
class Region:
    """One registered span of memory. `index` is what Spans name; assigned by the core in registration order.

    `address` is a host or device pointer; `buffer` a writable memoryview for host memory, else None. `owner` keeps the
    memory alive. `block_bytes` and `first_word` place digests: a span's bytes at offset o are keyed by the word
    `first_word + o % block_bytes / 8` of their block; 0 asks for no digests in this region.
    """

    index: int
    address: int
    nbytes: int
    device: str  # "cpu", "cuda:0", …
    buffer: memoryview | None = None
    owner: Any = field(default=None, repr=False, compare=False)
    block_bytes: int = 0
    first_word: int = 0


def host_region(buffer: memoryview, owner: Any = None) -> Region:
    """The host memory behind a writable buffer. `owner`: what keeps it alive, where the buffer does not."""
    address = int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
    return Region(0, address, buffer.nbytes, "cpu", buffer, owner)


class Peer(Protocol):
    """A connected remote engine; made by `connect`."""

    @property
    def identity(self) -> str: ...


#: Opaque handle of one post.
Ticket: TypeAlias = Any


class DeviceMemory(Protocol):
    """What the transfer core needs of a device, so that it needs no torch. Handed over by the runner."""

    @property
    def device(self) -> str: ...

    def digest(self, regions: Sequence[Region], spans: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> Any:
        """Digest of spans (uint64[n, 3]: region, offset, length), see `pd.transfer.digest`; returns uint64[n].

        `keys[i]` is the position, in 64-bit words, of span i's first word within its block.
        """

    def copy(self, region: Region, offset: int, buffer: memoryview, *, to_device: bool) -> None:
        """Copy between device memory and a host buffer; returns when done (staging)."""

    def enter(self) -> None:
        """Make it the calling thread's current device. The core's threads do so themselves; a backend's own must."""

    def fence(self) -> None:
        """Later work on the device sees every host or peer write that has completed."""


class MappedMemory(Protocol):
    """Regions of another process's device, readable here until `close`."""

    def close(self) -> None:
        """Unmap. The caller knows that no pull of them is under way."""


class Pull(Protocol):
    """A prepared copy out of mapped memory. It writes from `start` until `finish` returned, and at no other time."""

    def start(self) -> None: ...

    def finish(self) -> U64:
        """Wait until all is copied and visible to later work; the digests uint64[n], none if none were asked for."""

    def release(self) -> None:
        """Give back what `prepare` took. After `finish`, or instead of `start`."""


@runtime_checkable
class SharedDeviceMemory(DeviceMemory, Protocol):
    """A device whose memory other processes of this host can map."""

    @property
    def pull_spans(self) -> int:
        """Most spans of one pull."""

    def export(self, regions: Sequence[Region]) -> bytes:
        """What lets another process map these regions. Raises TransferError where that is impossible."""

    def open(self, handle: bytes, sizes: Sequence[int]) -> MappedMemory:
        """Map what another process exported, regions of these sizes, and see that it can be read.

        Raises TransferError where that is impossible: another kind of device, no path between two, a container.
        """

    def prepare(
        self, mapped: MappedMemory, source: int, region: Region, spans: npt.NDArray[np.int64], words: U64 | None
    ) -> Pull:
        """A pull of spans int64[n, 3] (offset in mapped region `source`, offset in `region`, length; whole words).

        `words[i]` is the position, in words, of span i's first word within its block; None asks for no digests. Waits
        while too many pulls are prepared. Thread-safe; the spans are inside both regions.
        """


@dataclass(frozen=True)
class BackendContext:
    """Handed to a backend's factory. `options` holds the settings that the backend registered as accepted."""

    host: str
    device: str
    memory: DeviceMemory
    secret: bytes | None = None  # the cluster secret's data-plane key; None without PD_CLUSTER_SECRET
    options: Mapping[str, str] = field(default_factory=dict)
    log: Callable[..., None] = lambda *a, **k: None
    role: str = ""  # "prefill" or "decode"; "" where a backend is used by itself

    @property
    def data_host(self) -> str:
        """Where a backend may take connections: `host` if peers can prove who they are or the user calls the network

        safe (option `insecure_control_plane`); loopback otherwise.
        """
        insecure = self.options.get("insecure_control_plane", "").lower() in ("1", "true", "yes")
        return self.host if self.secret is not None or insecure or self.host in LOOPBACK else "127.0.0.1"


@dataclass(frozen=True)
class BackendInfo:
    """Static information, so that the CLI validates without importing a vendor library."""

    name: str
    factory: Callable[[BackendContext], TransferBackend]
    summary: str = ""
    accepts: frozenset[str] = frozenset()  # device flags that act: "ib_device", …
    environment: Mapping[str, str] = field(default_factory=dict)  # variable -> what it does
    unavailable: Callable[[], str | None] = lambda: None  # a reason and remedy, or None; must be cheap
    refuses: Callable[[str, str], str | None] = lambda setting, value: None  # why a device flag cannot act here
    one_thread: bool = False  # no `concurrent_posts`: `--transfer-threads` above 1 is refused


@runtime_checkable
class TransferBackend(Protocol):
    """Synchronous; driven by engine threads that the core owns (one, or several where `concurrent_posts`)."""

    capabilities: TransferCapabilities

    def open(self, identity: str) -> None:
        """Start under this identity (instance id, incarnation and rank). Raises BackendUnavailable."""

    def allocate(self, nbytes: int, device: str) -> Region | None:
        """Supply the KV pool from the backend's own allocator, or None: the core allocates."""

    def register(self, regions: Sequence[Region]) -> None:
        """Pin the KV pool; called once, before any peer."""

    def descriptor(self) -> bytes:
        """Opaque: endpoint and memory keys. The core adds a checksum and ships it over the control plane."""

    def connect(self, descriptor: bytes) -> Peer:
        """Raises PeerLost, or TransferError for a descriptor that this backend did not make."""

    def grant(self, tag: int, spans: Spans, sender: str) -> None:
        """Receiver, if `revocable`: what this hand-off of `sender` may write (local columns of spans)."""

    def revoke(self, tag: int, sender: str) -> bool:
        """Receiver: True when nothing with this tag can land any more."""

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        """Sender: write local spans to the peer. Raises PeerLost, TransferError."""

    def poll(self, ticket: Ticket) -> bool:
        """True when applied at the destination. Raises PeerLost, TransferError."""

    def progress(self) -> None:
        """If `needs_progress`: called every millisecond while a hand-off may be written here or a push is under way,

        from when it was granted or handed in, and every 20 ms at other times.
        """

    def fence(self, identity: str) -> None:
        """Receiver: later kernels see every write of this sender that was reported complete."""

    def take_digests(self, tag: int, sender: str) -> npt.NDArray[np.uint64]:
        """Receiver, if `returns_digests`: uint64[n, 4] (region, offset, length, digest) of what this tag applied.

        Spans are cut at block boundaries; the digest is `pd.transfer.digest` of each piece, keyed by its position
        within its block. Removes them. The core digests blocks itself that these do not add up to.
        """

    def expel(self, identity: str) -> bool:
        """Receiver: True when nothing from this sender incarnation can land here any more. Final for the identity."""

    def reset_peer(self, peer: Peer) -> None:
        """Sender: when it returns, no local byte is read for this peer any more (for a receiver-driven backend:

        nothing read later is reported landed, nor written outside incoming or quarantined blocks).
        """

    def close(self) -> None:
        """Sender: as after `reset_peer` of every peer. Receiver: peers that would write here learn that it has gone."""


class BackendDefaults:
    """For a backend whose capabilities exclude some methods of TransferBackend: these do what is right then.

    Not `revocable`, no `returns_digests`, no `allocates`, no `needs_progress`. `context` is the factory's argument.
    """

    def __init__(self, context: BackendContext) -> None:
        self.context = context

    def allocate(self, nbytes: int, device: str) -> Region | None:
        return None

    def grant(self, tag: int, spans: Spans, sender: str) -> None:
        """Not revocable: whoever is connected may write to all that is registered."""

    def revoke(self, tag: int, sender: str) -> bool:
        return False

    def take_digests(self, tag: int, sender: str) -> U64:
        return np.zeros((0, 4), np.uint64)

    def fence(self, identity: str) -> None:
        """Enough where a write is reported complete when it is in memory: the host sees it, a device is told."""
        if self.context.device != "cpu":
            self.context.memory.fence()

    def progress(self) -> None:
        """Nothing to drive."""


def decode(data: bytes, kind: type[T]) -> T:
    """A msgspec struct from a peer's descriptor or words. Raises TransferError."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (ValueError, RecursionError) as error:  # also for what is no text, or nested without end
        raise TransferError(f"no {kind.__name__.lower()} of this backend: {error}") from error


def within(index: U64, offset: U64, length: U64, sizes: U64) -> bool:
    """Whether every span is non-empty and wholly in its region, given each region's bytes; for columns of Spans.

    No sum that could wrap around.
    """
    if not len(index):
        return True
    if len(sizes) == 1:  # the usual case, in fewer passes
        most = int(sizes[0])
        fit = not index.any() and length.min() > 0 and length.max() <= most and offset.max() <= most
        return bool(fit and (offset + length).max() <= most)
    if int(index.max()) >= len(sizes):
        return False
    size = sizes[index.astype(np.int64)]
    return bool(np.all((length > 0) & (length <= size) & (offset <= size - np.minimum(length, size))))


def addresses(index: U64, offset: U64, length: U64, regions: Sequence[tuple[int, int]], what: str) -> U64:
    """Where spans begin, given each region's address and bytes. Raises TransferError unless they are `within` those."""
    table = np.array(regions, np.uint64).reshape(-1, 2)
    if not within(index, offset, length, table[:, 1]):
        raise TransferError(f"a span outside the {what} regions")
    found: U64 = table[index.astype(np.int64), 0] + offset
    return found
