"""The two processes of `pd bench transfer`: the sender in a child, the receiver in the benchmark's own process."""

from __future__ import annotations

import collections
import importlib
import importlib.util
import itertools
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.abc import BackendContext, BackendInfo, Region, Spans, TransferBackend
from pd.bench.transfer_floor import DeviceCopy, Floor, HostCopy, timed
from pd.bench.transfer_plan import Layout
from pd.bench.transfer_pool import allocate, clear, device_memory, fill, span_digests
from pd.errors import ConfigError
from pd.ipc.memory import SharedMemory
from pd.plugins import load_plugins
from pd.testing.transfer_peer import RemoteSide, Side, main
from pd.transfer.queues import POSTS_IN_FLIGHT
from pd.transfer.spans import Pool, posts
from pd.transfer.staging import Staging
from pd.transfer.workers import POLL_FIRST, POLL_LAST
from pd.types import BlockShape

FACTORY = "pd.bench.transfer_ends:from_plugins"

#: Seconds between polls where latency is measured.
POLL_OFTEN = 10e-6

#: Sizes of blocks are multiples: `BlockShape` counts keys, values and words of 8 bytes.
BLOCK_STEP = 16

#: (seconds, CPU seconds of the sender, of the receiver)
Measured = tuple[float, float, float]

U64 = npt.NDArray[np.uint64]


def installed(name: str) -> BackendInfo:
    """A backend that works here. Raises ConfigError."""
    backends = load_plugins().backends()
    if name not in backends:
        raise ConfigError("--backend", f"no transfer backend {name!r}", f"installed: {', '.join(sorted(backends))}")
    if reason := backends[name].unavailable():
        raise ConfigError("--backend", f"{name} is not usable here", reason)
    return backends[name]


def from_plugins(context: BackendContext) -> TransferBackend:
    """The installed backend that the option `backend` names, for the option `device`, with the other options."""
    options = dict(context.options)
    name, device = options.pop("backend"), options.pop("device")
    here = replace(context, options=options, device=device, memory=device_memory(device))
    return installed(name).factory(here)


def bare_engine(name: str) -> ModuleType | None:
    """The module `bare` beside that of the backend's factory, if its package has one.

    It measures the vendor's engine as its own users drive it, without the backend, with two functions:

        receive(address, nbytes, device) -> (descriptor, progress, close)   # progress() is called every millisecond
        send(address, nbytes, device, descriptor) -> (write, close)         # write(spans) returns when all is applied

    `device` is "cpu" or "cuda:N", which is the current one, and the backend's factory was called before.
    """
    package = getattr(installed(name).factory, "__module__", "").rpartition(".")[0]
    if not package or importlib.util.find_spec(f"{package}.bare") is None:
        return None
    return importlib.import_module(f"{package}.bare")


