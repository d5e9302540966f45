"""Every op in plain torch. What a device kernel is tested against, and the implementation on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pd.kernels.sampling_device import DeviceSampling

if TYPE_CHECKING:
    from pd.kernels.attention import AttentionBatch, DecodeGroup, DeviceBatch, Heads, LayerKv
    from pd.kernels.rope import QkNorm
    from pd.kernels.spans import I64
    from pd.kernels.step_rows import SlotState, StepRows

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

#: Most float32 scores that one tile of prompt attention materialises: 4 MiB stay in the cache (measured: twice as fast
#: as one tile of 32 MiB, and as fast as torch's fused attention).
_SCORES_PER_TILE = 1 << 20


def rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.float().square().mean(-1) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    normed = (x.float() * rms_scale(x, eps)[..., None]).to(x.dtype)
    return normed if weight is None else weight * normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual += x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = scaled(gate_up, scale).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def scaled(rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return rows if scale is None else (rows.float() * scale[:, None]).to(rows.dtype)


def rope_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions.float()[:, None] * inverse_frequencies
    return angles.cos() * scale, angles.sin() * scale


def rope_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: LayerKv,
    batch: AttentionBatch | DeviceBatch,
    norm: QkNorm | None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = qkv.shape[0]
    kv_heads, head_dim = kv.k.shape[1], kv.k.shape[3]
    heads = scaled(qkv, scale).view(tokens, -1, head_dim)
    v = heads[:, -kv_heads:]
    qk = heads[:, :-kv_heads]
    if norm is not None:
        q, k = qk[:, :-kv_heads], qk[:, -kv_heads:]
        qk = torch.cat((rms_norm(q, norm.q, norm.eps), rms_norm(k, norm.k, norm.eps)), dim=1)
    first, second = qk.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    q, k = rotated[:, :-kv_heads], rotated[:, -kv_heads:]
    return q, _write(kv.k, k, batch, kv.k_scale), _write(kv.v, v, batch, kv.v_scale)


def _write(cache: torch.Tensor, heads: torch.Tensor, batch: AttentionBatch | DeviceBatch, scale: float) -> torch.Tensor:
    """Store heads [T, H, D] at the tokens' slots; returns what the cache has of them, in their own type."""
    if cache.dtype != FP8:
        cache[batch.blocks, :, batch.offsets] = heads
        return heads
    stored = to_fp8(heads.float() * (1 / scale))
    as_bytes(cache)[batch.blocks, :, batch.offsets] = as_bytes(stored)
    return (stored.float() * scale).to(heads.dtype)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """To nearest even; what is larger than 448 becomes 448, NaN remains. torch's own cast differs there by version."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """A view in a type that torch can index, copy and compare on every device."""
    return values.view(torch.uint8) if values.dtype == FP8 else values


def paged_attention(q: torch.Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int) -> torch.Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in batch.decode:
        out[group.rows] = _decode(q[group.rows], kv, group, scale, window).to(q.dtype)
    for span in batch.prompts:
        part = slice(span.start, span.start + span.count)
        _prompt(q[part], out[part], kv, span.table, span.context, scale, window)
    return out.flatten(1)


def paged_attention_device(heads: Heads, kv: LayerKv, batch: DeviceBatch, scale: float, window: int) -> torch.Tensor:
    """Of any device's batch, row by row. Waits for the device (the rows' lengths), so it cannot be captured."""
    q, tables, lengths = heads.q, batch.tables.long(), batch.lengths.tolist()
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    rows = [(row, 1, lengths[row]) for row in range(batch.decode)]
    rows += [(prompt.start, prompt.count, prompt.context) for prompt in batch.prompts]
    for table, (start, count, context) in zip(tables, rows, strict=True):
        if context:
            part = slice(start, start + count)
            _prompt(q[part], out[part], kv, table[: -(-context // kv.k.shape[2])], context, scale, window)
    return out.flatten(1)


def _read(cache: torch.Tensor, tables: torch.Tensor, scale: float) -> torch.Tensor:
    """cache [N, H, T, D], tables [B, n] -> what is there, float32 [B, H, n * T, D]."""
    values = _gather(cache, tables).float()
    return values if scale == 1 else values * scale


def _gather(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """cache [N, H, T, D], tables [B, n] -> contiguous [B, H, n * T, D].

    One (block, head) is one contiguous run of T * D elements, so the pool is seen as rows of that many elements and
    whole rows are copied: five times as fast as indexing the strided view.
    """
    heads, tokens, head_dim = cache.shape[1:]
    run = tokens * head_dim
    stride = cache.stride(1)
    kind, cache = cache.dtype, as_bytes(cache)
    if cache.stride()[2:] != (head_dim, 1) or cache.stride(0) != heads * stride or stride % run:
        return cache[tables].transpose(1, 2).flatten(2, 3).view(kind)
    step = stride // run
    rows = cache.as_strided(((cache.shape[0] * heads - 1) * step + 1, run), (run, 1))
    index = (tables[:, None, :] * heads + torch.arange(heads, device=tables.device)[None, :, None]) * step
    return rows.index_select(0, index.flatten()).view(kind).view(tables.shape[0], heads, -1, head_dim)


def _decode(q: torch.Tensor, kv: LayerKv, group: DecodeGroup, scale: float, window: int) -> torch.Tensor:
    """q [B, Hq, D] -> float32 [B, Hq, D]."""
    tables, first = _in_window(group, kv.k.shape[2], window)
    k, v = _read(kv.k, tables, kv.k_scale), _read(kv.v, tables, kv.v_scale)
    rows, kv_heads, length, head_dim = k.shape
    grouped = (q.float() * scale).reshape(rows, kv_heads, -1, head_dim)
    positions = first[:, None] + torch.arange(length, device=q.device)
    unseen = positions >= group.lengths[:, None]
    if window:
        unseen |= positions < group.lengths[:, None] - window
    scores = (grouped @ k.transpose(2, 3)).masked_fill_(unseen[:, None, None], float("-inf"))
    weights = scores.softmax(-1)
    out = weights @ v
    if out.isnan().any():  # 0 * NaN: what lies beyond a row's tokens may be anything. Rare, so cleared only then.
        out = weights @ v.masked_fill(unseen[:, None, :, None], 0.0)
    return out.reshape(q.shape)


def _in_window(group: DecodeGroup, tokens: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of each row's table that it attends to, all rows' equally long, and the position where it begins."""
    width = group.tables.shape[1]
    most = (window + tokens - 2) // tokens + 1  # blocks that a window touches
    if not window or most >= width:
        return group.tables, torch.zeros_like(group.lengths)
    begin = (group.lengths - window).clamp_(min=0) // tokens
    index = begin[:, None] + torch.arange(most, device=begin.device)
    return group.tables.gather(1, index.clamp_(max=width - 1)), begin * tokens


