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

#: By (N, K of the weight, gated): up to how many rows of x, which launch; None, like what is not here, is cuBLAS.
#: Measured on an H200 by tests/bench/bench_linear.py.
TABLE: dict[tuple[int, int, bool], tuple[tuple[int, Config | None], ...]] = {}


def config_for(rows: int, n: int, k: int, gated: bool) -> Config | None:
    """How x [rows, k] times weight [n, k] is best launched; None is cuBLAS."""
    for most, config in TABLE.get((n, k, gated), ()):
        if rows <= most:
            return config
    return None
