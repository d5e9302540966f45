"""Attention of prompt rows over paged KV: tiles of queries against the whole context (FlashAttention-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pd.kernels.attention import DeviceBatch, LayerKv
from pd.kernels.attention_plan import TILE_ROWS, Split, prompt_split, tile_tokens
from pd.kernels.attention_triton import LOG2_E, first_seen, kv_blocks, kv_tile, part_steps, precision, processors

#: Rows of a tile that a program combines.
SLICE = 16


@dataclass(frozen=True)
class PromptConfig:
    """`rows` (queries x heads of a group) of a program are compared with `step` keys at a time."""

    rows: int = TILE_ROWS
    step: int = 64
    warps: int = 8
    stages: int = 5


def prompt_config(dtype: torch.dtype, head_dim: int, fp8: bool = False) -> PromptConfig:
    """For queries of `dtype`; `fp8`: the cache has one byte an element.

    What spills no registers on a Hopper and fits its shared memory.

    Keys and values wait for the table's entries, which five stages read two steps before these and four before use.
    """
    if dtype == torch.float32:
        return PromptConfig(rows=32, step=16, warps=4, stages=1)
    return PromptConfig() if head_dim <= 128 else PromptConfig(step=16 if fp8 else 32, stages=3)


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

    Unless MASKED all queries see all of them; otherwise some may have seen none so far. One-byte keys and values are
    multiplied as float16, see `decode_part`.
    """
    for first in range(begin, end, STEP):
        keys = first + tl.arange(0, STEP)
        if MASKED:
            real = keys < end
        else:
            real = None
        ids = kv_blocks(table, keys, real, PAGE)
        tile = kv_tile(k, ids, keys, real, block_stride, token_stride, PAGE, DIM)
        scores = tl.dot(queries, tl.trans(tile.to(queries.dtype)), input_precision=PRECISION)
        if MASKED:
            seen = keys[None, :] <= positions[:, None]
            if WINDOW:
                seen &= keys[None, :] > positions[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        base = higher
        if MASKED:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - base[:, None])
        faded = tl.exp2(highest - base)
        total = total * faded + tl.sum(weights, 1)
        tile = kv_tile(v, ids, keys, real, block_stride, token_stride, PAGE, DIM)
        tile = tile.to(queries.dtype)
        mixed = tl.dot(weights.to(tile.dtype), tile, mixed * faded[:, None], input_precision=PRECISION)
        highest = higher
    return highest, total, mixed