def _prompt(
    q: torch.Tensor, out: torch.Tensor, kv: LayerKv, table: torch.Tensor, context: int, scale: float, window: int
) -> None:
    """q, out [n, Hq, D]: the last n of the `context` tokens in the blocks of `table`, tile by tile of queries."""
    count, heads = q.shape[:2]
    before = context - count  # the first query's position
    block_tokens = kv.k.shape[2]
    skipped = max(0, before + 1 - window) // block_tokens if window else 0  # blocks that no query sees
    base = skipped * block_tokens
    tables = table[None, skipped:]
    k = _read(kv.k, tables, kv.k_scale)[0, :, : context - base]
    v = _read(kv.v, tables, kv.v_scale)[0, :, : context - base]
    kv_heads, _, head_dim = k.shape
    tile = max(1, _SCORES_PER_TILE // (heads * (context - base)))
    for begin in range(0, count, tile):
        size = min(tile, count - begin)
        end = before + begin + size - base  # keys from 0 to here are seen by this tile's last query
        low = max(0, end - size + 1 - window) if window else 0  # the first that its first query sees
        part = q[begin : begin + size].float() * scale
        part = part.view(size, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        scores = (part @ k[:, low:end].transpose(1, 2)).view(kv_heads, -1, size, end - low)
        # Without a window only the last `size` keys are later than some query.
        masked = scores if window else scores[..., -size:]
        masked.masked_fill_(_unseen(size, masked.shape[-1], window, q.device), float("-inf"))
        mixed = scores.softmax(-1).view(kv_heads, -1, end - low) @ v[:, low:end]
        mixed = mixed.view(kv_heads, -1, size, head_dim).permute(2, 0, 1, 3)
        out[begin : begin + size] = mixed.reshape(size, heads, head_dim).to(out.dtype)


def _unseen(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """bool[queries, keys]: the last query is the last key's; none sees a later key, or one `window` or more before."""
    whole = torch.ones(queries, keys, dtype=torch.bool, device=device)
    unseen = whole.triu(keys - queries + 1)
    return unseen | whole.tril(keys - queries - window) if window else unseen


def digest_spans(words: torch.Tensor, table: I64) -> torch.Tensor:
    """words int64[w]; table int64[n, 4]: (offset, unused, length, position), all in words."""
    digests = torch.zeros(len(table), dtype=torch.int64, device=words.device)
    for index, (start, _, length, position) in enumerate(table.tolist()):
        runs = torch.arange(position, position + length, device=words.device) // 64
        digests[index] = (words[start : start + length] * _run_keys(runs)).sum()
    return digests


def copy_spans(source: torch.Tensor, target: torch.Tensor, table: I64) -> None:
    """source, target int64[w]; table int64[n, 4]: (offset in source, offset in target, length, unused), in words."""
    for start, to, length, _ in table.tolist():
        target[to : to + length] = source[start : start + length]


def _run_keys(runs: torch.Tensor) -> torch.Tensor:
    """splitmix64(run) | 1. int64 wraps to the bits of uint64; what its shifts copy of the sign is masked away."""
    z = runs + _signed(0x9E3779B97F4A7C15)
    z = (z ^ ((z >> 30) & _signed((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & _signed((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return (z ^ ((z >> 31) & _signed((1 << 33) - 1))) | 1


def _signed(word: int) -> int:
    """The int64 with the bits of this uint64."""
    return word - (1 << 64) if word >> 63 else word


def prepare_rows(state: SlotState, rows: StepRows, page_size: int) -> None:
    each = zip(rows.slots.tolist(), rows.lengths.tolist(), rows.grown.tolist(), strict=True)
    for row, (slot, length, new) in enumerate(each):
        final = max(length - 1, 0) // page_size
        if new >= 0:
            state.tables[slot, final] = new
        count = final + 1 if length > 0 else 0
        rows.tables[row, :count] = state.tables[slot, :count]
        if row < rows.decode:
            if rows.tokens[row] < 0:
                rows.tokens[row] = state.last[slot]
            rows.blocks[row] = state.tables[slot, final] if length > 0 and slot != state.scratch else 0
            rows.offsets[row] = rows.positions[row] % page_size


def gather_sampling(state: SlotState, slots: torch.Tensor, lengths: torch.Tensor) -> DeviceSampling:
    params = state.params[slots.long()]
    real = params[:, :3].contiguous().view(torch.float32)
    seed = params[:, 6:8].contiguous().view(torch.int64)[:, 0]
    return DeviceSampling(real[:, 0], params[:, 3], real[:, 1], real[:, 2], seed, params[:, 4], lengths)


def store_last(state: SlotState, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    state.last[slots.long()] = tokens.int()
