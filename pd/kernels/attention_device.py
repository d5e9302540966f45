"""Which kernels serve the rows of a batch on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pd.kernels.attention import DeviceBatch, Heads, LayerKv, PromptRow
from pd.kernels.attention_plan import FRESH_LENGTHS, fresh_length, tile_count, tile_tokens
from pd.kernels.attention_prefill_triton import prompt_attention
from pd.kernels.attention_triton import decode_attention

#: In order of preference.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def paged_attention(heads: Heads, kv: LayerKv, batch: DeviceBatch, scale: float, window: int) -> torch.Tensor:
    """See `pd.kernels.attention.paged_attention`. Nothing here waits for the device."""
    _check(heads, kv, batch)
    q = heads.q
    fresh = batch.fresh if _takes_fresh(q, window, batch) else ()
    if len(fresh) == 1 and fresh[0].count == len(q) == fresh_length(fresh[0]):
        return _fresh_attention(heads, fresh[0], scale).flatten(1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_attention(q, kv, batch, out, scale, window)
    if batch.tiles is not None:
        tokens = tile_tokens(q.shape[1] // kv.k.shape[1])
        tiles = batch.tiles[: len(batch.tiles) - sum(tile_count(prompt, tokens) for prompt in fresh)]
        prompt_attention(q, kv, batch, out, scale, window, tiles)
    for prompt in fresh:
        out[prompt.start : prompt.start + prompt.count] = _fresh_attention(heads, prompt, scale)[: prompt.count]
    return out.flatten(1)


def warm_fresh(heads: Heads, scale: float, most: int) -> None:
    """Have cuDNN plan for all lengths up to `most` that prompts without a prefix are served in, in this thread.

    `heads`: at least `most` tokens, in the layout of a step's.
    """
    for length in FRESH_LENGTHS:
        if length <= most:
            _fresh_attention(heads, PromptRow(0, length, length), scale)


def _takes_fresh(q: torch.Tensor, window: int, batch: DeviceBatch) -> bool:
    limited = window and any(prompt.context > window for prompt in batch.fresh)
    return q.dtype != torch.float32 and q.shape[2] <= 256 and q.shape[2] % 8 == 0 and not limited


def _fresh_attention(heads: Heads, prompt: PromptRow, scale: float) -> torch.Tensor:
    """[length, Hq, D], of which the first `count` are the prompt's."""
    length = fresh_length(prompt)
    end = prompt.start + prompt.count
    rows = [tensor[prompt.start : end] for tensor in heads]
    if length > prompt.count:
        rows = _padded(rows, length)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in rows)
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _padded(rows: Sequence[torch.Tensor], length: int) -> list[torch.Tensor]:
    """[length, ...] each, views of one tensor as they were. Zeros follow, which no query of the prompt sees.

    The batch's following rows would do, but another request's may be NaN, and a weight of 0 times NaN is NaN.
    """
    heads = [tensor.shape[1] for tensor in rows]
    fused = rows[0].new_empty(length, sum(heads), rows[0].shape[2])
    count = len(rows[0])
    for part, tensor in zip(fused[:count].split(heads, dim=1), rows, strict=True):
        part.copy_(tensor)
    fused[count:].zero_()
    return list(fused.split(heads, dim=1))


def _check(heads: Heads, kv: LayerKv, batch: DeviceBatch) -> None:
    """Raises ValueError for what the kernels cannot read."""
    if kv.k.stride() != kv.v.stride() or kv.k.stride(3) != 1:
        raise ValueError("keys and values must have the same strides, and a head's elements lie side by side")
    if any(tensor.stride(-1) != 1 for tensor in (*heads, batch.tables, batch.lengths)):
        raise ValueError("queries, keys, values, tables and lengths must be dense in their last dimension")
    if heads.q.shape[1] % kv.k.shape[1]:
        raise ValueError(f"{heads.q.shape[1]} query heads cannot share {kv.k.shape[1]} kv heads")
    if batch.prompts and (batch.tiles is None or batch.starts is None):
        raise ValueError("a batch with prompts needs their starts and tiles")