class BenchSide(Side):
    """A backend whose pool is registered once without digests and, where it returns them, once per block size."""

    def __init__(self, factory: str, host: str, secret: str, options: Mapping[str, str]) -> None:
        self.place = options["device"]
        device_memory(self.place).enter()
        super().__init__(factory, host, secret, options)
        self.bare = bare_engine(options["backend"])
        self.bare_progress: Callable[[], None] = lambda: None
        self._bare_write: Callable[[Spans], None] | None = None
        self._bare_close: Callable[[], None] = lambda: None

    def open_pool(self, identity: str, nbytes: int, blocks: Sequence[int]) -> int:
        """Returns the descriptor number of the pool's memory, in this process; -1 where it has none."""
        self.backend.open(identity)
        region = allocate(self.backend, nbytes, self.place)
        self.regions = [region]
        sizes = [0, *blocks] if self.capabilities.returns_digests else [0]
        shapes = [BlockShape(1, 1, 1, (size or min(blocks)) // 2, 1) for size in sizes]
        pools = [Pool(region, shape) for shape in shapes]
        self.staging = Staging(self.backend, pools, device_memory(self.place))
        regions = [replace(one, block_bytes=size) for one, size in zip(self.staging.regions(), sizes, strict=True)]
        self.backend.register(regions)
        fill(region, 1)
        if self.staging.active:
            self.bare = None  # it reads no more than the backend does
        return region.owner.fd if isinstance(region.owner, SharedMemory) else -1

    @property
    def pool(self) -> Region:
        return self.region

    def close(self) -> None:
        self._bare_close()
        super().close()

    # --- sender ---

    def block_digests(self, layout: Sequence[Any]) -> list[int]:
        """Of each block, in the receiver's order: what the sender knows beforehand."""
        found: list[int] = span_digests(self.pool, Layout(*layout).blocks(), 0).tolist()
        return found

    def transfer(self, peer: str, tag: int, layout: Sequence[Any], region: int) -> list[float]:
        """Send the whole pool; [seconds, CPU seconds of this process]."""
        spans = Layout(*layout).spans(region)
        return list(timed(partial(self._send, peer, tag, spans, POLL_FIRST, POLL_LAST)))

    def latencies(
        self, peer: str, tag: int, layout: Sequence[Any], region: int, together: int, count: int
    ) -> list[float]:
        """Seconds from the post of so many blocks until they are known to be applied."""
        groups = itertools.islice(Layout(*layout).groups(together, region), count)
        return [timed(partial(self._send, peer, tag, spans, POLL_OFTEN, POLL_OFTEN))[0] for spans in groups]

    def _send(self, peer: str, tag: int, spans: Spans, first: float, last: float) -> None:
        """Post as the core does until all is applied; between polls `first` seconds, growing to `last`."""
        backend, there, staging = self.backend, self._peers[peer], self.staging
        left = collections.deque(posts(spans, self.capabilities.max_spans_per_post))
        waiting: list[Any] = []
        staging.hold(spans)
        pause = first
        while left or waiting:
            while left and len(waiting) < POSTS_IN_FLIGHT:
                piece = left.popleft()
                staging.load(piece)
                waiting.append(backend.post(there, piece, tag))
            self.progress()
            still = [ticket for ticket in waiting if not backend.poll(ticket)]
            pause = min(pause * 1.5, last) if len(still) == len(waiting) else first
            waiting = still
            if waiting and (not left or len(waiting) == POSTS_IN_FLIGHT):
                time.sleep(pause)
        staging.release(spans)

    # --- receiver ---

    def allow(self, tag: int, region: int, sender: str) -> None:
        """Grant the whole of a region."""
        whole = np.array([[region, 0, 0, 0, self.pool.nbytes]], dtype=np.uint64)
        self.staging.hold(whole)
        if self.capabilities.revocable:
            self.backend.grant(tag, whole, sender)

    def end(self, tag: int, region: int, sender: str) -> None:
        """End what `allow` began."""
        if self.capabilities.revocable:
            assert self.backend.revoke(tag, sender)
        self.staging.release(np.array([[region, 0, 0, 0, self.pool.nbytes]], dtype=np.uint64))

    def land(self, spans: Spans) -> None:
        """What came is where it belongs."""
        self.staging.store(np.column_stack((spans[:, [2, 3]], spans[:, [0, 1]], spans[:, 4])))

    # --- the engine without the backend ---

    def bare_receive(self) -> str:
        """Open the bare engine on the pool as a receiver; its descriptor."""
        assert self.bare is not None
        region = self.pool
        descriptor, self.bare_progress, self._bare_close = self.bare.receive(
            region.address, region.nbytes, region.device
        )
        return bytes(descriptor).hex()

    def bare_send(self, descriptor: str) -> None:
        assert self.bare is not None
        region, there = self.pool, bytes.fromhex(descriptor)
        self._bare_write, self._bare_close = self.bare.send(region.address, region.nbytes, region.device, there)

    def bare_transfer(self, layout: Sequence[Any]) -> list[float]:
        """What `transfer` does, by the bare engine."""
        write, spans = self._bare_write, Layout(*layout).spans()
        assert write is not None
        return list(timed(partial(write, spans)))

    def bare_latencies(self, layout: Sequence[Any], together: int, count: int) -> list[float]:
        write = self._bare_write
        assert write is not None
        groups = itertools.islice(Layout(*layout).groups(together), count)
        return [timed(partial(write, spans))[0] for spans in groups]


class Pair:
    """A sender process and a receiver here, connected."""

    def __init__(
        self, name: str, options: dict[str, str], devices: tuple[str, str], nbytes: int, blocks: Sequence[int]
    ) -> None:
        """`devices`: where the sender's pool is, and the receiver's."""
        self.name, self.blocks, self.devices = name, list(blocks), devices
        here, there = ({**options, "device": device} for device in devices)
        self.sender = RemoteSide(FACTORY, "127.0.0.1", "", here, module="pd.bench.transfer_ends")
        try:
            self.receiver = BenchSide(FACTORY, "127.0.0.1", "", there)
            self.receiver.open_pool(f"{name}-receiver", nbytes, blocks)
            self._fd = self.sender.call("open_pool", f"{name}-sender", nbytes, blocks, timeout=300.0)
            self.peer = self.sender.call("connect", self.receiver.descriptor(), timeout=120.0)
            if self.bare:
                self.sender.call("bare_send", self.receiver.bare_receive(), timeout=120.0)
        except BaseException:
            self.sender.kill()
            raise
        self._digests: dict[int, U64] = {}
        self._tag = 0

    @property
    def digests(self) -> bool:
        return self.receiver.capabilities.returns_digests

    @property
    def staged(self) -> bool:
        """Whether the backend reaches host memory only, so that pd copies to it and from it."""
        return self.receiver.staging.active

    @property
    def bare(self) -> bool:
        """Whether the engine can be measured without the backend."""
        return self.receiver.bare is not None

    @property
    def _driver(self) -> Callable[[], None] | None:
        return self.receiver.progress if self.receiver.capabilities.needs_progress else None

    def floor(self) -> Floor | None:
        """A copy without any backend into the receiver's pool; None where the sender's is not shared memory."""
        if self.devices[0] != "cpu":
            return DeviceCopy(self.devices[0], self.receiver.pool)
        if self._fd < 0:
            return None
        fd = os.open(f"/proc/{self.sender.process.pid}/fd/{self._fd}", os.O_RDONLY)
        try:
            return HostCopy(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ), self.receiver.pool)
        finally:
            os.close(fd)

    def pump(self, layout: Layout, digests: bool) -> Measured:
        """One pass over the pool; with `digests` they are compared within the time."""
        region = 1 + self.blocks.index(layout.block) if digests else 0
        sender, spans = f"{self.name}-sender", layout.spans(region)
        self._known(layout)  # not within the time
        self._tag += 1
        self.receiver.allow(self._tag, region, sender)
        cpu = time.process_time()
        seconds, sender_cpu = self.sender.call(
            "transfer", self.peer, self._tag, astuple(layout), region, timeout=300.0, meanwhile=self._driver
        )
        start = time.perf_counter()
        self.receiver.fence(sender)
        if digests:
            self._check(layout, region)
        self.receiver.land(spans)
        seconds += time.perf_counter() - start
        receiver_cpu = time.process_time() - cpu
        self.receiver.end(self._tag, region, sender)
        return seconds, sender_cpu, receiver_cpu

    def pump_bare(self, layout: Layout) -> Measured:
        """The same spans without the backend."""
        cpu = time.process_time()
        seconds, sender_cpu = self.sender.call(
            "bare_transfer", astuple(layout), timeout=300.0, meanwhile=self.receiver.bare_progress
        )
        return seconds, sender_cpu, time.process_time() - cpu

    def clear(self) -> None:
        clear(self.receiver.pool)

    def content_is_right(self, layout: Layout) -> bool:
        """Whether the receiver's pool has the sender's blocks where they belong."""
        return bool(np.array_equal(span_digests(self.receiver.pool, layout.blocks(), 2), self._known(layout)))

    def _known(self, layout: Layout) -> U64:
        if layout.block not in self._digests:
            found = self.sender.call("block_digests", astuple(layout), timeout=300.0)
            self._digests[layout.block] = np.array(found, dtype=np.uint64)
        return self._digests[layout.block]

    def _check(self, layout: Layout, region: int) -> None:
        taken = self.receiver.backend.take_digests(self._tag, f"{self.name}-sender")
        taken = taken[np.argsort(taken[:, 1])]
        if not np.array_equal(taken[:, 3], self._known(layout)) or np.any(taken[:, 0] != region):
            raise RuntimeError(f"{self.name}: a digest differs")

    def latency(self, layout: Layout, together: int, count: int) -> list[float]:
        """Seconds for so many blocks, `count` times."""
        region = 1 + self.blocks.index(layout.block) if self.digests else 0
        sender = f"{self.name}-sender"
        self._tag += 1
        self.receiver.allow(self._tag, region, sender)
        arguments = self.peer, self._tag, astuple(layout), region, together, count
        seconds: list[float] = self.sender.call("latencies", *arguments, timeout=300.0, meanwhile=self._driver)
        if self.staged:  # to the device, which the sender does not see
            for i, spans in enumerate(itertools.islice(layout.groups(together, region), count)):
                seconds[i] += timed(partial(self.receiver.land, spans))[0]
        if self.digests:
            self.receiver.backend.take_digests(self._tag, sender)
        self.receiver.end(self._tag, region, sender)
        return seconds

    def bare_latency(self, layout: Layout, together: int, count: int) -> list[float]:
        arguments = astuple(layout), together, count
        found: list[float] = self.sender.call(
            "bare_latencies", *arguments, timeout=300.0, meanwhile=self.receiver.bare_progress
        )
        return found

    def close(self) -> None:
        self.sender.kill()
        self.receiver.close()


if __name__ == "__main__":
    main(BenchSide)
