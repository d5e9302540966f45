"""Attention of prompt rows over paged KV: tiles of queries against the whole context (FlashAttention-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pd.kernels.attention import DeviceBatch, LayerKv
from pd.kernels.attention_plan import TILE_ROWS, tile_tokens
from pd.kernels.attention_triton import LOG2_E, kv_blocks, kv_tile, precision


@dataclass(frozen=True)
class PromptConfig:
    """`rows` (queries x heads of a group) of a program are compared with `step` keys at a time."""

    rows: int = TILE_ROWS
    step: int = 64
    warps: int = 8
    stages: int = 5


def prompt_config(dtype: torch.dtype, head_dim: int) -> PromptConfig:
    """What spills no registers on a Hopper and fits its shared memory.

    Keys and values wait for the table's entries, which five stages read two steps before these and four before use.
    """
    if dtype == torch.float32:
        return PromptConfig(rows=32, step=16, warps=4, stages=1)
    return PromptConfig() if head_dim <= 128 else PromptConfig(step=32, stages=3)


@triton.jit
def attend(
    queries,
    highest,
    total,
    mixed,
    k,
    v,
    table,
    begin,
    end,
    positions,
    context,
    block_stride,
    token_stride,
    scale,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys from `begin` to `end` to the running softmax (highest score, sum, sum of values).

    Unless MASKED all queries see all of them. The first masked step of each tile has a key that all its queries see,
    if there is no WINDOW.
    """
    for first in range(begin, end, STEP):
        keys = first + tl.arange(0, STEP)
        if MASKED:
            real = keys < context
        else:
            real = None
        ids = kv_blocks(table, keys, real, PAGE)
        tile = kv_tile(k, ids, keys, real, block_stride, token_stride, PAGE, DIM)
        scores = tl.dot(queries, tl.trans(tile), input_precision=PRECISION)
        if MASKED:
            seen = keys[None, :] <= positions[:, None]
            if WINDOW:
                seen &= keys[None, :] > positions[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        base = higher
        if WINDOW:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - base[:, None])
        faded = tl.exp2(highest - base)
        total = total * faded + tl.sum(weights, 1)
        tile = kv_tile(v, ids, keys, real, block_stride, token_stride, PAGE, DIM)
        mixed = tl.dot(weights.to(tile.dtype), tile, mixed * faded[:, None], input_precision=PRECISION)
        highest = higher
    return highest, total, mixed


@triton.jit(
    do_not_specialize=["table_stride", "decode"],
    do_not_specialize_on_alignment=["tables", "lengths", "starts", "tiles"],
)
def prompt_tile(
    q,
    k,
    v,
    out,
    tables,
    lengths,
    starts,
    tiles,
    q_row,
    q_head,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    decode,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (part of a tile, kv head): ROWS // GROUP queries of one prompt, in all GROUP heads of the kv head.

    tiles int32[n, 2]: a prompt, and its first token of TILE in the tile. Row decode + i of `tables` and `lengths` is
    prompt i's. The rest as in `decode_part`.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    PARTS: tl.constexpr = (TILE + TOKENS - 1) // TOKENS
    WIDTH: tl.constexpr = triton.next_power_of_2(DIM)
    kv_head = tl.program_id(1)
    entry = tiles + 2 * (tl.program_id(0) // PARTS)
    prompt, tile = tl.load(entry), tl.load(entry + 1)
    start = tl.load(starts + prompt)
    count = tl.load(starts + prompt + 1) - start
    first = tile + tl.program_id(0) % PARTS * TOKENS
    last = tl.minimum(tile + TILE, count)
    if first >= last:
        return
    context = tl.load(lengths + decode + prompt)
    before = context - count
    rows, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tokens = first + rows // GROUP
    real = ((rows < TOKENS * GROUP) & (tokens < last))[:, None] & (dims < DIM)[None, :]
    flat = (start + tokens).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    queries = tl.load(q + (flat * q_row + heads * q_head)[:, None] + dims[None, :], mask=real, other=0.0)
    table = tables + (decode + prompt).to(tl.int64) * table_stride
    k += kv_head.to(tl.int64) * head_stride
    v += kv_head.to(tl.int64) * head_stride
    positions = before + tokens
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.minimum(before + first + TOKENS, context)
    if WINDOW:
        begin = tl.maximum(before + first + 1 - WINDOW, 0) // STEP * STEP
    else:  # what all queries of the tile see needs no mask
        begin = (before + first + 1) // STEP * STEP
        highest, total, mixed = attend(
            queries, highest, total, mixed, k, v, table, 0, begin, positions, context,
            block_stride, token_stride, scale, DIM, PAGE, STEP, WINDOW, False, PRECISION,
        )  # fmt: skip
    highest, total, mixed = attend(
        queries, highest, total, mixed, k, v, table, begin, end, positions, context,
        block_stride, token_stride, scale, DIM, PAGE, STEP, WINDOW, True, PRECISION,
    )  # fmt: skip
    mean = mixed / tl.where(total > 0, total, 1.0)[:, None]
    places = (flat * tl.num_programs(1) * GROUP + heads) * DIM
    tl.store(out + places[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=real)


def prompt_attention(
    q: torch.Tensor,
    kv: LayerKv,
    batch: DeviceBatch,
    out: torch.Tensor,
    scale: float,
    window: int,
    tiles: torch.Tensor,
    config: PromptConfig | None = None,
) -> None:
    """Attention of the prompt rows that `tiles` names, q [T, Hq, D] to out [T, Hq * D], on the device's stream."""
    if not len(tiles):
        return
    _, kv_heads, page, head_dim = kv.k.shape
    config = config or prompt_config(q.dtype, head_dim)
    group = q.shape[1] // kv_heads
    tile = tile_tokens(group)
    parts = triton.cdiv(tile, config.rows // group)
    with torch.cuda.device_of(q):
        prompt_tile[(tiles.shape[0] * parts, kv_heads)](
            q,
            *kv,
            out,
            batch.tables,
            batch.lengths,
            batch.starts,
            tiles,
            *q.stride()[:2],
            *kv.k.stride()[:3],
            batch.tables.stride(0),
            batch.decode,
            scale * LOG2_E,
            GROUP=group,
            DIM=head_dim,
            PAGE=page,
            TILE=tile,
            ROWS=config.rows,
            STEP=config.step,
            WINDOW=window,
            PRECISION=precision(q.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
