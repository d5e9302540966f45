"""One pass over spans of device memory: reads them once, and copies them, digests them, or both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from pd.kernels.spans import I64, Share, launches, word_alignment

#: One program reads ROWS runs of RUN words (16 KiB): little enough that a single block of 4 MiB keeps every
#: multiprocessor busy, and 64 bytes in flight per thread.
ROWS = 32
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

#: Rows of a tile for each warp of `span_share`: 128 bytes in flight per thread, as in the pass.
ROWS_PER_WARP = 8

#: Words under one key of the digest, and the parts of a run that a thread adds up before it multiplies.
RUN = tl.constexpr(64)
PART = tl.constexpr(16)

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _run_keys(runs):
    """splitmix64(run) | 1, of int64 run numbers."""
    z = runs.to(tl.uint64) + _GAMMA
    z = (z ^ (z >> 30)) * _MIX1
    z = (z ^ (z >> 27)) * _MIX2
    return ((z ^ (z >> 31)) | 1).to(tl.int64)


@triton.jit
def _load(words, lanes, low, high, WHOLE: tl.constexpr):
    if WHOLE:
        value = tl.load(words + lanes)
    else:
        value = tl.load(words + lanes, mask=(lanes >= low) & (lanes < high), other=0)
    return value


@triton.jit
def _store(words, lanes, value, low, high, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(words + lanes, value)
    else:
        tl.store(words + lanes, value, mask=(lanes >= low) & (lanes < high))


@triton.jit
def _tile(read, write, run, low, high, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Words [low, high) of ROWS runs; all of them if WHOLE. Parts int64[ROWS, PART] of their digest.

    A thread holds four parts of the same run and computes the run's key once for them. All is read before anything is
    written: a load would not overtake a store that might hit the same address.
    """
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * RUN + tl.arange(0, PART)[None, :]
    a = _load(read, lanes, low, high, WHOLE)
    b = _load(read, lanes + PART, low, high, WHOLE)
    c = _load(read, lanes + 2 * PART, low, high, WHOLE)
    d = _load(read, lanes + 3 * PART, low, high, WHOLE)
    if write is not None:
        _store(write, lanes, a, low, high, WHOLE)
        _store(write, lanes + PART, b, low, high, WHOLE)
        _store(write, lanes + 2 * PART, c, low, high, WHOLE)
        _store(write, lanes + 3 * PART, d, low, high, WHOLE)
    keys = _run_keys(run + rows.to(tl.int64))
    return (a + b + c + d) * keys[:, None]


@triton.jit
def _span_tile(read, write, position, begin, words, ROWS: tl.constexpr):
    """The tile of a span that begins at its word `begin`, to which `read` and `write` point; as `_tile`."""
    run = (position + begin) // RUN
    if (begin >= 0) & (begin + ROWS * RUN <= words):
        parts = _tile(read, write, run, 0, 0, ROWS, True)
    else:
        low = tl.maximum(-begin, 0).to(tl.int32)
        high = tl.minimum(words - begin, ROWS * RUN).to(tl.int32)
        parts = _tile(read, write, run, low, high, ROWS, False)
    return parts


@triton.jit(do_not_specialize=["chunks"])
def span_pass(source, target, digests, table, members, chunks, ROWS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """`source`, `target` and `digests` are of int64 words; without a target nothing is copied, without digests no sums.

    `table` int64[n, 4]: offset in `source`, offset in `target`, length, position of the first word (all in words).
    `members` int64[m]: the spans of this launch, each served by `chunks` programs. Tiles start where a run does.
    """
    program = tl.program_id(0)
    span = tl.load(members + program // chunks)
    row = table + span * 4
    words = tl.load(row + 2)
    position = tl.load(row + 3)
    # The tile's first word, counted from the span's; before it where the span begins within a run.
    begin = (program % chunks).to(tl.int64) * (ROWS * RUN) - position % RUN
    if begin < words:
        read = source + tl.multiple_of(tl.load(row) + begin, ALIGNMENT)
        write = None
        if target is not None:
            write = target + tl.multiple_of(tl.load(row + 1) + begin, ALIGNMENT)
        parts = _span_tile(read, write, position, begin, words, ROWS)
        if digests is not None:
            tl.atomic_add(digests + span, tl.sum(parts), sem="relaxed")  # integers: the order does not matter


@triton.jit(do_not_specialize=["count"])
def span_share(source, target, digests, table, count, ROWS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """`span_pass` by any number of programs: each copies and digests an equal share of all tiles, one after the other.

    `table` int64[count + 1, 5]: as there, and the number of the span's first tile; the last row has that of all.
    """
    tiles = tl.load(table + count * 5 + 4)
    tile = tiles * tl.program_id(0) // tl.num_programs(0)
    last = tiles * (tl.program_id(0) + 1) // tl.num_programs(0)
    # The span of the first tile: the last one that begins at or before it.
    span, beyond = 0, count
    while beyond - span > 1:
        middle = (span + beyond) // 2
        if tl.load(table + middle * 5 + 4) <= tile:
            span = middle
        else:
            beyond = middle
    while tile < last:
        row = table + span * 5
        words = tl.load(row + 2)
        position = tl.load(row + 3)
        first = tl.load(row + 4)
        end = tl.minimum(tl.load(row + 9), last)
        start = position % RUN  # tiles start where a run does
        read = tl.load(row) - start
        write = tl.load(row + 1) - start
        total = tl.zeros([ROWS, PART], tl.int64)
        while tile < end:
            at = (tile - first) * (ROWS * RUN)
            here = source + tl.multiple_of(read + at, ALIGNMENT)
            there = target + tl.multiple_of(write + at, ALIGNMENT)
            total += _span_tile(here, there, position, at - start, words, ROWS)
            tile += 1
        tl.atomic_add(digests + span, tl.sum(total), sem="relaxed")
        span += 1


def run_pass(source: torch.Tensor, target: torch.Tensor | None, table: I64, digests: torch.Tensor | None) -> None:
    """Run `span_pass` on the current stream of the tensors' device. `table` as there, checked by the caller."""
    prepare_pass(source, target, table, digests)()


def prepare_pass(
    source: torch.Tensor, target: torch.Tensor | None, table: I64, digests: torch.Tensor | None
) -> Callable[[], None]:
    """Bring the tables of `run_pass` to the device; what is returned only launches, as often as it is called."""
    skip = table[:, 3] % RUN.value
    chunks = np.where(table[:, 2] > 0, -(-(table[:, 2] + skip) // (ROWS * RUN.value)), 0)
    alignment = word_alignment(table, source, target)
    rows = torch.from_numpy(table).to(source.device, non_blocking=True)
    grids = [
        (torch.from_numpy(members).to(source.device, non_blocking=True), most) for members, most in launches(chunks)
    ]

    def launch() -> None:
        with torch.cuda.device_of(source):
            for members, most in grids:
                span_pass[(len(members) * most,)](
                    source, target, digests, rows, members, most, ROWS=ROWS, ALIGNMENT=alignment, **OPTIONS
                )

    return launch


def run_share(
    source: torch.Tensor,
    target: torch.Tensor,
    digests: torch.Tensor,
    table: torch.Tensor,
    share: Share,
    programs: int,
) -> None:
    """Run `span_share` with so many programs on the current stream of the current device, which is the tensors'."""
    span_share[(programs,)](
        source,
        target,
        digests,
        table,
        len(table) - 1,
        ROWS=share.rows,
        ALIGNMENT=share.alignment,
        num_warps=share.rows // ROWS_PER_WARP,
        enable_fp_fusion=True,
    )
