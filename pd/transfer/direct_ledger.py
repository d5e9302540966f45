"""What may land here: grants, the locks under which bytes land, and the digests of what landed.

Ownership: a granted block belongs to the hand-off until `revoke` or `expel` returned True. A thread that writes into
one holds the grant's lock and has seen `live` under it; `revoke` clears `live` and takes the lock once.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pd.abc import Region, Spans, within
from pd.errors import TransferError
from pd.transfer.digest import CHUNK, RUN, WORD

#: Regions are laid out this far apart on one line, so that one search finds a range of any of them.
REGION_STRIDE = 1 << 48

#: How many revoked grants are remembered, so that a late post of theirs is refused at once.
REMEMBERED = 4096

#: Bytes copied in one call, which bounds how long a grant's lock is held, where nothing is digested.
COPY = 1 << 22

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


def sizes_of(regions: Sequence[Region]) -> U64:
    return np.array([region.nbytes for region in regions], dtype=np.uint64)


@dataclass
class Grant:
    """What one hand-off of one sender may write: sorted, merged ranges on the line of all regions."""

    ranges: tuple[I64, I64]
    lock: threading.Lock = field(default_factory=threading.Lock)
    live: bool = True

    def covers(self, regions: I64, offsets: I64, lengths: I64) -> bool:
        starts, ends = self.ranges
        position = regions * REGION_STRIDE + offsets
        if len(starts) == 1:
            return bool(position.min() >= starts[0] and (position + lengths).max() <= ends[0])
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
        self._lock = threading.Condition()
        self._grants: dict[tuple[str, int], Grant] = {}
        self._applied: dict[tuple[str, int], list[U64]] = {}
        self._expelled: set[str] = set()
        self._ended: OrderedDict[tuple[str, int], None] = OrderedDict()  # revoked: nobody waits for their grant

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
            self._lock.notify_all()

    def find(self, sender: str, tag: int, patience: float = 0.0) -> Grant | None:
        """The grant, if there is one within `patience` seconds.

        A fast sender can be here before the order that grants: the engine thread may be busy with another hand-off.
        One that was revoked, or whose sender is expelled, is not waited for.
        """
        key = (sender, tag)
        with self._lock:
            self._lock.wait_for(
                lambda: key in self._grants or key in self._ended or sender in self._expelled, timeout=patience
            )
            return self._grants.get(key)

    def revoke(self, tag: int, sender: str, timeout: float) -> bool:
        """True when nothing with this tag can land any more; False if a copy did not end within `timeout` seconds."""
        with self._lock:
            grant = self._grants.get((sender, tag))
            self._ended[sender, tag] = None
            if len(self._ended) > REMEMBERED:
                self._ended.popitem(last=False)
            self._lock.notify_all()
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
            self._lock.notify_all()
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

    def record(self, sender: str, tag: int, applied: U64) -> None:
        """Keep the digests of what landed (see `Chunks.applied`) until `take`."""
        with self._lock:
            if sender not in self._expelled:
                self._applied.setdefault((sender, tag), []).append(applied)

    def take(self, tag: int, sender: str) -> U64:
        """uint64[n, 4] (region, offset, length, digest) of everything recorded with this tag; forgets it."""
        with self._lock:
            records = self._applied.pop((sender, tag), [])
        return np.concatenate([np.zeros((0, 4), np.uint64), *records])


@dataclass(frozen=True)
class Chunks:
    """A post cut into chunks that are copied, and digested, in one call each.

    `table` int64[n, 6]: sender's region and offset, our region and offset, length, position of the first word in its
    block. `piece_starts`: the chunk with which each digest piece begins; empty where this post gets no digests.
    """

    table: I64
    piece_starts: I64
    pieces: I64  # int64[m, 3]: region, offset, length

    @property
    def digested(self) -> bool:
        return len(self.piece_starts) > 0

    @cached_property
    def unit(self) -> int:
        """The length of every chunk, if that is one length of which all offsets are multiples, whole runs, in one

        region here and there (blocks, usually); else 0.
        """
        return _unit(self.table)

    @cached_property
    def region(self) -> list[int]:
        return self.column(2)

    @cached_property
    def offset(self) -> list[int]:
        return self.column(3)

    @cached_property
    def length(self) -> list[int]:
        return self.column(4)

    @cached_property
    def word(self) -> list[int]:
        return self.column(5)

    def column(self, index: int, divisor: int = 1) -> list[int]:
        """As Python integers, which loops want."""
        values: list[int] = (self.table[:, index] // divisor if divisor > 1 else self.table[:, index]).tolist()
        return values

    def applied(self, sums: Sequence[np.uint64] | U64) -> U64:
        """The chunks' digests added up to pieces: uint64[m, 4] (region, offset, length, digest)."""
        out = np.empty((4, len(self.pieces)), dtype=np.uint64)
        out[:3] = self.pieces.T
        found = np.asarray(sums, dtype=np.uint64)
        out[3] = found if len(found) == len(self.pieces) else np.add.reduceat(found, self.piece_starts)
        return out.T


