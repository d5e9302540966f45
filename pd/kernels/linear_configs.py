"""How projections of few rows are launched, by shape and rows, where that was measured to be faster than cuBLAS."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stream:
    """A launch of `linear_triton.stream`.

    `block_n` rows of the weight by `block_k` columns are a tile, the step of a program of `warps` warps; `stages` tiles
    are in flight. `per_sm` programs for each multiprocessor share all steps evenly, whatever they cut through; with
    per_sm 0 there are `split` programs for each block of rows instead. `tma`: tiles are read by the copy engine.

    `pdl` (programmatic dependent launch): programs may start before the kernel ahead has ended, ask the L2 for their
    first `prefetch` steps of the weight, and only then wait for x. They let the next kernel start when they do
    themselves (`early`), or when nothing is left to read.
    """

    block_n: int
    block_k: int
    stages: int
    warps: int
    per_sm: int = 1
    split: int = 1
    tma: bool = False
    pdl: bool = False
    prefetch: int = 0
    early: bool = False


@dataclass(frozen=True)
class Row:
    """A launch of `linear_triton.row`, for one row of x; the fields are as in `Stream`."""

    block_n: int
    block_k: int
    warps: int
    pdl: bool = False
    early: bool = False


Config = Stream | Row

#: For one row of x. Alone, no launch that spills no registers is more than 2.5 % faster for a shape of `TABLE`.
ONE_ROW = Row(2, 2048, 4, pdl=True, early=True)

#: By (N, K of the weight): up to how many rows of x, from two on, which launch; above those cuBLAS. Measured on an
#: H200 by tests/bench/bench_linear.py, for Llama-3.1-8B (the layers of Mistral-7B have the same shapes): those of the
#: layers are the fastest chain. At 2 to 7 and 9 to 16 rows the machine code is that of 8, at 17 to 31 that of 32.
TABLE: dict[tuple[int, int], tuple[tuple[int, Stream], ...]] = {
    (6144, 4096): (
        (16, Stream(64, 128, 3, 4, per_sm=0, split=2, pdl=True, prefetch=1)),
        (32, Stream(64, 128, 4, 4, per_sm=0, split=2, tma=True, pdl=True, prefetch=1)),
    ),
    (4096, 4096): (
        (16, Stream(64, 128, 5, 4, per_sm=0, split=2, tma=True, pdl=True, prefetch=2)),
        (32, Stream(64, 128, 4, 4, per_sm=0, split=4, tma=True, pdl=True, prefetch=1)),
    ),
    (28672, 4096): (
        (16, Stream(64, 128, 5, 4, per_sm=0, tma=True, pdl=True, prefetch=1)),
        (32, Stream(64, 128, 4, 4, per_sm=0, tma=True, pdl=True, prefetch=1)),
    ),
    (4096, 14336): (
        (16, Stream(64, 128, 3, 4, per_sm=0, split=4, pdl=True)),
        (32, Stream(64, 128, 4, 4, per_sm=0, split=4, tma=True, pdl=True, prefetch=1)),
    ),
    (128256, 4096): (
        (16, Stream(64, 128, 5, 4, per_sm=0, tma=True)),
        (32, Stream(64, 128, 2, 4, per_sm=0, tma=True)),
        (64, Stream(128, 64, 3, 8, per_sm=0, tma=True)),
    ),
}


def config_for(rows: int, n: int, k: int) -> Config | None:
    """How x [rows, k] times weight [n, k] is best launched; None is cuBLAS."""
    if rows == 1:
        return ONE_ROW if _is_for_one_row(n, k) else None
    for most, config in TABLE.get((n, k), ()):
        if rows <= most:
            return config
    return None


def _is_for_one_row(n: int, k: int) -> bool:
    """Between the shapes of `TABLE` every one was faster than cuBLAS: by 38 % the smallest, by 6 % the largest."""
    return n >= 4096 and 4096 <= k <= 14336 and k % ONE_ROW.block_k == 0
