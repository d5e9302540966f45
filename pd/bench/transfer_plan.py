"""Which spans `pd bench transfer` moves: the blocks of a whole pool, each once, laid out as an allocator would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd.abc import Spans
from pd.transfer.spans import coalesce

I64 = npt.NDArray[np.int64]

PATTERNS = {
    "fresh": "one run, as a pool that is used for the first time",
    "churned": "runs of 1 to 3 blocks at random places of both pools, as one that has been used for long",
    "scattered": "single blocks at random places of both pools",
}

#: Blocks of a churned pool's runs, in turn: of no beginning is the mean above 2.
CHURNED = (1, 3, 2, 1, 2)


@dataclass(frozen=True)
class Layout:
    """Pools of `nbytes` in blocks of `block` bytes. `merged`: neighbours on both sides are posted as one span."""

    pattern: str
    nbytes: int
    block: int
    merged: bool

    @property
    def form(self) -> str:
        return "merged" if self.merged else "single"

    def blocks(self, region: int = 0) -> Spans:
        """uint64[blocks, 5]: each block by itself, from the sender's region 0 to `region`, in the receiver's order."""
        local, remote = block_offsets(self.pattern, self.nbytes // self.block, self.block)
        spans = np.zeros((len(local), 5), dtype=np.uint64)
        spans[:, 1], spans[:, 2], spans[:, 3], spans[:, 4] = local, region, remote, self.block
        return spans

    def spans(self, region: int = 0) -> Spans:
        return self._posted(self.blocks(region))

    def groups(self, together: int, region: int = 0) -> Iterator[Spans]:
        """The spans of `together` blocks, then of the next ones; without end."""
        blocks = self.blocks(region)
        groups = [self._posted(part) for part in np.split(blocks, range(together, len(blocks), together))]
        whole = len(blocks) // together
        while True:
            yield from groups[:whole]

    def _posted(self, blocks: Spans) -> Spans:
        if not self.merged:
            return blocks
        local, remote, length = (blocks[:, column].astype(np.int64) for column in (1, 3, 4))
        return coalesce(0, local, int(blocks[0, 2]), remote, length)


def forms(pattern: str, nbytes: int, block: int) -> list[Layout]:
    """How the blocks are posted: merged, as pd does, and each by itself. Where none are neighbours that is the same."""
    both = (True, False) if pattern != "scattered" else (False,)
    return [Layout(pattern, nbytes, block, merged) for merged in both]


def run_lengths(pattern: str, count: int) -> I64:
    """Blocks of each run; `count` in all."""
    if pattern != "churned":
        return np.array([count] if pattern == "fresh" else [1] * count)
    lengths = np.resize(CHURNED, count)
    runs = int(np.searchsorted(np.cumsum(lengths), count)) + 1
    lengths[runs - 1] -= lengths[:runs].sum() - count
    return lengths[:runs]


def block_offsets(pattern: str, count: int, block: int) -> tuple[I64, I64]:
    """Where each block is at the sender and at the receiver, sorted by the latter. The same in every process."""
    lengths = run_lengths(pattern, count)
    random = np.random.default_rng(count)
    while True:
        here, there = (random.permutation(len(lengths)) for _ in range(2))  # runs, in the order of each pool
        place = np.argsort(here)[there]
        if not (place[1:] == place[:-1] + 1).any():  # no two runs meet on both sides
            break
    starts = np.empty(len(lengths), dtype=np.int64)
    starts[here] = np.cumsum(lengths[here]) - lengths[here]
    inside = np.arange(count) - np.repeat(np.cumsum(lengths[there]) - lengths[there], lengths[there])
    return (np.repeat(starts[there], lengths[there]) + inside) * block, np.arange(count) * block
