"""Shared memory of `direct`: the pool as a memfd, the sender's epoch page, and the receiver's copy loop.

memfd (memory without a name, sealed against shrinking) instead of files in /dev/shm: it ends with its last user, even
after SIGKILL, and is not limited to 64 MB in containers. The descriptors travel over the unix socket of the connection.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.abc import Region
from pd.errors import ProtocolError
from pd.ipc.memory import SharedMemory
from pd.transfer.digest import RUN, WORD, digest_words, run_keys, sum_runs
from pd.transfer.direct_ledger import Chunks, Grant

PAGE = mmap.PAGESIZE

#: Bytes that are copied under one hold of a grant's lock: some hundred microseconds.
BATCH = 1 << 20


#: Copies a slice of the chunks and appends their digests.
Copy = Callable[[slice, list[Any]], None]


class EpochPage:
    """One word that the sender shares with one receiver: 0 while what it posted may be read."""

    def __init__(self) -> None:
        self._memory = SharedMemory.create("pd-epoch", PAGE)
        self._word = self._memory.buffer.cast("Q")
        self._lock = threading.Lock()

    @property
    def fd(self) -> int:
        return self._memory.fd

    def end(self) -> None:
        """From now on nothing that is read counts as landed."""
        with self._lock:
            if self._memory.fd >= 0:
                self._word[0] = 1

    def close(self) -> None:
        with self._lock:
            if self._memory.fd >= 0:
                self._word[0] = 1
                self._word.release()
                self._memory.close()


def map_memory(fd: int, size: int) -> mmap.mmap:
    """Memory that a peer shares, read-only. Raises ProtocolError."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        # Reading beyond the end of a file is SIGBUS, so neither now nor later may it be shorter than it says.
        if size <= 0 or not sealed or os.fstat(fd).st_size < size:
            raise ProtocolError("handshake", "a region is smaller than declared, or not sealed")
        return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise ProtocolError("handshake", f"a region cannot be mapped: {error}") from error


class PeerMemory:
    """A sender's regions and epoch page, mapped read-only into the receiver."""

    def __init__(self, fds: Sequence[int], sizes: Sequence[int]) -> None:
        """Takes no ownership of `fds` (the regions, then the epoch page). Raises ProtocolError."""
        if len(fds) != len(sizes) + 1:
            raise ProtocolError("handshake", f"{len(fds)} descriptors for {len(sizes)} regions")
        maps = [map_memory(fd, size) for fd, size in zip(fds, [*sizes, PAGE], strict=True)]
        self.sizes = np.array(sizes, dtype=np.uint64)
        self.regions: list[npt.NDArray[np.uint8]] = [np.frombuffer(one, dtype=np.uint8) for one in maps[:-1]]
        self.epoch = memoryview(maps[-1]).cast("Q")

    def ended(self) -> bool:
        return self.epoch[0] != 0


class Target:
    """The receiver's own regions, as arrays where they are host memory."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = regions
        self.on_device = any(one.buffer is None for one in regions)
        self.bytes = [np.frombuffer(one.buffer, dtype=np.uint8) for one in regions if one.buffer is not None]
        self.words = [raw[: raw.size // WORD * WORD].view(np.uint64) for raw in self.bytes]
        self.keys = run_keys(max((one.first_word + one.block_bytes // WORD for one in regions), default=1))


def copy_chunks(chunks: Chunks, source: PeerMemory, target: Target, grant: Grant) -> list[np.uint64] | None:
    """Copy a checked post, batch by batch under the grant's lock; the chunks' digests, or None if it was cut short.

    The sender's epoch is looked at before and after each batch: bytes that were read later than its end may have been
    reused, so they must not be reported. Their place is still the grant's, and its content is undefined.
    """
    count = len(chunks.table)
    if not count:
        return []
    batch = max(1, min(64, BATCH // int(chunks.table[:, 4].max())))
    copy = _units(chunks, source, target) if chunks.unit else _general(chunks, source, target)
    sums: list[Any] = []
    for start in range(0, count, batch):
        with grant.lock:
            if not grant.live or source.ended():
                return None
            copy(slice(start, start + batch), sums)
            if source.ended():
                return None
    return sums


def _general(chunks: Chunks, source: PeerMemory, target: Target) -> Copy:
    """Chunks of any length and place."""
    theirs, ours, words, keys, digested = source.regions, target.bytes, target.words, target.keys, chunks.digested
    columns = [chunks.column(i) for i in range(6)]

    def copy(some: slice, sums: list[Any]) -> None:
        for source_region, at, region, offset, length, word in zip(*(one[some] for one in columns), strict=True):
            # numpy releases the GIL for copies of this size.
            ours[region][offset : offset + length] = theirs[source_region][at : at + length]
            if digested:
                first, count = offset >> 3, length >> 3
                sums.append(digest_words(words[region][first : first + count], word, keys))

    return copy


def _units(chunks: Chunks, source: PeerMemory, target: Target) -> Copy:
    """Chunks that are rows of both regions and, if they are digested, whole runs. The loop is as short as can be."""
    unit, digested = chunks.unit, chunks.digested
    shape = (-1, unit // WORD // RUN, RUN)
    source_region, region = chunks.table[0, [0, 2]].tolist()
    theirs = _rows(source.regions[source_region], unit, shape)
    ours = _rows(target.bytes[region], unit, shape)
    from_rows, to_rows, runs = chunks.column(1, unit), chunks.column(3, unit), chunks.column(5, RUN)
    keys = {run: target.keys[run : run + shape[1]] for run in set(runs)}

    def copy(some: slice, sums: list[Any]) -> None:
        for source_row, to_row, run in zip(from_rows[some], to_rows[some], runs[some], strict=True):
            row = ours[to_row]
            row[:] = theirs[source_row]
            if digested:
                sums.append(sum_runs(row, keys[run]))

    return copy


def _rows(region: npt.NDArray[np.uint8], unit: int, shape: tuple[int, int, int]) -> npt.NDArray[np.uint64]:
    return region[: region.size // unit * unit].view(np.uint64).reshape(shape)
