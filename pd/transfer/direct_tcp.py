"""The byte stream of `direct`, for peers that share no memory: the receiver asks, the sender serves.

A post's spans, laid end to end, are pulled in windows. The receiver reads from the socket straight into granted memory,
under the grant's lock and without waiting there; once a grant is gone the rest of its window goes to a scratch buffer.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.abc import Region
from pd.errors import ProtocolError
from pd.transfer.digest import digest_words
from pd.transfer.direct_ledger import Chunks, Grant
from pd.transfer.direct_shm import Target
from pd.transfer.direct_wire import IOVECS, PULL, Link

#: Bytes asked for at once; two windows are under way.
WINDOW = 1 << 23
WINDOWS = 2

#: Bytes read under one hold of a grant's lock.
READ = 1 << 20


@dataclass
class Stream:
    """One post that is being received."""

    ticket: int
    tag: int
    grant: Grant
    chunks: Chunks
    total: int
    asked: int = 0
    received: int = 0
    chunk: int = 0  # the chunk that is being filled
    filled: int = 0  # bytes of it that are there
    sums: list[Any] = field(default_factory=list)

    @property
    def landed(self) -> bool:
        return self.chunk == len(self.chunks.table)

    @property
    def over(self) -> bool:
        return self.received == (self.total if self.grant.live else self.asked)


class StreamReceiver:
    """Receives posts over one link, in order. Used by that link's reading thread only."""

    def __init__(self, link: Link, target: Target) -> None:
        self._link = link
        self._target = target
        self._streams: collections.deque[Stream] = collections.deque()
        self._windows: collections.deque[tuple[int, int, int]] = collections.deque()
        self._scratch = memoryview(bytearray(READ))
        self._views = [raw.data for raw in target.bytes]

    def add(self, stream: Stream) -> list[Stream]:
        """Take on a post. Returns the posts that ended, as `receive` does."""
        self._streams.append(stream)
        ended = self._ended()
        self._ask()
        return ended

    def receive(self, window: tuple[int, int, int]) -> list[Stream]:
        """Read one window that was asked for. Returns the posts that ended: landed, or cut short by a revoke."""
        if not self._windows or self._windows[0] != window:
            raise ProtocolError("frame", "bytes that were not asked for")
        ended = self._ended()
        stream = self._streams[0]
        left = window[2]
        while left:
            count = self._read(stream, left)
            if not count:
                self._link.wait_readable()
            left -= count
        self._windows.popleft()
        stream.received += window[2]
        ended += self._ended()
        self._ask()
        return ended

    def _ask(self) -> None:
        """Keep `WINDOWS` windows under way, in the order of the posts."""
        for stream in self._streams:
            while stream.asked < stream.total and stream.grant.live:
                if len(self._windows) >= WINDOWS:
                    return
                window = (stream.ticket, stream.asked, min(WINDOW, stream.total - stream.asked))
                stream.asked += window[2]
                self._windows.append(window)
                self._link.send(PULL, *window)

    def _ended(self) -> list[Stream]:
        """Remove from the head what is complete, or has lost its grant and has no window under way."""
        ended = []
        while self._streams and self._streams[0].over:
            ended.append(self._streams.popleft())
        return ended

    def _read(self, stream: Stream, left: int) -> int:
        """Read what is there into granted memory, or into scratch when the grant is gone; the bytes read."""
        with stream.grant.lock:
            if stream.grant.live:
                count = self._link.read_some(self._places(stream, min(left, READ)))
                self._advance(stream, count)
                return count
        return self._link.read_some([self._scratch[: min(left, READ)]])

    def _places(self, stream: Stream, limit: int) -> list[memoryview]:
        """Where the next bytes go: at most `limit` of them."""
        chunks, index, filled = stream.chunks, stream.chunk, stream.filled
        places: list[memoryview] = []
        while limit and len(places) < IOVECS:
            start = chunks.offset[index] + filled
            count = min(chunks.length[index] - filled, limit)
            places.append(self._views[chunks.region[index]][start : start + count])
            limit -= count
            index, filled = index + 1, 0
        return places

    def _advance(self, stream: Stream, count: int) -> None:
        """Account for bytes that landed; digest chunks that they completed, while they are in the cache."""
        chunks = stream.chunks
        while count:
            part = min(count, chunks.length[stream.chunk] - stream.filled)
            stream.filled += part
            count -= part
            if stream.filled == chunks.length[stream.chunk]:
                if chunks.digested:
                    stream.sums.append(_digest(chunks, stream.chunk, self._target))
                stream.chunk, stream.filled = stream.chunk + 1, 0


def _digest(chunks: Chunks, index: int, target: Target) -> Any:
    first, count, word = chunks.offset[index] >> 3, chunks.length[index] >> 3, chunks.word[index]
    return digest_words(target.words[chunks.region[index]][first : first + count], word, target.keys)


#: A view of bytes of a sender's region: (region, offset, count).
ReadRegion = Callable[[int, int, int], memoryview]


class HostSource:
    """A sender's regions in host memory, for `StreamSource`."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._views = [region.buffer for region in regions]

    def __call__(self, region: int, offset: int, count: int) -> memoryview:
        view = self._views[region]
        assert view is not None
        return view[offset : offset + count]


class StreamSource:
    """A post on the sender's side: gives out views of its spans laid end to end."""

    def __init__(self, spans: npt.NDArray[np.uint64]) -> None:
        table = spans.astype(np.int64)
        self._regions, self._offsets = table[:, 0], table[:, 1]
        self._ends = np.cumsum(table[:, 4])
        self.total = int(self._ends[-1]) if len(table) else 0
        self._served = 0

    def views(self, start: int, count: int, read: ReadRegion) -> list[memoryview]:
        """Views of bytes [start, start + count). Raises ProtocolError unless they are the next ones of the post."""
        if start != self._served or not 0 < count <= self.total - start:
            raise ProtocolError("frame", "asked for bytes outside the post")
        self._served += count
        out = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            end = int(self._ends[index])
            part = min(end - start, count)
            offset = int(self._offsets[index]) + start - (end - self._length(index))
            out.append(read(int(self._regions[index]), offset, part))
            start, count, index = start + part, count - part, index + 1
        return out

    def _length(self, index: int) -> int:
        return int(self._ends[index] - (self._ends[index - 1] if index else 0))
