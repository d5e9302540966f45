"""Staging through host memory, for a backend that cannot reach the device's memory.

The backend registers a host mirror of each pool instead of the pool, with equal offsets, so that spans and grants need
no translation. The mirror is address space, not memory: its pages exist only while a transfer uses them.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from dataclasses import replace

from pd.abc import DeviceMemory, Region, Spans, TransferBackend, host_region
from pd.errors import TransferError
from pd.ipc.memory import SharedMemory
from pd.transfer.spans import Pool

PAGE = mmap.PAGESIZE


class Mirror:
    """Host memory of a pool's size and what frees parts of it."""

    def __init__(self, backend: TransferBackend, nbytes: int) -> None:
        region = backend.allocate(nbytes, "cpu") if backend.capabilities.allocates else None
        if region is not None and isinstance(region.owner, SharedMemory):
            self._pages, self._advice = mmap.mmap(region.owner.fd, nbytes), mmap.MADV_REMOVE
        elif region is None:
            self._pages, self._advice = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), mmap.MADV_DONTNEED
            region = host_region(memoryview(self._pages))
        else:
            raise TransferError("a backend's own allocator that stages must supply pd.ipc.memory.SharedMemory")
        self.region = region

    def discard(self, start: int, end: int) -> None:
        """Give back the pages that lie wholly in [start, end); they read as zero afterwards."""
        start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if end > start:
            self._pages.madvise(self._advice, start, end - start)


class Staging:
    """Moves spans between pools and mirrors; does nothing where the backend reaches the pools itself.

    A block may be in several pushes at once: its pages are kept until the last of them ends. Thread-safe.
    """

    def __init__(self, backend: TransferBackend, pools: list[Pool], memory: DeviceMemory) -> None:
        kinds = backend.capabilities.memory_kinds
        self.active = any(pool.region.device.split(":")[0] not in kinds for pool in pools)
        self._pools, self._memory = pools, memory
        self._mirrors = [Mirror(backend, pool.region.nbytes) for pool in pools] if self.active else []
        self._lock = threading.Lock()
        self._holds: dict[tuple[int, int], int] = {}  # (region, block) -> pushes and grants that use its pages

    def regions(self) -> list[Region]:
        """What the backend registers."""
        bare = [mirror.region for mirror in self._mirrors] or [pool.region for pool in self._pools]
        return [
            replace(region, index=i, block_bytes=pool.shape.nbytes, first_word=pool.geometry.first_word)
            for i, (region, pool) in enumerate(zip(bare, self._pools, strict=True))
        ]

    def hold(self, spans: Spans) -> None:
        """Keep the pages of the spans' blocks (local columns) until `release`."""
        if self.active:
            with self._lock:
                for key in self._blocks(spans):
                    self._holds[key] = self._holds.get(key, 0) + 1

    def release(self, spans: Spans) -> None:
        """Undo one `hold`. The caller knows that nothing reads or writes these pages on its behalf any more."""
        if self.active:
            with self._lock:
                for key in self._blocks(spans):
                    self._holds[key] -= 1
                    if not self._holds[key]:
                        del self._holds[key]
                        region, block = key
                        size = self._pools[region].shape.nbytes
                        self._mirrors[region].discard(block * size, (block + 1) * size)

    def load(self, spans: Spans) -> None:
        """Device to mirror, before a post."""
        self._copy(spans, to_device=False)

    def store(self, spans: Spans) -> None:
        """Mirror to device, after landing; later work on the device sees it."""
        if self.active:
            self._copy(spans, to_device=True)
            self._memory.fence()

    def _copy(self, spans: Spans, to_device: bool) -> None:
        if not self.active:
            return
        for region, offset, length in spans[:, [0, 1, 4]].tolist():
            host = self._mirrors[region].region.buffer
            assert host is not None
            self._memory.copy(self._pools[region].region, offset, host[offset : offset + length], to_device=to_device)

    def _blocks(self, spans: Spans) -> Iterator[tuple[int, int]]:
        for region, offset, length in spans[:, [0, 1, 4]].tolist():
            size = self._pools[region].shape.nbytes
            for block in range(offset // size, -(-(offset + length) // size)):
                yield region, block
