"""Every op in plain torch. What a device kernel is tested against, and the implementation on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pd.kernels.attention import AttentionBatch, DecodeGroup, LayerKv, PromptSpan

#: Most float32 scores that one tile of prompt attention materialises: 4 MiB stay in the cache (measured: twice as fast
#: as one tile of 32 MiB, and as fast as torch's fused attention).
_SCORES_PER_TILE = 1 << 20


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual += x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope_tables(positions: torch.Tensor, inverse_frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions.float()[:, None] * inverse_frequencies
    return angles.cos(), angles.sin()


def rope_write_kv(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: LayerKv, batch: AttentionBatch
) -> torch.Tensor:
    tokens = qkv.shape[0]
    kv_heads, head_dim = kv.k.shape[1], kv.k.shape[3]
    heads = qkv.view(tokens, -1, head_dim)
    v = heads[:, -kv_heads:]
    first, second = heads[:, :-kv_heads].float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    kv.k[batch.blocks, :, batch.offsets] = rotated[:, -kv_heads:]
    kv.v[batch.blocks, :, batch.offsets] = v
    return rotated[:, :-kv_heads]


def paged_attention(q: torch.Tensor, kv: LayerKv, batch: AttentionBatch, scale: float) -> torch.Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in batch.decode:
        out[group.rows] = _decode(q[group.rows], kv, group, scale).to(q.dtype)
    for span in batch.prompts:
        _prompt(q[span.start : span.start + span.count], out[span.start : span.start + span.count], kv, span, scale)
    return out.flatten(1)


def _gather(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """cache [N, H, T, D], tables [B, n] -> contiguous [B, H, n * T, D].

    One (block, head) is one contiguous run of T * D elements, so the pool is seen as rows of that many elements and
    whole rows are copied: five times as fast as indexing the strided view.
    """
    heads, tokens, head_dim = cache.shape[1:]
    run = tokens * head_dim
    stride = cache.stride(1)
    if cache.stride()[2:] != (head_dim, 1) or cache.stride(0) != heads * stride or stride % run:
        return cache[tables].transpose(1, 2).flatten(2, 3)
    step = stride // run
    rows = cache.as_strided(((cache.shape[0] * heads - 1) * step + 1, run), (run, 1))
    index = (tables[:, None, :] * heads + torch.arange(heads, device=tables.device)[None, :, None]) * step
    return rows.index_select(0, index.flatten()).view(tables.shape[0], heads, -1, head_dim)


def _decode(q: torch.Tensor, kv: LayerKv, group: DecodeGroup, scale: float) -> torch.Tensor:
    """q [B, Hq, D] -> float32 [B, Hq, D]."""
    k, v = _gather(kv.k, group.tables).float(), _gather(kv.v, group.tables).float()
    rows, kv_heads, length, head_dim = k.shape
    grouped = (q.float() * scale).reshape(rows, kv_heads, -1, head_dim)
    beyond = torch.arange(length, device=q.device)[None] >= group.lengths[:, None]
    scores = (grouped @ k.transpose(2, 3)).masked_fill_(beyond[:, None, None], float("-inf"))
    weights = scores.softmax(-1)
    out = weights @ v
    if out.isnan().any():  # 0 * NaN: what lies beyond a row's tokens may be anything. Rare, so cleared only then.
        out = weights @ v.masked_fill(beyond[:, None, :, None], 0.0)
    return out.reshape(q.shape)


def _prompt(q: torch.Tensor, out: torch.Tensor, kv: LayerKv, span: PromptSpan, scale: float) -> None:
    """q, out [n, Hq, D]: the last n of the span's `context` tokens, tile by tile of queries."""
    table = span.table[None]
    k = _gather(kv.k, table)[0, :, : span.context].float()
    v = _gather(kv.v, table)[0, :, : span.context].float()
    kv_heads, _, head_dim = k.shape
    count, heads = q.shape[:2]
    tile = max(1, _SCORES_PER_TILE // (heads * span.context))
    for begin in range(0, count, tile):
        size = min(tile, count - begin)
        end = span.context - count + begin + size  # keys that this tile's last query sees
        part = q[begin : begin + size].float() * scale
        part = part.view(size, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        scores = (part @ k[:, :end].transpose(1, 2)).view(kv_heads, -1, size, end)
        later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)
        scores[..., end - size :].masked_fill_(later, float("-inf"))
        mixed = scores.softmax(-1).view(kv_heads, -1, end) @ v[:, :end]
        mixed = mixed.view(kv_heads, -1, size, head_dim).permute(2, 0, 1, 3)
        out[begin : begin + size] = mixed.reshape(size, heads, head_dim).to(out.dtype)
