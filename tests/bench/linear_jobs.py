"""What bench_linear.py measures: shapes of weights, and launch configurations for them that fit an H200."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pd.kernels import linear_triton
from pd.kernels.linear_configs import ONE_ROW, Config, Row, Stream, config_for

#: N, K of the weights of Llama-3.1-8B's layers, in the order in which they are used.
LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
#: Of other models.
OTHERS = {
    "Qwen3-8B gate_up": (24576, 4096),
    "Qwen3-8B down": (4096, 12288),
    "Qwen3-8B lm_head": (151936, 4096),
    "Qwen2.5-7B qkv": (4608, 3584),
    "Qwen2.5-7B o": (3584, 3584),
    "Qwen2.5-7B gate_up": (37888, 3584),
    "Qwen2.5-7B down": (3584, 18944),
    "Qwen2.5-7B lm_head": (152064, 3584),
}
LLAMA = LAYER | {"lm_head": (128256, 4096)}
SHAPES = LLAMA | OTHERS
PROCESSORS = 132

#: Shared memory that a multiprocessor has for its programs, each of which takes 1 KiB more than it asks for.
SHARED = 228 << 10
#: Partial sums that a configuration may need.
MOST_PARTIAL_BYTES = 48 << 20


@dataclass(frozen=True)
class Job:
    """One configuration for one shape at some rows."""

    shape: str
    rows: int
    config: Config

    def variant(self) -> tuple[Any, ...]:
        """Equal for jobs that run the same machine code."""
        n, k = SHAPES[self.shape]
        if isinstance(self.config, Row):
            return (self.config, k, n % self.config.block_n == 0)
        bare = replace(self.config, per_sm=1, split=1, prefetch=0)
        _, divided = linear_triton.shares(self.config, n, k, PROCESSORS)
        even = n % bare.block_n == 0 and k % bare.block_k == 0
        return (bare, padded(self.rows), divided, even)


def padded(rows: int) -> int:
    return max(16, 1 << (rows - 1).bit_length())


def shared_bytes(config: Stream, rows: int) -> int:
    """Tiles in flight, and the sums as they are turned round to be stored."""
    tiles = config.stages * (config.block_n + padded(rows)) * config.block_k * 2
    return tiles + min(config.block_n * padded(rows), linear_triton.AT_ONCE.value) * 4 + 1024


def row_configs(k: int) -> Iterator[Row]:
    for block_n, block_k, warps in product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (4, 8)):
        per_thread = block_n * block_k // (32 * warps)
        if k % block_k == 0 and 16 <= per_thread <= 128:
            yield Row(block_n, block_k, warps)


def stream_tiles(rows: int) -> Iterator[tuple[Stream, int]]:
    """Tiles with as many stages as leave room for 1 to 4 programs on a multiprocessor, and that number.

    Together those have 48 to 200 KiB of the weight in flight.
    """
    for block_n, block_k, warps, tma in product((64, 128, 256), (64, 128, 256, 512), (4, 8), (False, True)):
        sums = block_n * padded(rows) // (32 * warps)
        tile = block_n * block_k * 2
        if sums > 128 or not 16 << 10 <= tile <= 64 << 10 or block_n < 16 * warps or (block_k == 512 and rows > 32):
            continue
        for together in (1, 2, 3, 4):
            depths = [Stream(block_n, block_k, stages, warps, tma=tma) for stages in range(2, 9)]
            fitting = [one for one in depths if together * (shared_bytes(one, rows) + 1024) <= SHARED]
            if fitting and 48 << 10 <= together * (fitting[-1].stages - 1) * tile:
                yield fitting[-1], together


def stream_configs(shape: str, rows: int) -> Iterator[Stream]:
    n, k = SHAPES[shape]
    found = []
    for tile, together in stream_tiles(rows):
        blocks, steps = n // tile.block_n, k // tile.block_k
        found += [replace(tile, per_sm=count) for count in ((1, 2) if together == 2 else (together,))]
        found += [
            replace(tile, per_sm=0, split=split)
            for split in (1, 2, 4, 8)
            if together > 1 and steps % split == 0 and steps // split >= 4
            if 0.9 * PROCESSORS <= blocks * split <= 16 * PROCESSORS
        ]
    for config in dict.fromkeys(found):
        programs, divided = linear_triton.shares(config, n, k, PROCESSORS)
        partial = programs * 2 * config.block_n * padded(rows) * 4
        if not divided or (partial <= MOST_PARTIAL_BYTES and programs <= linear_triton.MOST_PROGRAMS):
            yield config


def all_jobs(rows_list: list[int]) -> list[Job]:
    jobs = []
    for shape, rows in product(LLAMA, rows_list):
        jobs += [Job(shape, rows, config) for config in stream_configs(shape, rows)]
        if rows == 1:
            jobs += [Job(shape, rows, config) for config in row_configs(SHAPES[shape][1])]
    return jobs


#: By rows, a power of two: tiles with as many stages as leave room for two programs on a multiprocessor, or for one.
QUICK: dict[int, tuple[Stream, ...]] = {
    16: (Stream(64, 128, 5, 4, tma=True), Stream(64, 128, 3, 4)),
    32: (Stream(64, 128, 4, 4, tma=True), Stream(64, 128, 2, 4, tma=True)),
    64: (
        Stream(64, 128, 3, 4, tma=True),
        Stream(64, 64, 6, 4, tma=True),
        Stream(128, 64, 4, 8, tma=True),
        Stream(128, 64, 4, 4, tma=True),
        Stream(128, 128, 2, 8, tma=True),
        Stream(256, 64, 2, 8, tma=True),
    ),
    128: (
        Stream(64, 64, 4, 4, tma=True),
        Stream(64, 128, 2, 4, tma=True),
        Stream(128, 64, 3, 8, tma=True),
        Stream(128, 64, 6, 8, tma=True),
        Stream(128, 128, 3, 8, tma=True),
    ),
    256: (Stream(128, 64, 3, 8, tma=True), Stream(128, 64, 4, 8, tma=True)),
}


def quick_streams(shape: str, rows: int) -> Iterator[Stream]:
    """Each tile of `QUICK`: whole blocks if those are many, else split in two ways; and shared evenly."""
    n, k = SHAPES[shape]
    for tile in QUICK[padded(rows)]:
        blocks, steps = -(-n // tile.block_n), -(-k // tile.block_k)
        fitting = [
            split
            for split in (1, 2, 4, 8)
            if steps % split == 0 and 0.9 * PROCESSORS <= blocks * split and (split == 1 or blocks * split <= 500)
        ]
        yield from (replace(tile, per_sm=0, split=split) for split in fitting[:2])
        yield replace(tile, per_sm=min(2, SHARED // (shared_bytes(tile, rows) + 1024)))


def quick_jobs(rows_list: list[int]) -> list[Job]:
    """Few, for every shape; of other models up to 32 rows."""
    jobs = []
    for shape, rows in product(SHAPES, rows_list):
        if shape in OTHERS and rows > 32:
            continue
        if rows == 1:
            one = replace(ONE_ROW, pdl=False, early=False)
            jobs += [Job(shape, 1, config) for config in (one, Row(4, 2048, 4), Row(4, 512, 4), Row(2, 1024, 4))]
        else:
            jobs += [Job(shape, rows, config) for config in quick_streams(shape, rows)]
    return jobs


def table_jobs(rows_list: list[int]) -> list[Job]:
    """What pd launches."""
    found = [(shape, rows, config_for(rows, *SHAPES[shape])) for shape, rows in product(LAYER, rows_list)]
    return [Job(shape, rows, config) for shape, rows, config in found if config is not None]
