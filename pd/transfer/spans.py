"""From block ids to spans: slicing by kv heads, coalescing, chunking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd.abc import Region, Spans
from pd.errors import ProtocolError
from pd.transfer.digest import DigestGeometry
from pd.types import BlockShape

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """One KV pool of this rank: blocks of `shape` from the start of `region`. `first_head` is model-wide."""

    region: Region
    shape: BlockShape
    first_head: int = 0

    @property
    def num_blocks(self) -> int:
        return self.region.nbytes // self.shape.nbytes

    @property
    def geometry(self) -> DigestGeometry:
        return DigestGeometry(self.shape, self.first_head)

    @property
    def heads(self) -> tuple[int, int]:
        """Half-open range of model-wide kv heads."""
        return self.first_head, self.first_head + self.shape.kv_heads

    def local_heads(self, kv_heads: tuple[int, int]) -> tuple[int, int]:
        """What a peer's model-wide range and this pool share, counted within this pool; (0, 0) means the same."""
        if kv_heads == (0, 0):
            return 0, self.shape.kv_heads
        low, high = max(kv_heads[0], self.heads[0]), min(kv_heads[1], self.heads[1])
        return (low - self.first_head, high - self.first_head) if low < high else (0, 0)


def block_ids(data: bytes, what: str) -> I64:
    """Little-endian int32 as int64. Raises ProtocolError."""
    if len(data) % 4:
        raise ProtocolError(what, f"{len(data)} bytes are no int32 array")
    return np.frombuffer(data, dtype="<i4").astype(np.int64)


def check_blocks(ids: I64, limit: int, what: str) -> None:
    """Raises ProtocolError for an id outside [0, limit)."""
    if len(ids) and (ids.min() < 0 or ids.max() >= limit):
        raise ProtocolError(what, f"block {int(ids.min())} or {int(ids.max())} outside 0..{limit - 1}")


def block_spans(pool: Pool, region: int, ids: I64) -> Spans:
    """Whole blocks of one pool on both sides of Spans, merged (for grants)."""
    size = pool.shape.nbytes
    starts = ids * size
    return coalesce(region, starts, region, starts, np.full(len(ids), size, np.int64))


def push_spans(pool: Pool, region: int, source: I64, target: I64, peer_heads: tuple[int, int]) -> Spans:
    """Spans that take blocks `source` here to blocks `target` of a peer whose blocks hold `peer_heads`.

    Empty when the two share no head. Merged where neighbours on both sides, sorted by where they go.
    """
    first, last = pool.local_heads(peer_heads)
    if first == last:
        return np.zeros((0, 5), np.uint64)
    theirs = pool.heads if peer_heads == (0, 0) else peer_heads
    head = pool.shape.head_bytes
    starts = source * pool.shape.nbytes + first * head
    ends = target * ((theirs[1] - theirs[0]) * head) + (pool.first_head + first - theirs[0]) * head
    return coalesce(region, starts, region, ends, np.full(len(source), (last - first) * head, np.int64))


def coalesce(local_region: int, local: I64, remote_region: int, remote: I64, length: I64) -> Spans:
    """Spans sorted by remote offset; runs that continue on both sides become one."""
    order = np.argsort(remote, kind="stable")
    local, remote, length = local[order], remote[order], length[order]
    joins = (local[1:] == local[:-1] + length[:-1]) & (remote[1:] == remote[:-1] + length[:-1])
    first = np.flatnonzero(np.r_[True, ~joins]) if len(local) else np.zeros(0, np.int64)
    spans = np.zeros((len(first), 5), dtype=np.uint64)
    spans[:, 0], spans[:, 2] = local_region, remote_region
    spans[:, 1], spans[:, 3] = local[first], remote[first]
    if len(first):
        spans[:, 4] = np.add.reduceat(length, first)
    return spans


def posts(spans: Spans, max_spans: int) -> Iterator[Spans]:
    """Pieces of at most `max_spans` spans."""
    for start in range(0, len(spans), max_spans):
        yield spans[start : start + max_spans]