@triton.jit
def tile_span(
    tiles,
    starts,
    lengths,
    decode,
    part,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """What `part` of the tiles, each divided into parts of TOKENS tokens, has to do.

    Returns (prompt, its first flat row, its tokens before this step, the part's first token, its end, the first key
    that any of its queries sees, the end of these).
    """
    PARTS: tl.constexpr = (TILE + TOKENS - 1) // TOKENS
    entry = tiles + 2 * (part // PARTS)
    prompt, tile = tl.load(entry), tl.load(entry + 1)
    start = tl.load(starts + prompt)
    count = tl.load(starts + prompt + 1) - start
    before = tl.load(lengths + decode + prompt) - count
    first = tile + part % PARTS * TOKENS
    last = tl.minimum(tl.minimum(tile + TILE, first + TOKENS), count)
    return prompt, start, before, first, last, first_seen(before + first + 1, WINDOW), before + last


@triton.jit(
    do_not_specialize=["table_stride", "decode", "least"],
    do_not_specialize_on_alignment=["tables", "lengths", "starts", "tiles"],
)
def prompt_tile(
    q,
    k,
    v,
    out,
    partial,
    scales,
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
    v_scale,
    least,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (part of a tile, kv head, split): ROWS // GROUP queries of one prompt, in all GROUP heads of the kv head.

    tiles int32[n, 2]: a prompt, and its first token of TILE in the tile. Row decode + i of `tables` and `lengths` is
    prompt i's. With partial float32 [programs, ROWS, DIM] and scales, without DIM, keys are divided as in
    `decode_part`, whose rules hold for the rest too.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    WIDTH: tl.constexpr = triton.next_power_of_2(DIM)
    kv_head = tl.program_id(1)
    prompt, start, before, first, last, low, end = tile_span(
        tiles, starts, lengths, decode, tl.program_id(0), TILE, TOKENS, WINDOW
    )
    begin, stop, parts = part_steps(low, end, tl.program_id(2), tl.num_programs(2), least, STEP)
    if (first >= last) | (tl.program_id(2) >= parts):
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tokens = first + rows // GROUP
    real = ((rows < TOKENS * GROUP) & (tokens < last))[:, None] & (dims < DIM)[None, :]
    flat = (start + tokens).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    queries = tl.load(q + (flat * q_row + heads * q_head)[:, None] + dims[None, :], mask=real, other=0.0)
    if k.dtype.element_ty == tl.float8e4nv:
        KIND: tl.constexpr = tl.float32 if PRECISION == "ieee" else tl.float16
        queries = (queries.to(tl.float32) * scale).to(KIND)
        scale = 1.0
    table = tables + (decode + prompt).to(tl.int64) * table_stride
    k += kv_head.to(tl.int64) * head_stride
    v += kv_head.to(tl.int64) * head_stride
    positions = before + tokens
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    begin *= STEP
    stop = tl.minimum(stop * STEP, end)
    if not WINDOW:  # what all queries of the tile see needs no mask
        whole = tl.minimum((before + first + 1) // STEP * STEP, stop)
        highest, total, mixed = attend(
            queries, highest, total, mixed, k, v, table, begin, whole, positions,
            block_stride, token_stride, scale, DIM, PAGE, STEP, WINDOW, False, PRECISION,
        )  # fmt: skip
        begin = tl.maximum(begin, whole)
    highest, total, mixed = attend(
        queries, highest, total, mixed, k, v, table, begin, stop, positions,
        block_stride, token_stride, scale, DIM, PAGE, STEP, WINDOW, True, PRECISION,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # of a query that sees none of the keys; its highest score is -inf
    mean = mixed / total[:, None]
    if k.dtype.element_ty == tl.float8e4nv:
        mean *= v_scale
    if parts <= 1:
        places = (flat * tl.num_programs(1) * GROUP + heads) * DIM
        tl.store(out + places[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=real)
    elif partial is not None:
        place = (tl.program_id(0) * tl.num_programs(1) + kv_head) * tl.num_programs(2) + tl.program_id(2)
        index = place.to(tl.int64) * ROWS + rows
        tl.store(partial + index[:, None] * DIM + dims[None, :], mean, mask=real)
        tl.store(scales + index, highest + tl.log2(total))


@triton.jit(
    do_not_specialize=["decode", "splits", "least"], do_not_specialize_on_alignment=["lengths", "starts", "tiles"]
)
def combine_tile(
    out,
    partial,
    scales,
    lengths,
    starts,
    tiles,
    decode,
    splits,
    least,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Program (part of a tile, kv head, SLICE of its rows): puts together what `prompt_tile` left of divided keys."""
    TOKENS: tl.constexpr = ROWS // GROUP
    WIDTH: tl.constexpr = triton.next_power_of_2(DIM)
    _, start, _, first, last, low, end = tile_span(
        tiles, starts, lengths, decode, tl.program_id(0), TILE, TOKENS, WINDOW
    )
    _, _, parts = part_steps(low, end, 0, splits, least, STEP)
    if (first >= last) | (parts <= 1):
        return
    rows, dims = tl.program_id(2) * SLICE + tl.arange(0, SLICE), tl.arange(0, WIDTH)
    tokens = first + rows // GROUP
    real = ((rows < TOKENS * GROUP) & (tokens < last))[:, None] & (dims < DIM)[None, :]
    place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * splits
    highest = tl.full([SLICE], float("-inf"), tl.float32)
    total = tl.zeros([SLICE], tl.float32)
    mixed = tl.zeros([SLICE, WIDTH], tl.float32)
    for part in range(parts):
        index = (place + part) * ROWS + rows
        scale = tl.load(scales + index)
        mean = tl.load(partial + index[:, None] * DIM + dims[None, :], mask=real, other=0.0)
        higher = tl.maximum(highest, scale)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a window may leave a query nothing in the first parts
        weight = tl.exp2(scale - base)
        faded = tl.exp2(highest - base)
        total = total * faded + weight
        mixed = mixed * faded[:, None] + mean * weight[:, None]
        highest = higher
    mean = mixed / tl.where(total > 0, total, 1.0)[:, None]
    heads = tl.program_id(1) * GROUP + rows % GROUP
    places = ((start + tokens).to(tl.int64) * tl.num_programs(1) * GROUP + heads) * DIM
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
    split: Split | None = None,
) -> None:
    """Attention of the prompt rows that `tiles` names, q [T, Hq, D] to out [T, Hq * D], on the device's stream."""
    if not len(tiles):
        return
    _, kv_heads, page, head_dim = kv.k.shape
    config = config or prompt_config(q.dtype, head_dim, kv.k.itemsize == 1)
    group = q.shape[1] // kv_heads
    tile = tile_tokens(group)
    programs = len(tiles) * triton.cdiv(tile, config.rows // group)
    split = split or prompt_split(programs, kv_heads, processors(q.device))
    least = max(1, split.least // config.step)
    partial = scales = None
    if split.parts > 1:
        shape = (programs, kv_heads, split.parts, config.rows)
        partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        scales = torch.empty(shape, dtype=torch.float32, device=q.device)
    constants = {
        "GROUP": group,
        "DIM": head_dim,
        "TILE": tile,
        "ROWS": config.rows,
        "STEP": config.step,
        "WINDOW": window,
        "num_warps": config.warps,
        "enable_fp_fusion": True,
    }
    described = (batch.lengths, batch.starts, tiles)
    with torch.cuda.device_of(q):
        prompt_tile[(programs, kv_heads, split.parts)](
            q,
            kv.k,
            kv.v,
            out,
            partial,
            scales,
            batch.tables,
            *described,
            *q.stride()[:2],
            *kv.k.stride()[:3],
            batch.tables.stride(0),
            batch.decode,
            scale * kv.k_scale * LOG2_E,
            kv.v_scale,
            least,
            PAGE=page,
            PRECISION=precision(q.dtype),
            num_stages=config.stages,
            **constants,
        )
        if split.parts > 1:
            combine_tile[(programs, kv_heads, config.rows // SLICE)](
                out, partial, scales, *described, batch.decode, split.parts, least, SLICE=SLICE, **constants
            )
