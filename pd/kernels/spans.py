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

#: Runs of a tile, the least that a program of a share takes: 16 KiB.
TILE_ROWS = 32


def as_words(memory: torch.Tensor) -> torch.Tensor:
    """Contiguous memory of any type as int64[words], without a copy; a rest of less than a word is left out."""
    if not memory.is_contiguous() or memory.data_ptr() % WORD:
        raise ValueError(f"memory must be contiguous and start at a multiple of {WORD} bytes")
    raw = memory.view(-1).view(torch.uint8)
    return raw[: raw.numel() // WORD * WORD].view(torch.int64)


def span_words(what: str, memory: torch.Tensor, offsets: I64, lengths: I64) -> I64:
    """Checks that spans (in bytes) are whole words inside `memory` int64[words]; returns the offsets in words."""
    bits = int(np.bitwise_or.reduce(offsets | lengths, initial=0))  # negative if any of them is
    if bits & (WORD - 1):
        raise ValueError(f"{what}: a span begins and ends at a multiple of {WORD} bytes")
    if bits < 0 or (len(offsets) and (offsets + lengths).max() > memory.numel() * WORD):
        raise ValueError(f"{what}: a span lies outside the {memory.numel() * WORD} bytes of memory")
    return offsets >> 3


@dataclass(frozen=True)
class Share:
    """How programs share spans: `tiles` of TILE_ROWS runs of words there are in all; `alignment` in words."""

    tiles: int
    alignment: int


@dataclass(frozen=True)
class Form:
    """How a program of a share works: `rows` runs of words at a time, a multiple of TILE_ROWS, by `warps` warps.

    What is on its way at a time is rows / 2 KiB, all of it in registers.
    """

    rows: int
    warps: int


def share_table(table: I64, spans: I64) -> int:
    """Fill `table` int64[5, n + 1] for a share kernel; the tiles there are, of TILE_ROWS runs of words.

    `spans` int64[4, n], in words: offsets in the source, in the target, lengths, positions of the first words. The
    table adds the number of each span's first tile, and a last column with that of all.
    """
    lengths, positions = spans[2], spans[3]
    table[:4, :-1], table[:4, -1] = spans, 0
    tiles = -(-(lengths + (positions & (RUN - 1))) // (TILE_ROWS * RUN))
    tiles[lengths == 0] = 0
    table[4, 0] = 0
    np.cumsum(tiles, out=table[4, 1:])
    return int(table[4, -1])


def word_alignment(spans: I64, source: torch.Tensor, target: torch.Tensor | None) -> int:
    """2 if tiles begin at even words in both memories, so that 16 bytes can be accessed at once; else 1.

    `spans` int64[4, n] as in `share_table`.
    """
    odd = (spans[0] ^ spans[3]) | (spans[1] ^ spans[3] if target is not None else 0)  # a run begins at an even word
    bases = source.data_ptr() | (target.data_ptr() if target is not None else 0)
    return 1 if int(np.bitwise_or.reduce(odd, initial=0)) & 1 or bases % 16 else 2


def launches(chunks: I64) -> Iterator[tuple[I64, int]]:
    """Spans that one grid serves, as (indices, chunks of the longest): every span gets as many programs as the longest.

    `chunks[i]` is what span i needs. Spans of a launch differ by less than a factor of two, so that fewer than half of
    the programs have nothing to do; spans that need none are left out.
    """
    sizes = np.frexp(chunks.astype(np.float64))[1]
    for size in np.unique(sizes[chunks > 0]):
        members = np.flatnonzero(sizes == size)
        yield members, int(chunks[members].max())
