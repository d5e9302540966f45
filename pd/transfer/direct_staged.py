"""The byte stream of `direct` where a pool is device memory: both ends put the bytes together in host memory.

For peers whose device memory cannot be mapped here: on another host, in a container of its own, of another kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pd.abc import DeviceMemory, Region
from pd.transfer.digest import WORD, digest_words
from pd.transfer.direct_shm import Target
from pd.transfer.direct_tcp import Stream, StreamReceiver
from pd.transfer.direct_wire import Link

#: Bytes of a chunk: enough that what a copy to the device costs besides does not count, few enough to stay cached.
STAGE = 1 << 20


class DeviceSource:
    """A sender's regions in device memory, for `StreamSource`."""

    def __init__(self, regions: Sequence[Region], memory: DeviceMemory) -> None:
        self._regions, self._memory = regions, memory

    def __call__(self, region: int, offset: int, count: int) -> memoryview:
        """A copy of its own, which ends with its last view."""
        buffer = np.empty(count, dtype=np.uint8).data
        self._memory.copy(self._regions[region], offset, buffer, to_device=False)
        return buffer


class StagedReceiver(StreamReceiver):
    """Collects a chunk, digests it, and copies it to its place, which like any write is done under the grant's lock."""

    def __init__(self, link: Link, target: Target, memory: DeviceMemory) -> None:
        super().__init__(link, target)
        self._memory = memory
        self._buffer = np.empty(STAGE, dtype=np.uint8)

    def _places(self, stream: Stream, limit: int) -> list[memoryview]:
        end = min(stream.chunks.length[stream.chunk], stream.filled + limit)
        return [self._buffer.data[stream.filled : end]]

    def _advance(self, stream: Stream, count: int) -> None:
        chunks, index = stream.chunks, stream.chunk
        stream.filled += count
        length = chunks.length[index]
        if stream.filled < length:
            return
        if chunks.digested:
            words = self._buffer.view(np.uint64)[: length // WORD]
            stream.sums.append(digest_words(words, chunks.word[index], self._target.keys))
        region = self._target.regions[chunks.region[index]]
        self._memory.copy(region, chunks.offset[index], self._buffer.data[:length], to_device=True)
        stream.chunk, stream.filled = index + 1, 0
