"""What may land here: grants, the locks under which bytes land, and the digests of what landed.

Ownership: a granted block belongs to the hand-off until `revoke` or `expel` returned True. A thread that writes into
one holds the grant's lock and has seen `live` under it; `revoke` clears `live` and takes the lock once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pd.abc import Region, Spans
from pd.errors import TransferError
from pd.transfer.digest import CHUNK, WORD

#: Regions are laid out this far apart on one line, so that one search finds a range of any of them.
REGION_STRIDE = 1 << 48

#: Bytes copied in one call, which bounds how long a grant's lock is held, where nothing is digested.
COPY = 1 << 22

I64 = npt.NDArray[np.int64]


def within(regions: npt.NDArray[np.uint64], offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64],
           sizes: npt.NDArray[np.uint64]) -> bool:  # fmt: skip
    """Whether every span is non-empty and inside its region. No sum that could overflow."""
    if not len(regions):
        return True
    if regions.max() >= len(sizes):
        return False
    size = sizes[regions.astype(np.int64)]
    return bool(np.all((lengths > 0) & (lengths <= size) & (offsets <= size - np.minimum(lengths, size))))


def sizes_of(regions: Sequence[Region]) -> npt.NDArray[np.uint64]:
    return np.array([region.nbytes for region in regions], dtype=np.uint64)


@dataclass(frozen=True)
class Applied:
    """Digests of pieces that landed with one post."""

    regions: I64
    offsets: I64
    lengths: I64
    digests: npt.NDArray[np.uint64]


@dataclass
class Grant:
    """What one hand-off of one sender may write: sorted, merged ranges on the line of all regions."""

    ranges: tuple[I64, I64]
    lock: threading.Lock = field(default_factory=threading.Lock)
    live: bool = True

    def covers(self, regions: I64, offsets: I64, lengths: I64) -> bool:
        starts, ends = self.ranges
        position = regions * REGION_STRIDE + offsets
        index = np.searchsorted(starts, position, side="right") - 1
        return bool(np.all(index >= 0) and np.all(position + lengths <= ends[index]))


def _merge(starts: I64, ends: I64) -> tuple[I64, I64]:
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    first = np.ones(len(starts), dtype=bool)
    first[1:] = starts[1:] > ends[:-1]
    last = np.roll(first, -1)
    return starts[first], ends[last]


class Ledger:
    """All grants of one receiver. Thread-safe."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.sizes = sizes_of(regions)
        self._lock = threading.Lock()
        self._grants: dict[tuple[str, int], Grant] = {}
        self._applied: dict[tuple[str, int], list[Applied]] = {}
        self._expelled: set[str] = set()

    def grant(self, tag: int, spans: Spans, sender: str) -> None:
        """Let `sender` write the local columns of `spans` under `tag`, besides what it has. Raises TransferError."""
        spans = np.asarray(spans, dtype=np.uint64).reshape(-1, 5)
        if not within(spans[:, 0], spans[:, 1], spans[:, 4], self.sizes):
            raise TransferError("grant outside the registered regions")
        local = spans.astype(np.int64)
        starts = local[:, 0] * REGION_STRIDE + local[:, 1]
        ends = starts + local[:, 4]
        with self._lock:
            if sender in self._expelled:
                raise TransferError(f"sender {sender} is expelled")
            old = self._grants.get((sender, tag))
            if old is None or not old.live:
                self._applied.pop((sender, tag), None)
                self._grants[sender, tag] = Grant(_merge(starts, ends))
            else:
                had = old.ranges
                old.ranges = _merge(np.concatenate([had[0], starts]), np.concatenate([had[1], ends]))

    def find(self, sender: str, tag: int) -> Grant | None:
        with self._lock:
            return self._grants.get((sender, tag))

    def revoke(self, tag: int, sender: str, timeout: float) -> bool:
        """True when nothing with this tag can land any more; False if a copy did not end within `timeout` seconds."""
        with self._lock:
            grant = self._grants.get((sender, tag))
        if grant is None:
            return True
        grant.live = False
        if not grant.lock.acquire(timeout=max(0.0, timeout)):
            return False
        grant.lock.release()
        with self._lock:
            if self._grants.get((sender, tag)) is grant:
                del self._grants[sender, tag]
        return True

    def expel(self, sender: str, timeout: float) -> bool:
        """Refuse `sender` for good and take all its grants back; False if a copy did not end in time."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._expelled.add(sender)
            tags = [tag for who, tag in self._grants if who == sender]
            for tag in tags:
                self._grants[sender, tag].live = False
            for key in [key for key in self._applied if key[0] == sender]:
                del self._applied[key]
        quiet = True
        for tag in tags:
            quiet &= self.revoke(tag, sender, deadline - time.monotonic())
        return quiet

    def is_expelled(self, sender: str) -> bool:
        with self._lock:
            return sender in self._expelled

    def record(self, sender: str, tag: int, applied: Applied) -> None:
        """Keep the digests of what landed, until `take`."""
        with self._lock:
            if sender not in self._expelled:
                self._applied.setdefault((sender, tag), []).append(applied)

    def take(self, tag: int, sender: str) -> Mapping[tuple[int, int], tuple[int, int]]:
        """(region, offset) -> (length, digest) of everything recorded with this tag; forgets it."""
        with self._lock:
            records = self._applied.pop((sender, tag), [])
        out: dict[tuple[int, int], tuple[int, int]] = {}
        for one in records:
            where = zip(one.regions.tolist(), one.offsets.tolist(), strict=True)
            out.update(zip(where, zip(one.lengths.tolist(), one.digests.tolist(), strict=True), strict=True))
        return out


@dataclass(frozen=True)
class Chunks:
    """A post cut into chunks that are copied, and digested, in one call each.

    The chunks' columns are Python lists because a loop runs over them. `piece_starts`: the chunk with which each digest
    piece begins; empty where this post gets no digests.
    """

    source_region: list[int]
    source: list[int]
    region: list[int]
    offset: list[int]
    length: list[int]
    word: list[int]
    piece_starts: I64
    piece_regions: I64
    piece_offsets: I64
    piece_lengths: I64

    @property
    def digested(self) -> bool:
        return len(self.piece_starts) > 0

    def applied(self, sums: Sequence[np.uint64]) -> Applied:
        """Add the chunks' digests up to pieces."""
        totals = np.add.reduceat(np.array(sums, dtype=np.uint64), self.piece_starts)
        return Applied(self.piece_regions, self.piece_offsets, self.piece_lengths, totals)


