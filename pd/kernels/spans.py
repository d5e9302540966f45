"""What the ops over spans of memory share: words, bounds, and the launches that a set of spans makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

I64 = npt.NDArray[np.int64]

#: Bytes of a word: what spans are counted, copied and digested in.
WORD = 8

#: Words under one key of the digest.
RUN = 64


def as_words(memory: torch.Tensor) -> torch.Tensor:
    """Contiguous memory of any type as int64[words], without a copy; a rest of less than a word is left out."""
    if not memory.is_contiguous() or memory.data_ptr() % WORD:
        raise ValueError(f"memory must be contiguous and start at a multiple of {WORD} bytes")
    raw = memory.view(-1).view(torch.uint8)
    return raw[: raw.numel() // WORD * WORD].view(torch.int64)


def span_words(what: str, memory: torch.Tensor, offsets: I64, lengths: I64) -> I64:
    """Checks that spans (in bytes) are whole words inside `memory` int64[words]; returns the offsets in words."""
    if ((offsets | lengths) & (WORD - 1)).any():
        raise ValueError(f"{what}: a span begins and ends at a multiple of {WORD} bytes")
    if len(offsets) and (offsets.min() < 0 or lengths.min() < 0 or (offsets + lengths).max() > memory.numel() * WORD):
        raise ValueError(f"{what}: a span lies outside the {memory.numel() * WORD} bytes of memory")
    return offsets >> 3


@dataclass(frozen=True)
class Share:
    """How programs share spans: `tiles` of `rows` runs of words there are in all; `alignment` in words."""

    rows: int
    tiles: int
    alignment: int


def share_table(table: I64, spans: I64, rows: int) -> int:
    """Fill `table` int64[n + 1, 5] for a share kernel that takes `rows` runs of words at a time; the tiles there are.

    `spans` int64[n, 4], in words: offset in the source, in the target, length, position of the first word. The table
    adds the number of each span's first tile, and a last row with that of all.
    """
    table[:-1, :4] = spans
    table[-1, :4] = 0
    tiles = np.where(spans[:, 2] > 0, -(-(spans[:, 2] + (spans[:, 3] & (RUN - 1))) // (rows * RUN)), 0)
    table[0, 4] = 0
    np.cumsum(tiles, out=table[1:, 4])
    return int(table[-1, 4])


def word_alignment(spans: I64, source: torch.Tensor, target: torch.Tensor | None) -> int:
    """2 if tiles begin at even words in both memories, so that 16 bytes can be accessed at once; else 1."""
    skip = spans[:, 3] & (RUN - 1)
    odd = (spans[:, 0] - skip) | (spans[:, 1] - skip if target is not None else 0)
    bases = source.data_ptr() | (target.data_ptr() if target is not None else 0)
    return 1 if (odd & 1).any() or bases % 16 else 2


def launches(chunks: I64) -> Iterator[tuple[I64, int]]:
    """Spans that one grid serves, as (indices, chunks of the longest): every span gets as many programs as the longest.

    `chunks[i]` is what span i needs. Spans of a launch differ by less than a factor of two, so that fewer than half of
    the programs have nothing to do; spans that need none are left out.
    """
    sizes = np.frexp(chunks.astype(np.float64))[1]
    for size in np.unique(sizes[chunks > 0]):
        members = np.flatnonzero(sizes == size)
        yield members, int(chunks[members].max())
