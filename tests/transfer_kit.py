"""A transfer backend in memory that does what a test says, a command port, and a device that is no host memory."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from pd.abc import Region, TransferCapabilities
from pd.errors import PeerLost, TransferError
from pd.messages import TransferPushed
from pd.transfer.digest import digest_span
from pd.transfer.engine import EngineConfig, TransferEngine
from pd.transfer.spans import Pool
from pd.types import BlockShape

SHAPE = BlockShape(tokens=4, kv_heads=4, layers=2, head_dim=8, itemsize=2)


def host_region(nbytes: int, fill: int = 0) -> Region:
    raw = np.full(nbytes, fill, dtype=np.uint8)
    return Region(0, int(raw.ctypes.data), nbytes, "cpu", raw.data, raw)


def pool(blocks: int, fill: int = 0, shape: BlockShape = SHAPE, first_head: int = 0) -> Pool:
    return Pool(host_region(blocks * shape.nbytes, fill), shape, first_head)


def contents(one: Pool) -> np.ndarray:
    """uint8[blocks, block_bytes] of a host pool."""
    return np.frombuffer(one.region.buffer, dtype=np.uint8).reshape(-1, one.shape.nbytes)


def i32(*values: int) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


def u64(*values: int) -> bytes:
    return np.array(values, dtype="<u8").tobytes()


@dataclass(eq=False)
class FakePeer:
    identity: str
    backend: ScriptedBackend


@dataclass(eq=False)
class FakeTicket:
    peer: FakePeer
    spans: np.ndarray
    tag: int
    done: bool = False
    error: TransferError | None = None


@dataclass
class ScriptedBackend:
    """Peers are found by name in `network`. With `automatic` a post is applied at once, else by `apply`."""

    network: dict[str, ScriptedBackend]
    capabilities: TransferCapabilities = field(default_factory=TransferCapabilities)
    automatic: bool = True
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    tickets: list[FakeTicket] = field(default_factory=list)
    post_error: TransferError | None = None
    crash: BaseException | None = None
    quiet: bool = True
    progressed: int = 0

    def open(self, identity: str) -> None:
        self.identity = identity
        self.network[identity] = self

    def allocate(self, nbytes: int, device: str) -> Region | None:
        return None

    def register(self, regions: Sequence[Region]) -> None:
        self.regions = list(regions)
        self.digests: dict[tuple[int, str], dict] = {}

    def descriptor(self) -> bytes:
        return self.identity.encode()

    def connect(self, descriptor: bytes) -> FakePeer:
        if descriptor.decode() not in self.network:
            raise PeerLost(descriptor.decode(), "nobody there")
        return FakePeer(descriptor.decode(), self.network[descriptor.decode()])

    def grant(self, tag: int, spans: np.ndarray, sender: str) -> None:
        self.calls.append(("grant", tag, sender, spans.tolist()))

    def revoke(self, tag: int, sender: str) -> bool:
        self.calls.append(("revoke", tag, sender))
        return self.quiet

    def post(self, peer: FakePeer, spans: np.ndarray, tag: int) -> FakeTicket:
        if self.crash is not None:
            raise self.crash
        if self.post_error is not None:
            raise self.post_error
        ticket = FakeTicket(peer, spans, tag)
        self.tickets.append(ticket)
        self.calls.append(("post", peer.identity, tag, len(spans)))
        if self.automatic:
            self.apply(ticket)
        return ticket

    def apply(self, ticket: FakeTicket) -> None:
        """Move the bytes, as the destination would report it."""
        there = ticket.peer.backend
        for source, offset, target, place, length in ticket.spans.tolist():
            data = self.regions[source].buffer[offset : offset + length]
            there.regions[target].buffer[place : place + length] = data
            if there.capabilities.returns_digests:
                there._digest(ticket.tag, self.identity, target, place, length)
        ticket.done = True

    def _digest(self, tag: int, sender: str, region: int, offset: int, length: int) -> None:
        one = self.regions[region]
        for at in range(offset, offset + length, one.block_bytes):
            size = min(one.block_bytes - at % one.block_bytes, offset + length - at)
            word = one.first_word + at % one.block_bytes // 8
            self.digests.setdefault((tag, sender), {})[region, at] = (
                size,
                digest_span(one.buffer[at : at + size], word),
            )

    def poll(self, ticket: FakeTicket) -> bool:
        if ticket.error is not None:
            raise ticket.error
        return ticket.done

    def progress(self) -> None:
        self.progressed += 1

    def fence(self, identity: str) -> None:
        self.calls.append(("fence", identity))

    def take_digests(self, tag: int, sender: str) -> np.ndarray:
        taken = self.digests.pop((tag, sender), {})
        rows = [[region, offset, length, digest] for (region, offset), (length, digest) in taken.items()]
        return np.array(rows, dtype=np.uint64).reshape(-1, 4)

    def expel(self, identity: str) -> bool:
        self.calls.append(("expel", identity))
        return self.quiet

    def reset_peer(self, peer: FakePeer) -> None:
        self.calls.append(("reset", peer.identity))

    def close(self) -> None:
        self.calls.append(("close",))


class NoDevice:
    """`DeviceMemory` of host memory, for pools that are host memory."""

    device = "cpu"

    def digest(self, regions: Any, spans: Any, keys: Any) -> Any:
        raise AssertionError("host memory is digested by numpy")

    def copy(self, region: Any, offset: int, buffer: Any, *, to_device: bool) -> None:
        raise AssertionError("host memory needs no staging")

    def enter(self) -> None:
        pass

    def fence(self) -> None:
        raise AssertionError("host memory needs no staging")


class FakeDevice:
    """A "device" whose memory only `copy` reaches."""

    device = "npu:0"

    def __init__(self, nbytes: int) -> None:
        self.memory = np.zeros(nbytes, dtype=np.uint8)
        self.fences = 0

    def region(self) -> Region:
        return Region(0, 1 << 40, self.memory.size, self.device)

    def digest(self, regions: Sequence[Region], spans: np.ndarray, keys: np.ndarray) -> np.ndarray:
        out = [digest_span(self.memory[o : o + n], int(k)) for (_, o, n), k in zip(spans.tolist(), keys, strict=True)]
        return np.array(out, dtype=np.uint64)

    def copy(self, region: Region, offset: int, buffer: memoryview, *, to_device: bool) -> None:
        assert region.device == self.device
        host = np.frombuffer(buffer, dtype=np.uint8)
        if to_device:
            self.memory[offset : offset + host.size] = host
        else:
            np.frombuffer(buffer, dtype=np.uint8)[:] = self.memory[offset : offset + host.size]

    def enter(self) -> None:
        pass

    def fence(self) -> None:
        self.fences += 1


class QueuePort:
    """`CommandPort` over a queue. `next` waits, bounded, for the next event."""

    def __init__(self) -> None:
        self._in: deque = deque()
        self._bell: queue.Queue = queue.Queue()
        self.events: queue.Queue = queue.Queue()
        self.closed = False

    def give(self, command: Any) -> None:
        self._in.append(command)
        self.wake()

    def next(self, timeout: float = 10.0) -> Any:
        return timeless(self.events.get(timeout=timeout))

    def wait(self, timeout: float | None) -> None:
        self._bell.get(timeout=timeout)

    def recv(self) -> Any:
        return self._in.popleft() if self._in else None

    def send(self, event: Any) -> None:
        self.events.put(event)

    def wake(self) -> None:
        self._bell.put(None)

    def close(self) -> None:
        self.closed = True


class Engine:
    """An engine with its threads around a scripted backend. At the end its threads must have ended, too."""

    def __init__(self, name="P", network=None, config=None, **changes):
        self.network = {} if network is None else network
        self.backend = ScriptedBackend(self.network, capabilities(**changes))
        self.backend.open(name)
        self.pool = pool(8, 9)
        self.failures = []
        self.failed = threading.Event()
        config = config or EngineConfig(threads=2, queues=4)
        self.engine = TransferEngine(self.backend, [self.pool], NoDevice(), config, self._failed)
        self.engine.register()
        self.port = QueuePort()
        others = set(threading.enumerate())
        self.engine.start(self.port)
        self.threads = set(threading.enumerate()) - others

    def _failed(self, error):
        self.failures.append(error)
        self.failed.set()

    def ask(self, command):
        self.port.give(command)
        return self.port.next()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.engine.close()
        assert self.threads and not any(thread.is_alive() for thread in self.threads)


def capabilities(**changes: Any) -> TransferCapabilities:
    return replace(TransferCapabilities(), **changes)


def timeless(event: Any) -> Any:
    """The same for a push that took longer."""
    return msgspec.structs.replace(event, micros=0) if isinstance(event, TransferPushed) else event
