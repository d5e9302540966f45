"""Rotation of queries and keys in place, after their norm, with the write of keys and values into their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from pd.kernels.fp8_triton import to_fp8
from pd.kernels.launch import launch_options

if TYPE_CHECKING:
    from pd.kernels.attention import AttentionBatch, DeviceBatch, LayerKv
    from pd.kernels.rope import QkNorm

#: Pairs (of first and second half) that a program turns: 8 heads of 128, 8 pairs per thread of two warps. So a single
#: token of 32 query and 8 kv heads is spread over six multiprocessors.
TILE = 512


# What a step brings lies packed in one buffer, so that a table begins anywhere: one compilation serves all.
@triton.jit(do_not_specialize_on_alignment=["positions"])
def rope_tables_kernel(
    positions, frequencies, cos, sin, scale, PAIRS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """cos, sin float32[T, PAIRS], contiguous. Angles are float32 and large: sine and cosine are libdevice's."""
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    seen = lanes < PAIRS
    frequency = tl.load(frequencies + lanes, mask=seen, other=0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    angle = tl.load(positions + token).to(tl.float32) * frequency
    tl.store(cos + token * PAIRS + lanes, tl.cos(angle) * scale, mask=seen)
    tl.store(sin + token * PAIRS + lanes, tl.sin(angle) * scale, mask=seen)


@triton.jit
def _store(
    cache, slot, heads, lanes, head_stride, dim_stride, first, second, seen, scale, inverse, PAIRS: tl.constexpr
):
    """Stores both halves, a one-byte cache's times `inverse`; returns what the cache has of them, in their type."""
    places = cache + slot + heads.to(tl.int64)[:, None] * head_stride + lanes[None, :] * dim_stride
    if cache.dtype.element_ty == tl.float8e4nv:
        low = to_fp8(first.to(tl.float32) * inverse)
        high = to_fp8(second.to(tl.float32) * inverse)
        tl.store(places, low, mask=seen)
        tl.store(places + PAIRS * dim_stride, high, mask=seen)
        first = (low.to(tl.float32) * scale).to(first.dtype)
        second = (high.to(tl.float32) * scale).to(second.dtype)
    else:
        tl.store(places, first.to(cache.dtype.element_ty), mask=seen)
        tl.store(places + PAIRS * dim_stride, second.to(cache.dtype.element_ty), mask=seen)
    return first, second


@triton.jit(do_not_specialize_on_alignment=["blocks", "offsets"])
def rope_write_kernel(
    qkv, scale, cos, sin, q_gain, k_gain, eps, blocks, offsets, k_cache, v_cache, stride,
    k_scale, k_inverse, v_scale, v_inverse,
    k_block, k_head, k_token, k_dim, v_block, v_head, v_token, v_dim,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """qkv [T, (Q_HEADS + 2 KV_HEADS) * 2 PAIRS], its rows `stride` apart; cos, sin [T, PAIRS], contiguous. Rows
    are first multiplied by scale float32[T], unless it is None. `k_scale` and `v_scale`, and their inverses, are those
    of one-byte caches; what such a cache has of keys and values replaces them in qkv.

    The programs of a token take HEADS heads each: of queries, then of keys, then of values. A program alone reads and
    writes its heads, and a thread holds both elements of a pair, so that rotation in place disturbs nobody.
    `k_block` and so on are the caches' strides; a cache may hold more than 2^31 elements.
    """
    q_parts: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    kv_parts: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    is_q = part < q_parts
    is_v = part >= q_parts + kv_parts
    # Which heads, counted among their own kind; and where their kind begins in the row.
    heads = (part - tl.where(is_q, 0, tl.where(is_v, q_parts + kv_parts, q_parts))) * HEADS + tl.arange(0, HEADS)
    begin = tl.where(is_q, 0, tl.where(is_v, Q_HEADS + KV_HEADS, Q_HEADS))
    rows = heads < tl.where(is_q, Q_HEADS, KV_HEADS)
    pairs = lanes[None, :] + tl.zeros([HEADS, 1], dtype=tl.int32)  # what all heads share is loaded in their layout
    seen = rows[:, None] & (pairs < PAIRS)
    if q_gain is not None:
        gains = k_gain
        if is_q:
            gains = q_gain
        first_gain = tl.load(gains + pairs, mask=seen, other=0).to(tl.float32)
        second_gain = tl.load(gains + PAIRS + pairs, mask=seen, other=0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    places = qkv + token * stride + (begin + heads)[:, None] * (2 * PAIRS) + lanes[None, :]
    first = tl.load(places, mask=seen, other=0)
    second = tl.load(places + PAIRS, mask=seen, other=0)
    if scale is not None:
        factor = tl.load(scale + token)
        first = (first.to(tl.float32) * factor).to(first.dtype)
        second = (second.to(tl.float32) * factor).to(second.dtype)
    block = tl.load(blocks + token).to(tl.int64)
    offset = tl.load(offsets + token).to(tl.int64)
    if is_v:
        slot = block * v_block + offset * v_token
        first, second = _store(
            v_cache, slot, heads, lanes, v_head, v_dim, first, second, seen, v_scale, v_inverse, PAIRS
        )
        if (scale is not None) or (v_cache.dtype.element_ty == tl.float8e4nv):
            tl.store(places, first, mask=seen)
            tl.store(places + PAIRS, second, mask=seen)
    else:
        c = tl.load(cos + token * PAIRS + pairs, mask=seen, other=0)
        s = tl.load(sin + token * PAIRS + pairs, mask=seen, other=0)
        kind = first.dtype
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        if q_gain is not None:
            unit = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * PAIRS) + eps)[:, None]
            a = (first_gain * (a * unit).to(kind).to(tl.float32)).to(kind).to(tl.float32)
            b = (second_gain * (b * unit).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        first = (a * c - b * s).to(kind)
        second = (b * c + a * s).to(kind)
        if not is_q:
            slot = block * k_block + offset * k_token
            first, second = _store(
                k_cache, slot, heads, lanes, k_head, k_dim, first, second, seen, k_scale, k_inverse, PAIRS
            )
        tl.store(places, first, mask=seen)
        tl.store(places + PAIRS, second, mask=seen)


def run_rope_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float, pdl: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions int32 or int64[T], frequencies float32[D/2], contiguous -> (cos, sin), float32[T, D/2]."""
    if not positions.is_contiguous() or frequencies.dtype != torch.float32 or not frequencies.is_contiguous():
        raise ValueError("positions and frequencies are contiguous, frequencies float32")
    tokens, pairs = len(positions), len(frequencies)
    cos, sin = torch.empty((2, tokens, pairs), dtype=torch.float32, device=positions.device)
    block = triton.next_power_of_2(pairs)
    with torch.cuda.device_of(positions):
        rope_tables_kernel[(tokens,)](
            positions, frequencies, cos, sin, scale, PAIRS=pairs, BLOCK=block, **launch_options(1, pdl=pdl)
        )
    return cos, sin


def run_rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKv,
    batch: AttentionBatch | DeviceBatch,
    norm: QkNorm | None,
    pdl: bool,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `pd.kernels.rope.rope_write_kv`: rotates in `qkv` and returns q, k, v as views of it.

    Rows of qkv may be any distance apart, their elements are neighbours; slots are int32 or int64. Else ValueError.
    """
    kv_heads, head_dim = kv.k.shape[1], kv.k.shape[3]
    tokens, width = qkv.shape
    q_heads, pairs = width // head_dim - 2 * kv_heads, head_dim // 2
    _check(qkv, cos, sin, kv, batch, norm)
    block, heads, warps = tile(q_heads, pairs)
    parts = triton.cdiv(q_heads, heads) + 2 * triton.cdiv(kv_heads, heads)
    gains = (None, None, 0.0) if norm is None else (norm.q, norm.k, norm.eps)
    shape = {"Q_HEADS": q_heads, "KV_HEADS": kv_heads, "PAIRS": pairs, "BLOCK": block, "HEADS": heads}
    with torch.cuda.device_of(qkv):
        rope_write_kernel[(tokens, parts)](
            qkv, scale, cos, sin, *gains, batch.blocks, batch.offsets, kv.k, kv.v, qkv.stride(0),
            kv.k_scale, 1 / kv.k_scale, kv.v_scale, 1 / kv.v_scale,
            *kv.k.stride(), *kv.v.stride(), **shape, **launch_options(warps, pdl=pdl),
        )  # fmt: skip
    whole = qkv.unflatten(1, (-1, head_dim))
    return whole[:, :q_heads], whole[:, q_heads : q_heads + kv_heads], whole[:, q_heads + kv_heads :]


def tile(q_heads: int, pairs: int) -> tuple[int, int, int]:
    """Pairs (padded) of each head, heads and warps of a program: a thread has 8 pairs, so none is in two threads."""
    block = triton.next_power_of_2(pairs)
    heads = min(max(TILE // block, 1), triton.next_power_of_2(q_heads))
    return block, heads, max(heads * block // 256, 1)


def _check(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKv,
    batch: AttentionBatch | DeviceBatch,
    norm: QkNorm | None,
) -> None:
    tokens, width = qkv.shape
    kv_heads, head_dim = kv.k.shape[1], kv.k.shape[3]
    if head_dim % 2 or width % head_dim or width <= 2 * kv_heads * head_dim or qkv.stride(1) != 1:
        raise ValueError(f"qkv is [T, (Hq + 2 * {kv_heads}) * {head_dim}] with contiguous rows")
    if kv.v.shape != kv.k.shape or kv.v.dtype != kv.k.dtype:
        raise ValueError("the caches of keys and values have the same shape and type")
    for table in (cos, sin):
        if table.shape != (tokens, head_dim // 2) or not table.is_contiguous():
            raise ValueError(f"cos and sin are contiguous, [{tokens}, {head_dim // 2}]")
    for slots in (batch.blocks, batch.offsets):
        if slots.shape != (tokens,) or not slots.is_contiguous():
            raise ValueError(f"blocks and offsets are contiguous, [{tokens}]")
    for gain in () if norm is None else (norm.q, norm.k):
        if gain.shape != (head_dim,) or gain.dtype != qkv.dtype or not gain.is_contiguous():
            raise ValueError(f"norms of queries and keys are contiguous, [{head_dim}], of qkv's dtype")
