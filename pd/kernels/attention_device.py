"""Which kernels serve the rows of a batch on a GPU."""

from __future__ import annotations

import torch

from pd.kernels import reference
from pd.kernels.attention import DeviceBatch, Heads, LayerKv
from pd.kernels.attention_triton import decode_attention


def paged_attention(heads: Heads, kv: LayerKv, batch: DeviceBatch, scale: float, window: int) -> torch.Tensor:
    """See `pd.kernels.attention.paged_attention`. Nothing here waits for the device."""
    _check(heads, kv, batch)
    if batch.prompts:
        return reference.paged_attention_device(heads, kv, batch, scale, window)
    out = torch.empty(heads.q.shape, dtype=heads.q.dtype, device=heads.q.device).flatten(1)
    decode_attention(heads.q, kv, batch, out, scale, window)
    return out


def _check(heads: Heads, kv: LayerKv, batch: DeviceBatch) -> None:
    """Raises ValueError for what the kernels cannot read."""
    if kv.k.stride() != kv.v.stride() or kv.k.stride(3) != 1:
        raise ValueError("keys and values must have the same strides, and a head's elements lie side by side")
    if any(tensor.stride(-1) != 1 for tensor in (*heads, batch.tables, batch.lengths)):
        raise ValueError("queries, keys, values, tables and lengths must be dense in their last dimension")
    if heads.q.shape[1] % kv.k.shape[1]:
        raise ValueError(f"{heads.q.shape[1]} query heads cannot share {kv.k.shape[1]} kv heads")
