"""Decode attention over paged KV: split along the context (flash-decoding), with the parts put together afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from pd.kernels.attention import DeviceBatch, LayerKv
from pd.kernels.attention_plan import Split, decode_split
from pd.kernels.fp8_triton import first_of_pairs, second_of_pairs

#: Parts that are combined at a time.
CHUNK = 8

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodeConfig:
    """`step`: tokens that a program reads at a time."""

    step: int = 64
    warps: int = 4
    stages: int = 3


def decode_config(dtype: torch.dtype, head_dim: int, fp8: bool = False) -> DecodeConfig:
    """For queries of `dtype`; `fp8`: the cache has one byte an element.

    What leaves a Hopper room for five programs on a multiprocessor, or spills no registers where that is too much.

    The two loads of a step depend on the table's, so three stages are one step's keys and values ahead, in one buffer
    each: programs beside each other hide what latency is left.
    """
    if dtype == torch.float32:
        return DecodeConfig(step=16, warps=8, stages=1) if fp8 else DecodeConfig(step=16, stages=2)
    return DecodeConfig() if head_dim <= 128 else DecodeConfig(step=32)


@triton.jit
def kv_blocks(table, tokens, seen, PAGE: tl.constexpr):
    """Ids of the blocks that hold these positions; 0 where `seen` (None: everywhere) is false."""
    if seen is None:
        ids = tl.load(table + tokens // PAGE)
    else:
        ids = tl.load(table + tokens // PAGE, mask=seen, other=0)
    return ids.to(tl.int64)


@triton.jit
def kv_tile(cache, ids, tokens, seen, block_stride, token_stride, PAGE: tl.constexpr, DIM: tl.constexpr):
    """[tokens, D] of one head (`cache` points to it), D being DIM rounded up to a power of two.

    Where `seen` is false nothing is read and all is 0: what lies beyond a row's tokens may be NaN. None is true.
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(DIM)
    dims = tl.arange(0, WIDTH)
    places = cache + ids * block_stride + (tokens % PAGE) * token_stride
    pointers = places[:, None] + dims[None, :]
    if seen is None and DIM == WIDTH:
        tile = tl.load(pointers)
    elif seen is None:
        tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    elif DIM == WIDTH:
        tile = tl.load(pointers, mask=seen[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=seen[:, None] & (dims < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def part_steps(low, end, split, splits, least, STEP: tl.constexpr):
    """The share of one of `splits` programs in the tokens from `low` to `end`, in steps: (first, end, parts).

    They are divided evenly into as many parts as have `least` steps each, or `splits` if that is fewer; none if there
    are no tokens.
    """
    first = low // STEP
    steps = tl.maximum(tl.cdiv(end, STEP) - first, 0)
    parts = tl.minimum(tl.cdiv(steps, least), splits)
    divisor = tl.maximum(parts, 1)
    return first + split * steps // divisor, first + (split + 1) * steps // divisor, parts


@triton.jit
def first_seen(length, WINDOW: tl.constexpr):
    """The first of `length` tokens that the last one sees."""
    low = 0
    if WINDOW:
        low = tl.maximum(length - WINDOW, 0)
    return low


@triton.jit
def combine(out, partial, scales, place, parts, splits, GROUP: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """The mean of the `parts` of `place` (row * kv heads + kv head), each weighted with its sum of exponentials."""
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    WIDTH: tl.constexpr = triton.next_power_of_2(DIM)
    members, dims = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    inside = (members < GROUP)[:, None] & (dims < DIM)[None, :]
    inner = members[:, None] * DIM + dims[None, :]
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, WIDTH], tl.float32)
    for begin in range(0, parts, CHUNK):
        for part in tl.static_range(CHUNK):  # all of a chunk's loads are under way before the first is waited for
            index = place * splits + begin + part
            real = (begin + part + tl.zeros_like(members) < parts) & (members < GROUP)
            # Other multiprocessors wrote these: not from this one's own cache.
            scale = tl.load(
                scales + index * GROUP + members,
                mask=real,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            mean = tl.load(
                partial + index * (GROUP * DIM) + inner, mask=real[:, None] & inside, other=0.0, cache_modifier=".cg"
            )
            higher = tl.where(members < GROUP, tl.maximum(highest, scale), 0.0)
            weight = tl.exp2(scale - higher)
            faded = tl.exp2(highest - higher)
            total = total * faded + weight
            mixed = mixed * faded[:, None] + mean * weight[:, None]
            highest = higher
    mean = mixed / tl.where(members < GROUP, total, 1.0)[:, None]
    tl.store(out + place * (GROUP * DIM) + inner, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["table_stride", "least"], do_not_specialize_on_alignment=["tables", "lengths", "arrivals"]
)
def decode_part(
    q,
    k,
    v,
    out,
    partial,
    scales,
    arrivals,
    tables,
    lengths,
    q_row,
    q_head,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    scale,
    v_scale,
    least,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (row, kv head, split): all query heads of the kv head over the split's steps of the row's context.

    q [rows, Hq, DIM], k and v [blocks, kv heads, PAGE, DIM] of equal strides, tables int32[rows, …], lengths
    int32[rows]. A row with one part (or none: zeros) is written to out [rows, Hq, DIM]; otherwise each part's mean goes
    to partial float32 [rows, kv heads, splits, GROUP, DIM] and log2 of its sum of exponentials to scales, without DIM.
    With arrivals int32[rows, kv heads], which is zero before and afterwards, the last part to come combines them all.
    `scale` is multiplied by log2(e).

    One-byte keys and values are multiplied as float16, which holds them exactly and in one instruction for two;
    queries are scaled before, so that they do not leave its range. The matrix unit's values have two tokens of one
    dimension in a register: 16-bit words are turned so on their way out of shared memory, bytes one by one. So values
    are read as words of two dimensions, and those are multiplied one after the other. `v_scale` is theirs; `scale`
    has the keys' in it.
    """
    EIGHT: tl.constexpr = k.dtype.element_ty == tl.float8e4nv
    KIND: tl.constexpr = tl.float32 if PRECISION == "ieee" else tl.float16
    HEADS: tl.constexpr = max(16, triton.next_power_of_2(GROUP))
    WIDTH: tl.constexpr = triton.next_power_of_2(DIM)
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    low = first_seen(length, WINDOW)
    begin, end, parts = part_steps(low, length, split, tl.num_programs(2), least, STEP)
    if split >= tl.maximum(parts, 1):
        return
    members, dims = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    real = (members < GROUP)[:, None] & (dims < DIM)[None, :]
    heads = (kv_head * GROUP + members)[:, None]
    queries = tl.load(q + row.to(tl.int64) * q_row + heads * q_head + dims[None, :], mask=real, other=0.0)
    table = tables + row.to(tl.int64) * table_stride
    k += kv_head.to(tl.int64) * head_stride
    v += kv_head.to(tl.int64) * head_stride
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    if EIGHT:
        queries = (queries.to(tl.float32) * scale).to(KIND)
        pairs = v.to(tl.pointer_type(tl.int16), bitcast=True)
        mixed = tl.zeros([HEADS, WIDTH // 2], tl.float32)
        others = tl.zeros([HEADS, WIDTH // 2], tl.float32)
    else:
        mixed = tl.zeros([HEADS, WIDTH], tl.float32)
    for step in range(begin, end):
        tokens = step * STEP + tl.arange(0, STEP)
        seen = tokens < length
        if WINDOW:
            seen &= tokens >= low
        ids = kv_blocks(table, tokens, seen, PAGE)
        keys = kv_tile(k, ids, tokens, seen, block_stride, token_stride, PAGE, DIM)
        if EIGHT:
            scores = tl.dot(queries, tl.trans(keys.to(KIND)), input_precision=PRECISION)
        else:
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))  # finite: every step has a token that is seen
        weights = tl.exp2(scores - higher[:, None])
        faded = tl.exp2(highest - higher)
        total = total * faded + tl.sum(weights, 1)
        if EIGHT:
            weights = weights.to(KIND)
            words = kv_tile(pairs, ids, tokens, seen, block_stride // 2, token_stride // 2, PAGE, DIM // 2)
            first, second = first_of_pairs(words, KIND), second_of_pairs(words, KIND)
            mixed = tl.dot(weights, first, mixed * faded[:, None], input_precision=PRECISION)
            others = tl.dot(weights, second, others * faded[:, None], input_precision=PRECISION)
        else:
            values = kv_tile(v, ids, tokens, seen, block_stride, token_stride, PAGE, DIM)
            mixed = tl.dot(weights.to(values.dtype), values, mixed * faded[:, None], input_precision=PRECISION)
        highest = higher
    if EIGHT:
        mixed = tl.interleave(mixed, others) * v_scale
    mean = mixed / tl.where(total > 0, total, 1.0)[:, None]
    place = row.to(tl.int64) * tl.num_programs(1) + kv_head
    inner = members[:, None] * DIM + dims[None, :]
    if parts <= 1:
        tl.store(out + place * (GROUP * DIM) + inner, mean.to(out.dtype.element_ty), mask=real)
    elif partial is not None:
        part = place * tl.num_programs(2) + split
        tl.store(partial + part * (GROUP * DIM) + inner, mean, mask=real)
        tl.store(scales + part * GROUP + members, highest + tl.log2(total), mask=members < GROUP)
        if arrivals is not None:
            tl.debug_barrier()  # the whole program has stored its part before one thread of it says so
            if tl.atomic_add(arrivals + place, 1, sem="acq_rel") == parts - 1:
                tl.store(arrivals + place, 0)
                combine(out, partial, scales, place, parts, tl.num_programs(2), GROUP, DIM, CHUNK)


@triton.jit(do_not_specialize=["splits", "least"], do_not_specialize_on_alignment=["lengths"])
def combine_parts(
    out,
    partial,
    scales,
    lengths,
    splits,
    least,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (row, kv head): puts together what `decode_part` left, without arrivals."""
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    _, _, parts = part_steps(first_seen(length, WINDOW), length, 0, splits, least, STEP)
    if parts > 1:
        place = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        combine(out, partial, scales, place, parts, splits, GROUP, DIM, CHUNK)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; where Triton interprets, an H200's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: a float32 is not to be rounded to TF32. Elsewhere it makes no difference."""
    return "ieee" if dtype == torch.float32 else "tf32"


def decode_attention(
    q: torch.Tensor,
    kv: LayerKv,
    batch: DeviceBatch,
    out: torch.Tensor,
    scale: float,
    window: int,
    split: Split | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of the batch's decode rows, q [T, Hq, D] to out [T, Hq * D], on the current stream of their device.

    `split` and `config` are chosen here by default. What is launched depends on shapes only, so it can be captured.
    """
    rows, (_, kv_heads, page, head_dim) = batch.decode, kv.k.shape
    if not rows:
        return
    config = config or decode_config(q.dtype, head_dim, kv.k.itemsize == 1)
    split = split or decode_split(rows, kv_heads, processors(q.device))
    partial = scales = arrivals = None
    if split.parts > 1:
        partial = torch.empty(rows, q.shape[1], split.parts, head_dim, dtype=torch.float32, device=q.device)
        scales = torch.empty(rows, q.shape[1], split.parts, dtype=torch.float32, device=q.device)
        arrivals = batch.arrivals
    least = max(1, split.least // config.step)
    shape = {
        "GROUP": q.shape[1] // kv_heads,
        "DIM": head_dim,
        "STEP": config.step,
        "WINDOW": window,
        "CHUNK": CHUNK,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(q):
        decode_part[(rows, kv_heads, split.parts)](
            q,
            kv.k,
            kv.v,
            out,
            partial,
            scales,
            arrivals,
            batch.tables,
            batch.lengths,
            *q.stride()[:2],
            *kv.k.stride()[:3],
            batch.tables.stride(0),
            scale * kv.k_scale * LOG2_E,
            kv.v_scale,
            least,
            PAGE=page,
            PRECISION=precision(q.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
            **shape,
        )
        if split.parts > 1 and arrivals is None:
            combine_parts[(rows, kv_heads)](
                out, partial, scales, batch.lengths, split.parts, least, num_warps=4, **shape
            )
