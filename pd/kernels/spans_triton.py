"""One pass over spans of device memory: reads them once, and copies them, digests them, or both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from pd.kernels.spans import I64, TILE_ROWS, Form, launches, word_alignment

#: One program reads ROWS runs of RUN words (16 KiB): little enough that a single block of 4 MiB keeps every
#: multiprocessor busy, and 64 bytes in flight per thread.
ROWS = 32
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

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
def _tile(read, write, run, low, high, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Words [low, high) of ROWS runs; all of them if WHOLE. Parts int64[ROWS, PART] of their digest.

    A thread holds four parts of the same run and computes the run's key once for them. Of a whole tile all is read
    before anything is written: a load would not overtake a store that might hit the same address. A cut one is taken
    part by part, in few registers.
    """
    rows = tl.arange(0, ROWS)
    lanes = rows[:, None] * RUN + tl.arange(0, PART)[None, :]
    if WHOLE:
        a = tl.load(read + lanes)
        b = tl.load(read + lanes + PART)
        c = tl.load(read + lanes + 2 * PART)
        d = tl.load(read + lanes + 3 * PART)
        if write is not None:
            tl.store(write + lanes, a)
            tl.store(write + lanes + PART, b)
            tl.store(write + lanes + 2 * PART, c)
            tl.store(write + lanes + 3 * PART, d)
        parts = a + b + c + d
    else:
        parts = tl.zeros([ROWS, PART], tl.int64)
        for part in range(4):
            words = lanes + part * PART
            inside = (words >= low) & (words < high)
            value = tl.load(read + words, mask=inside, other=0)
            if write is not None:
                tl.store(write + words, value, mask=inside)
            parts += value
    keys = _run_keys(run + rows.to(tl.int64))
    return parts * keys[:, None]


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


@triton.jit
def _span_of(starts, tile, count):
    """The span to which a tile belongs: the last of `count` that begins at or before it; `starts` int64[count + 1]."""
    # Where every span has as many tiles, as blocks have, this one.
    guess = tl.minimum(tile * count // tl.load(starts + count), count - 1)
    span, beyond = tl.zeros_like(guess), guess * 0 + count
    if (tl.load(starts + guess) <= tile) & (tile < tl.load(starts + guess + 1)):
        span, beyond = guess, guess + 1
    while beyond - span > 1:
        middle = (span + beyond) // 2
        if tl.load(starts + middle) <= tile:
            span = middle
        else:
            beyond = middle
    return span


@triton.jit(do_not_specialize=["count", "first", "last"])
def span_share(
    source, target, digests, table, count, first, last, TILE: tl.constexpr, ROWS: tl.constexpr, ALIGNMENT: tl.constexpr
):
    """`span_pass` over tiles [first, last) by any number of programs: each takes an equal share, one after the other.

    `table` int64[5, count + 1]: as there, by column, and the number of each span's first tile of TILE runs; the last
    column has that of all. A program takes ROWS runs at a time.
    """
    starts = table + 4 * (count + 1)
    tiles = (last - first).to(tl.int64)
    tile = first + tiles * tl.program_id(0) // tl.num_programs(0)  # of TILE runs
    stop = first + tiles * (tl.program_id(0) + 1) // tl.num_programs(0)
    span = _span_of(starts, tile, count)
    while tile < stop:
        row = table + span
        position = tl.load(row + 3 * (count + 1))
        start = position % RUN  # tiles start where a run does
        begins = tl.load(starts + span)
        end = tl.minimum(tl.load(starts + span + 1), stop)
        at = (tile - begins) * (TILE * RUN) - start  # in the span
        left = tl.minimum(tl.load(row + 2 * (count + 1)), (end - begins) * (TILE * RUN) - start) - at
        low = tl.maximum(-at, 0).to(tl.int32)
        run = (position + at) // RUN
        read = tl.load(row) + at
        write = tl.load(row + count + 1) + at
        total = tl.zeros([ROWS, PART], tl.int64)
        while left > 0:
            here = source + tl.multiple_of(read, ALIGNMENT)
            there = target + tl.multiple_of(write, ALIGNMENT)
            if (low == 0) & (left >= ROWS * RUN):
                total += _tile(here, there, run, 0, 0, ROWS, True)
            else:
                total += _tile(here, there, run, low, tl.minimum(left, ROWS * RUN).to(tl.int32), ROWS, False)
                low = 0
            run += ROWS
            read += ROWS * RUN
            write += ROWS * RUN
            left -= ROWS * RUN
        tl.atomic_add(digests + span, tl.sum(total), sem="relaxed")
        tile = end
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
    alignment = word_alignment(table.T, source, target)
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
    alignment: int,
    tiles: tuple[int, int],
    programs: int,
    form: Form,
) -> None:
    """Run `span_share` with so many programs on the current stream of the current device, which is the tensors'."""
    span_share[(programs,)](
        source,
        target,
        digests,
        table,
        table.shape[1] - 1,
        *tiles,
        TILE=TILE_ROWS,
        ROWS=form.rows,
        ALIGNMENT=alignment,
        num_warps=form.warps,
        enable_fp_fusion=True,
    )
