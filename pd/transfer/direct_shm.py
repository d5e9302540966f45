"""Shared memory of `direct`: the pool as a memfd, the sender's epoch page, and the receiver's copy loop.

memfd (memory without a name, sealed against shrinking) instead of files in /dev/shm: it ends with its last user, even
after SIGKILL, and is not limited to 64 MB in containers. The descriptors travel over the unix socket of the connection.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.abc import Region
from pd.errors import ProtocolError
from pd.ipc.memory import SharedMemory
from pd.transfer.digest import WORD, digest_words, key_table
from pd.transfer.direct_ledger import Chunks, Grant

PAGE = mmap.PAGESIZE

#: Bytes that are copied under one hold of a grant's lock: some hundred microseconds.
BATCH = 1 << 20


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


class PeerMemory:
    """A sender's regions and epoch page, mapped read-only into the receiver."""

    def __init__(self, fds: Sequence[int], sizes: Sequence[int]) -> None:
        """Takes no ownership of `fds` (the regions, then the epoch page). Raises ProtocolError."""
        if len(fds) != len(sizes) + 1:
            raise ProtocolError("handshake", f"{len(fds)} descriptors for {len(sizes)} regions")
        maps = []
        for fd, size in zip(fds, [*sizes, PAGE], strict=True):
            try:
                sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
                # Reading beyond the end of a file is SIGBUS, so neither now nor later may it be shorter than it says.
                if size <= 0 or not sealed or os.fstat(fd).st_size < size:
                    raise ProtocolError("handshake", "a region is smaller than declared, or not sealed")
                maps.append(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
            except (OSError, ValueError, OverflowError) as error:
                raise ProtocolError("handshake", f"a region cannot be mapped: {error}") from error
        self.sizes = np.array(sizes, dtype=np.uint64)
        self.regions: list[npt.NDArray[np.uint8]] = [np.frombuffer(one, dtype=np.uint8) for one in maps[:-1]]
        self.epoch = memoryview(maps[-1]).cast("Q")

    def ended(self) -> bool:
        return self.epoch[0] != 0


class Target:
    """The receiver's own regions as arrays."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = regions
        self.bytes = [np.frombuffer(one.buffer, dtype=np.uint8) for one in regions if one.buffer is not None]
        self.words = [raw[: raw.size // WORD * WORD].view(np.uint64) for raw in self.bytes]
        # A block's words start at first_word; the keys of the whole block are one contiguous slice of the table.
        last = max((one.first_word + one.block_bytes // WORD for one in regions if one.block_bytes), default=1)
        self.keys = key_table(last)


def copy_chunks(chunks: Chunks, source: PeerMemory, target: Target, grant: Grant) -> list[np.uint64] | None:
    """Copy a checked post, batch by batch under the grant's lock; the chunks' digests, or None if it was cut short.

    The sender's epoch is looked at before and after each batch: bytes that were read later than its end may have been
    reused, so they must not be reported. Their place is still the grant's, and its content is undefined.
    """
    count = len(chunks.length)
    if not count:
        return []
    batch = max(1, min(64, BATCH // max(chunks.length)))
    columns = (chunks.source_region, chunks.source, chunks.region, chunks.offset, chunks.length, chunks.word)
    rows = zip(*columns, strict=True)
    sums: list[Any] = []
    step = _copy_and_digest if chunks.digested else _copy
    for _ in range(0, count, batch):
        with grant.lock:
            if not grant.live or source.ended():
                return None
            step(islice(rows, batch), source.regions, target, sums)
            if source.ended():
                return None
    return sums


def _copy(rows: Any, source: list[npt.NDArray[np.uint8]], target: Target, sums: list[Any]) -> None:
    ours = target.bytes
    for source_region, at, region, offset, length, _ in rows:
        # numpy releases the GIL for copies of this size.
        ours[region][offset : offset + length] = source[source_region][at : at + length]


def _copy_and_digest(rows: Any, source: list[npt.NDArray[np.uint8]], target: Target, sums: list[Any]) -> None:
    ours, words, keys = target.bytes, target.words, target.keys
    for source_region, at, region, offset, length, word in rows:
        ours[region][offset : offset + length] = source[source_region][at : at + length]
        first, count = offset >> 3, length >> 3
        sums.append(digest_words(words[region][first : first + count], keys[word : word + count]))
