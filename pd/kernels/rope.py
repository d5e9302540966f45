"""Rotary position embedding of q and k, fused with the write of k and v into their KV blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pd.kernels import reference
from pd.kernels.attention import AttentionBatch, DeviceBatch, Heads, LayerKv
from pd.kernels.launch import pdl_supported


class QkNorm(NamedTuple):
    """RMS norms of queries and keys over each head: weights [D]."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def rope_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions int32 or int64[T], inverse_frequencies float32[D/2] -> (cos, sin), float32[T, D/2]; once per step.

    Both are multiplied by `scale` (YaRN's attention factor).
    """
    if not positions.is_cuda:
        return reference.rope_tables(positions, inverse_frequencies, scale)
    from pd.kernels.rope_triton import run_rope_tables

    return run_rope_tables(positions, inverse_frequencies, scale, pdl_supported(positions.device))


def rope_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKv,
    batch: AttentionBatch | DeviceBatch,
    norm: QkNorm | None = None,
    scale: torch.Tensor | None = None,
) -> Heads:
    """Normalise (with `norm`) and rotate q and k of each token, store k and v at the token's slot, return q, k and v.

    qkv [T, (Hq + 2 Hkv) * D] is the fused projection's output (q heads, k heads, v heads). It is consumed: on a GPU it
    is overwritten, and what is returned are views of it. With `scale` float32[T] each row is first multiplied by it.
    Rotation is done in float32, halves apart (as in transformers' rotate_half), and stored in the cache's dtype.
    """
    if not qkv.is_cuda:
        return Heads(*reference.rope_write_kv(qkv, cos, sin, kv, batch, norm, scale))
    from pd.kernels.rope_triton import run_rope_write

    return Heads(*run_rope_write(qkv, cos, sin, kv, batch, norm, pdl_supported(qkv.device), scale))
