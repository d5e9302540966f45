"""Batches over a pool of random blocks, as a runner makes them, for the tests of attention on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pd.kernels.attention import DeviceBatch, Heads, LayerKv, PromptRow
from pd.kernels.attention_plan import prompt_tiles
from pd.kernels.reference import to_fp8

#: Of keys and values, where the cache is of one byte an element: no powers of two, and large enough for both to matter.
SCALES = (0.37, 1.9)


class Case(NamedTuple):
    heads: Heads
    kv: LayerKv
    batch: DeviceBatch


def attention_case(
    rows: Sequence[tuple[int, int]],
    *,
    group: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    fill: float = float("nan"),
    spare: int = 3,
    arrivals: bool = True,
    fp8: bool = False,
) -> Case:
    """`rows`: (tokens in this step, context with them); those of one token first, a context of 0 is a padding row.

    Blocks are drawn at random, `spare` remain; all that no row's tokens fill is `fill`. Queries, keys and values are
    views of one projection, whose keys and values the pool has too. `fp8`: in float8_e4m3fn, with SCALES.
    """
    torch.manual_seed(len(rows) + sum(context for _, context in rows))
    rng = np.random.default_rng(len(rows))
    needs = [-(-context // page) for _, context in rows]
    ids = rng.permutation(np.arange(1, 1 + sum(needs) + spare)).astype(np.int32)
    tables = np.zeros((len(rows), max(needs) + 3), dtype=np.int32)
    tokens = sum(count for count, _ in rows)
    fused = torch.randn(tokens, group * kv_heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    heads = Heads(*fused.split([group * kv_heads, kv_heads, kv_heads], dim=1))
    pool = torch.full((len(ids) + 1, kv_heads, 2, 2, page, head_dim), fill, dtype=dtype, device=device)
    kv = LayerKv(pool[:, :, 1, 0], pool[:, :, 1, 1])
    if fp8:
        for new, scale in zip(heads[1:], SCALES, strict=True):
            new.copy_(to_fp8(new.float() / scale).float() * scale)
    start, prompts = 0, []
    for row, ((count, context), need) in enumerate(zip(rows, needs, strict=True)):
        tables[row, :need], ids = ids[:need], ids[need:]
        table = torch.from_numpy(tables[row, :need]).long().to(device)
        for cache, new in ((kv.k, heads.k), (kv.v, heads.v)):
            if context:
                before = torch.randn(context - count, kv_heads, head_dim, device=device).to(dtype)
                whole = torch.full((need * page, kv_heads, head_dim), fill, dtype=dtype, device=device)
                whole[:context] = torch.cat((before, new[start : start + count]))
                cache[table] = whole.view(need, page, kv_heads, head_dim).transpose(1, 2)
        if count > 1:
            prompts.append(PromptRow(start, count, context))
        start += count
    if fp8:
        kv = LayerKv(*(to_fp8(pool.float() / scale)[:, :, 1, i] for i, scale in enumerate(SCALES)), *SCALES)
    starts = [prompt.start for prompt in prompts] + [start]
    unused = torch.empty(0, dtype=torch.int32)
    batch = DeviceBatch(
        positions=unused,
        blocks=unused,
        offsets=unused,
        tables=torch.from_numpy(tables).to(device)[:, : max(needs)],
        lengths=torch.tensor([context for _, context in rows], dtype=torch.int32, device=device),
        decode=len(rows) - len(prompts),
        prompts=tuple(prompts),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        tiles=torch.from_numpy(prompt_tiles(prompts, group)).to(device),
        arrivals=torch.zeros(len(rows) * kv_heads, dtype=torch.int32, device=device) if arrivals else None,
    )
    return Case(heads, kv, batch)
