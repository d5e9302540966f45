"""Rotary position embedding of q and k, fused with the write of k and v into their KV blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pd.kernels import reference
from pd.kernels.attention import AttentionBatch, Heads, LayerKv


class QkNorm(NamedTuple):
    """RMS norms of queries and keys over each head: weights [D]."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def rope_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions int64[T], inverse_frequencies float32[D/2] -> (cos, sin), float32[T, D/2]; once per step.

    Both are multiplied by `scale` (YaRN's attention factor).
    """
    return reference.rope_tables(positions, inverse_frequencies, scale)


def rope_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKv,
    batch: AttentionBatch,
    norm: QkNorm | None = None,
) -> Heads:
    """Normalise (with `norm`) and rotate q and k of each token, store k and v at the token's slot, return q, k and v.

    qkv [T, (Hq + 2 Hkv) * D] is the fused projection's output (q heads, k heads, v heads). It is consumed: on a GPU it
    is overwritten, and what is returned are views of it.
    Rotation is done in float32, halves apart (as in transformers' rotate_half), and stored in the cache's dtype.
    """
    return Heads(*reference.rope_write_kv(qkv, cos, sin, kv, batch, norm))
