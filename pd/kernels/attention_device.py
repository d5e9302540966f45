"""Which kernels serve the rows of a batch on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pd.kernels.attention import DeviceBatch, Heads, LayerKv, PromptRow
from pd.kernels.attention_plan import (
    FRESH_LENGTHS,
    fresh_counts,
    fresh_length,
    fresh_runs,
    tile_count,
    tile_tokens,
)
from pd.kernels.attention_prefill_triton import prompt_attention
from pd.kernels.attention_triton import decode_attention

#: In order of preference.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def paged_attention(heads: Heads, kv: LayerKv, batch: DeviceBatch, scale: float, window: int) -> torch.Tensor:
    """See `pd.kernels.attention.paged_attention`. Nothing here waits for the device."""
    _check(heads, kv, batch)
    q = heads.q
    if batch.whole and takes_fresh(q.dtype, q.shape[2]) and not 0 < window < len(q):
        return _causal(heads, 1, scale).flatten(1)
    fresh = batch.fresh if _takes_fresh(q, window, batch) else ()
    runs = fresh_runs(fresh)
    if len(runs) == 1 and sum(prompt.count for prompt in fresh) == len(q) == len(fresh) * fresh_length(fresh[0]):
        return _causal(heads, len(fresh), scale).flatten(1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_attention(q, kv, batch, out, scale, window)
    if batch.tiles is not None:
        tokens = tile_tokens(q.shape[1] // kv.k.shape[1])
        tiles = batch.tiles[: len(batch.tiles) - sum(tile_count(prompt, tokens) for prompt in fresh)]
        prompt_attention(q, kv, batch, out, scale, window, tiles)
    for run in runs:
        _fresh_attention(heads, run, scale, out)
    return out.flatten(1)


def warm_fresh(heads: Heads, scale: float, most: int) -> None:
    """Have cuDNN plan for all that prompts without a prefix are served in, in this thread, up to `most` tokens each.

    `heads`: at least as many tokens as FRESH_TOKENS and `most`, in the layout of a step's.
    """
    for length in FRESH_LENGTHS:
        for count in fresh_counts(length) if length <= most else ():
            _causal(Heads(*(tensor[: count * length] for tensor in heads)), count, scale)


def takes_fresh(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether cuDNN attends to prompts without a prefix, of those lengths that it is planned for."""
    return dtype != torch.float32 and head_dim <= 256 and head_dim % 8 == 0


def _takes_fresh(q: torch.Tensor, window: int, batch: DeviceBatch) -> bool:
    limited = window and any(prompt.context > window for prompt in batch.fresh)
    return takes_fresh(q.dtype, q.shape[2]) and not limited


def _fresh_attention(heads: Heads, run: Sequence[PromptRow], scale: float, out: torch.Tensor) -> None:
    """Of prompts side by side, all of one `fresh_length`, into their rows of `out` [T, Hq, D]."""
    length, begin, end = fresh_length(run[0]), run[0].start, run[-1].start + run[-1].count
    rows = Heads(*(tensor[begin:end] for tensor in heads))
    if end - begin == len(run) * length:
        out[begin:end] = _causal(rows, len(run), scale)
        return
    found = _causal(_padded(rows, run, length), len(run), scale)
    for index, prompt in enumerate(run):
        out[prompt.start : prompt.start + prompt.count] = found[index * length :][: prompt.count]


def _causal(heads: Heads, count: int, scale: float) -> torch.Tensor:
    """[T, Hq, D]: attention of `count` prompts of equal length, side by side, each to itself."""
    q, k, v = (tensor.unflatten(0, (count, -1)).transpose(1, 2) for tensor in heads)
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _padded(rows: Heads, run: Sequence[PromptRow], length: int) -> Heads:
    """[len(run) * length, ...] each, views of one tensor as they were. Zeros follow each prompt, and none of its

    queries sees them. The batch's following rows would do, but another request's may be NaN, and a weight of 0 times
    NaN is NaN.
    """
    heads = [tensor.shape[1] for tensor in rows]
    fused = rows.q.new_empty(len(run) * length, sum(heads), rows.q.shape[2])
    for index, prompt in enumerate(run):
        place, begin = index * length, prompt.start - run[0].start
        for part, tensor in zip(fused.split(heads, dim=1), rows, strict=True):
            part[place : place + prompt.count] = tensor[begin : begin + prompt.count]
        fused[place + prompt.count : place + length] = 0
    return Heads(*fused.split(heads, dim=1))


def _check(heads: Heads, kv: LayerKv, batch: DeviceBatch) -> None:
    """Raises ValueError for what the kernels cannot read."""
    if kv.k.dtype not in (heads.q.dtype, torch.float8_e4m3fn) or kv.k.dtype != kv.v.dtype:
        raise ValueError(f"{kv.k.dtype} keys and {kv.v.dtype} values are no cache of {heads.q.dtype}")
    if kv.k.stride() != kv.v.stride() or kv.k.stride(3) != 1:
        raise ValueError("keys and values must have the same strides, and a head's elements lie side by side")
    if any(tensor.stride(-1) != 1 for tensor in (*heads, batch.tables, batch.lengths)):
        raise ValueError("queries, keys, values, tables and lengths must be dense in their last dimension")
    if heads.q.shape[1] % kv.k.shape[1]:
        raise ValueError(f"{heads.q.shape[1]} query heads cannot share {kv.k.shape[1]} kv heads")
    if batch.prompts and (batch.tiles is None or batch.starts is None):
        raise ValueError("a batch with prompts needs their starts and tiles")
