"""The two processes of `pd bench transfer`: the sender in a child, the receiver in the benchmark's own process."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import numpy.typing as npt

from pd.abc import BackendContext, Region, Spans, TransferBackend
from pd.errors import ConfigError
from pd.ipc.memory import SharedMemory
from pd.plugins import load_plugins
from pd.testing.transfer_peer import RemoteSide, Side, main
from pd.transfer.digest import digest_span
from pd.transfer.workers import POLL_FIRST, POLL_LAST

FACTORY = "pd.bench.transfer_ends:from_plugins"


def from_plugins(context: BackendContext) -> TransferBackend:
    """The installed backend that the option `backend` names, with the other options."""
    options = dict(context.options)
    name = options.pop("backend")
    backends = load_plugins().backends()
    if name not in backends:
        raise ConfigError("--backend", f"no transfer backend {name!r}", f"installed: {', '.join(sorted(backends))}")
    return backends[name].factory(replace(context, options=options))


def scattered(nbytes: int, length: int, region: int) -> Spans:
    """Spans of `length` that cover a pool once, from random places to consecutive ones, so that no two merge."""
    count = nbytes // length
    spans = np.zeros((count, 5), dtype=np.uint64)
    spans[:, 1] = np.random.default_rng(length).permutation(count) * length
    spans[:, 2] = region
    spans[:, 3] = np.arange(count) * length
    spans[:, 4] = length
    return spans


def bare_engine(name: str) -> ModuleType | None:
    """The module `bare` beside that of the backend's factory, if its package has one.

    It measures the vendor's engine as its own users drive it, without the backend, with two functions:

        receive(address, nbytes) -> (descriptor, progress, close)      # progress() is called every millisecond
        send(address, nbytes, descriptor) -> (write, close)            # write(spans) returns when all is applied
    """
    info = load_plugins().backends().get(name)
    package = getattr(info.factory, "__module__", "").rpartition(".")[0] if info is not None else ""
    if not package or importlib.util.find_spec(f"{package}.bare") is None:
        return None
    return importlib.import_module(f"{package}.bare")


class BenchSide(Side):
    """A backend whose pool is registered once without digests and, where it returns them, once per block size."""

    def __init__(self, factory: str, host: str, secret: str, options: Mapping[str, str]) -> None:
        super().__init__(factory, host, secret, options)
        self.bare = bare_engine(options["backend"])
        self.bare_progress: Callable[[], None] = lambda: None
        self._bare_write: Callable[[Spans], None] | None = None
        self._bare_close: Callable[[], None] = lambda: None

    def open_pool(self, identity: str, nbytes: int, blocks: Sequence[int]) -> int:
        """Returns the descriptor number of the pool's memory, in this process."""
        self.backend.open(identity)
        region = self.backend.allocate(nbytes, "cpu") if self.capabilities.allocates else None
        if region is None:
            shared = SharedMemory.create("pd-bench", nbytes)
            address = int(np.frombuffer(shared.buffer, dtype=np.uint8).ctypes.data)
            region = Region(0, address, nbytes, "cpu", shared.buffer, shared)
        sizes = [0, *blocks] if self.capabilities.returns_digests else [0]
        regions = [replace(region, index=i, block_bytes=size) for i, size in enumerate(sizes)]
        self._region = regions[0]
        self.backend.register(regions)
        self.pattern(1)
        owner = region.owner
        return owner.fd if isinstance(owner, SharedMemory) else -1

    def bare_receive(self) -> str:
        """Open the bare engine on the pool as a receiver; its descriptor."""
        assert self.bare is not None
        address, nbytes = int(self.memory.ctypes.data), self.memory.size
        descriptor, self.bare_progress, self._bare_close = self.bare.receive(address, nbytes)
        return bytes(descriptor).hex()

    def bare_send(self, descriptor: str) -> None:
        assert self.bare is not None
        address, nbytes = int(self.memory.ctypes.data), self.memory.size
        self._bare_write, self._bare_close = self.bare.send(address, nbytes, bytes.fromhex(descriptor))

    def bare_transfer(self, length: int) -> list[float]:
        """The spans of `transfer` by the bare engine; [seconds, CPU seconds of this process]."""
        assert self._bare_write is not None
        spans = scattered(self.memory.size, length, 0)
        cpu, start = time.process_time(), time.perf_counter()
        self._bare_write(spans)
        return [time.perf_counter() - start, time.process_time() - cpu]

    def close(self) -> None:
        self._bare_close()
        super().close()

    def allow(self, tag: int, region: int, sender: str) -> None:
        """Grant the whole of a region."""
        if self.capabilities.revocable:
            self.backend.grant(tag, np.array([[region, 0, 0, 0, self.memory.size]], dtype=np.uint64), sender)

    def span_digests(self, length: int) -> list[int]:
        """Digest of each span of `scattered`, in its order: what the sender knows beforehand."""
        offsets = scattered(self.memory.size, length, 0)[:, 1].tolist()
        memory = self.memory
        return [digest_span(memory[offset : offset + length], 0) for offset in offsets]

    def transfer(self, peer: str, tag: int, length: int, region: int) -> list[float]:
        """Send the whole pool; [seconds, CPU seconds of this process]."""
        spans = scattered(self.memory.size, length, region)
        step = self.capabilities.max_spans_per_post
        backend, there = self.backend, self._peers[peer]
        cpu, start = time.process_time(), time.perf_counter()
        waiting = [backend.post(there, spans[i : i + step], tag) for i in range(0, len(spans), step)]
        pause = POLL_FIRST
        while waiting:
            self.progress()
            left = [ticket for ticket in waiting if not backend.poll(ticket)]
            pause = min(pause * 1.5, POLL_LAST) if len(left) == len(waiting) else POLL_FIRST
            waiting = left
            if waiting:
                time.sleep(pause)
        return [time.perf_counter() - start, time.process_time() - cpu]

    def latencies(self, peer: str, tag: int, length: int, region: int, count: int, together: int) -> list[float]:
        """Seconds from the post of `together` spans until they are known to be applied."""
        spans = scattered(self.memory.size, length, region)
        groups = len(spans) // together
        out = []
        for i in range(count):
            first = i % groups * together
            start = time.perf_counter()
            ticket = self.backend.post(self._peers[peer], spans[first : first + together], tag)
            while not self.backend.poll(ticket):
                self.progress()
                time.sleep(1e-5)
            out.append(time.perf_counter() - start)
        return out