def cut(spans: Spans, regions: Sequence[Region], longest: int = 0) -> Chunks:
    """Cut checked spans (columns: sender's region and offset, ours, length) at block boundaries and into chunks.

    A post that touches a region without digests, or whose spans are no whole words, is only cut into chunks. Those have
    at most `longest` bytes; 0 stands for what suits a copy by the host.
    """
    columns = np.empty((6, len(spans)), dtype=np.int64)  # what follows is done by column
    columns[:5], columns[5] = spans.T, 0
    table = columns.T
    blocks = _of_regions([one.block_bytes for one in regions], columns[2])
    aligned = not int(np.bitwise_or.reduce(columns[3] | columns[4], initial=0)) & (WORD - 1)
    digested = aligned and bool(np.all(blocks)) and not np.any(np.bitwise_and(blocks, WORD - 1))
    pieces, source = table[:, 2:5], None
    starts = np.zeros(0, np.int64)
    if digested:
        inside = _modulo(columns[3], blocks)
        table, source = _split(table, blocks - inside, blocks)
        pieces = table[:, 2:5]
    longest = longest or (CHUNK if digested else COPY)
    table, part = _split(table, longest, longest)
    if digested:
        if source is not None or part is not None:
            owners = np.arange(len(pieces)) if part is None else part
            inside = _modulo(table[:, 3], _of_regions([one.block_bytes for one in regions], table[:, 2]))
            starts = np.flatnonzero(np.diff(owners, prepend=-1))
        else:
            starts = np.arange(len(table))
        np.right_shift(inside, 3, out=table[:, 5])
        table[:, 5] += _of_regions([one.first_word for one in regions], table[:, 2])
    return Chunks(table, starts, pieces)


def _of_regions(values: Sequence[int], index: I64) -> I64 | int:
    """What each span's region has, as a scalar where it is the same everywhere."""
    return values[0] if len(set(values)) == 1 else np.array(values, dtype=np.int64)[index]


def _modulo(offsets: I64, sizes: I64 | int) -> I64:
    """offsets % sizes, without the division where all sizes are the same power of two."""
    if isinstance(sizes, int) and sizes & (sizes - 1) == 0:
        return offsets & (sizes - 1)
    remainder: I64 = offsets % sizes
    return remainder


def _split(table: I64, first: I64 | int, step: I64 | int) -> tuple[I64, I64 | None]:
    """Cut row i after first[i] bytes, then every step[i].

    Returns the parts, by column, and the row of which each is one; None where nothing was cut.
    """
    length = table[:, 4]
    if (length <= first).all():
        return table, None
    steps = np.broadcast_to(np.asarray(step, dtype=np.int64), length.shape)
    first = np.minimum(first, length)
    counts = 1 + -(-(length - first) // steps)
    row = np.repeat(np.arange(len(table)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.where(nth == 0, 0, first[row] + (nth - 1) * steps[row])
    end = np.minimum(first[row] + nth * steps[row], length[row])
    columns = table.T[:, row]
    columns[[1, 3]] += begin
    columns[4] = end - begin
    return columns.T, row


def _unit(table: I64) -> int:
    unit = int(table[0, 4]) if len(table) else 0
    if not unit or unit % (RUN * WORD) or np.any(table[:, [0, 2, 4]] != table[0, [0, 2, 4]]):
        return 0
    return 0 if np.any(table[:, [1, 3]] % unit) or np.any(table[:, 5] % RUN) else unit