def _split(first: I64, lengths: I64, step: I64) -> tuple[I64, I64, I64]:
    """Cut lengths[i] after first[i], then every step[i]: (index of the whole, begin in it, length) of each part."""
    first = np.minimum(first, lengths)
    counts = 1 + -(-(lengths - first) // step)
    index = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.where(nth == 0, 0, first[index] + (nth - 1) * step[index])
    end = np.minimum(first[index] + nth * step[index], lengths[index])
    return index, begin, end - begin


def cut(spans: Spans, regions: Sequence[Region]) -> Chunks:
    """Cut checked spans (columns: sender's region and offset, ours, length) at block boundaries and into chunks.

    A post that touches a region without digests, or whose spans are no whole words, is only cut into chunks.
    """
    table = spans.astype(np.int64)
    region, offset, length = table[:, 2], table[:, 3], table[:, 4]
    blocks = np.array([one.block_bytes for one in regions], dtype=np.int64)[region]
    digested = bool(np.all(blocks)) and not np.any((offset | length | blocks) % WORD)
    if digested:
        index, begin, length = _split(blocks - offset % blocks, length, blocks)
    else:
        index, begin = np.arange(len(table)), np.zeros(len(table), np.int64)
    step = np.full(len(index), CHUNK if digested else COPY, np.int64)
    piece, inside, size = _split(step, length, step)
    row, at = index[piece], begin[piece] + inside
    where = offset[row] + at
    word = np.zeros(len(row), np.int64)
    starts = np.zeros(0, np.int64)
    if digested:
        first = np.array([one.first_word for one in regions], dtype=np.int64)[region[row]]
        word = first + where % blocks[row] // WORD
        starts = np.flatnonzero(np.r_[True, piece[1:] != piece[:-1]]).astype(np.int64)
    return Chunks(
        source_region=table[row, 0].tolist(),
        source=(table[row, 1] + at).tolist(),
        region=region[row].tolist(),
        offset=where.tolist(),
        length=size.tolist(),
        word=word.tolist(),
        piece_starts=starts,
        piece_regions=region[index],
        piece_offsets=offset[index] + begin,
        piece_lengths=length,
    )