class Pair:
    """A sender process and a receiver here, connected."""

    def __init__(self, name: str, options: dict[str, str], nbytes: int, blocks: Sequence[int]) -> None:
        self.name = name
        self.blocks = list(blocks)
        self.sender = RemoteSide(FACTORY, "127.0.0.1", "", options, module="pd.bench.transfer_ends")
        try:
            self.receiver = BenchSide(FACTORY, "127.0.0.1", "", options)
            self.receiver.open_pool(f"{name}-receiver", nbytes, blocks)
            fd = self.sender.call("open_pool", f"{name}-sender", nbytes, blocks, timeout=120.0)
            self.peer = self.sender.call("connect", self.receiver.descriptor())
            if self.bare:
                self.sender.call("bare_send", self.receiver.bare_receive(), timeout=120.0)
        except BaseException:
            self.sender.kill()
            raise
        self._path = f"/proc/{self.sender.process.pid}/fd/{fd}" if fd >= 0 else ""
        self._digests: dict[int, npt.NDArray[np.uint64]] = {}
        self._tag = 0

    @property
    def digests(self) -> bool:
        return self.receiver.capabilities.returns_digests

    def map_source(self) -> mmap.mmap | None:
        """The sender's pool, mapped read-only here, or None where it is not shared memory."""
        if not self._path:
            return None
        fd = os.open(self._path, os.O_RDONLY)
        try:
            return mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)

    def pump(self, length: int, digests: bool) -> tuple[float, float, float]:
        """One pass over the pool, check included: (seconds, CPU seconds of the sender, of the receiver)."""
        region = 1 + self.blocks.index(length) if digests else 0
        if digests and length not in self._digests:
            known = self.sender.call("span_digests", length, timeout=120.0)
            self._digests[length] = np.array(known, dtype=np.uint64)
        self._tag += 1
        self.receiver.allow(self._tag, region, f"{self.name}-sender")
        cpu = time.process_time()
        seconds, sender_cpu = self.sender.call(
            "transfer", self.peer, self._tag, length, region, timeout=300.0, meanwhile=self._driver
        )
        start = time.perf_counter()
        if digests:
            self._check(length, region)
        seconds += time.perf_counter() - start
        receiver_cpu = time.process_time() - cpu
        if self.receiver.capabilities.revocable:
            assert self.receiver.backend.revoke(self._tag, f"{self.name}-sender")
        return seconds, sender_cpu, receiver_cpu

    @property
    def bare(self) -> bool:
        """Whether the engine can be measured without the backend."""
        return self.receiver.bare is not None

    @property
    def _driver(self) -> Callable[[], None] | None:
        return self.receiver.progress if self.receiver.capabilities.needs_progress else None

    def pump_bare(self, length: int) -> tuple[float, float, float]:
        """The same spans without the backend."""
        cpu = time.process_time()
        seconds, sender_cpu = self.sender.call(
            "bare_transfer", length, timeout=300.0, meanwhile=self.receiver.bare_progress
        )
        return seconds, sender_cpu, time.process_time() - cpu

    def _check(self, length: int, region: int) -> None:
        taken = self.receiver.backend.take_digests(self._tag, f"{self.name}-sender")
        known = self._digests[length]
        taken = taken[np.argsort(taken[:, 1])]
        if not np.array_equal(taken[:, 3], known) or np.any(taken[:, 0] != region):
            raise RuntimeError(f"{self.name}: a digest differs")

    def latency(self, length: int, count: int, spans: int = 1) -> list[float]:
        """Seconds for `spans` of them together, `count` times."""
        region = 1 + self.blocks.index(length) if self.digests else 0
        self._tag += 1
        self.receiver.allow(self._tag, region, f"{self.name}-sender")
        seconds: list[float] = self.sender.call(
            "latencies", self.peer, self._tag, length, region, count, spans, timeout=120.0, meanwhile=self._driver
        )
        if self.digests:
            self.receiver.backend.take_digests(self._tag, f"{self.name}-sender")
        return seconds

    def content_is_right(self, length: int) -> bool:
        """Whether the receiver's pool is the sender's, span by span."""
        memory = self.receiver.memory
        known = np.array(self.sender.call("span_digests", length, timeout=120.0), dtype=np.uint64)
        got = [digest_span(memory[i * length : (i + 1) * length], 0) for i in range(len(known))]
        return bool(np.array_equal(np.array(got, dtype=np.uint64), known))

    def close(self) -> None:
        self.sender.kill()
        self.receiver.close()


class RawCopy:
    """The same spans copied out of another process's memory, one memmove each, by the simplest loop."""

    def __init__(self, source: mmap.mmap, target: npt.NDArray[np.uint8]) -> None:
        self._source = np.frombuffer(source, dtype=np.uint8)
        self._target = target

    def pump(self, length: int) -> tuple[float, float]:
        """(seconds, CPU seconds)."""
        spans = scattered(self._target.size, length, 0)
        source, target = int(self._source.ctypes.data), int(self._target.ctypes.data)
        pairs = list(zip((spans[:, 3] + target).tolist(), (spans[:, 1] + source).tolist(), strict=True))
        move = ctypes.memmove
        cpu, start = time.process_time(), time.perf_counter()
        for there, here in pairs:
            move(there, here, length)
        return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    main(BenchSide)
