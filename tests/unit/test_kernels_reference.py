"""The ops against the plainest possible formulas."""

from __future__ import annotations

import math

import pytest
import torch

from pd.kernels import reference
from pd.kernels.activation import silu_mul
from pd.kernels.attention import AttentionBatch, DecodeGroup, Heads, LayerKv, PromptSpan, paged_attention
from pd.kernels.norm import add_rms_norm, rms_norm
from pd.kernels.rope import QkNorm, rope_tables, rope_write_kv

KV_HEADS, LAYERS, HEAD_DIM = 2, 3, 8


def pool(blocks: int, tokens: int, fill: float) -> list[LayerKv]:
    whole = torch.full((blocks, KV_HEADS, LAYERS, 2, tokens, HEAD_DIM), fill)
    return [LayerKv(whole[:, :, layer, 0], whole[:, :, layer, 1]) for layer in range(LAYERS)]


def queries_only(q: torch.Tensor) -> Heads:
    """The reference reads keys and values from the cache alone."""
    return Heads(q, q[:0], q[:0])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int = 0) -> torch.Tensor:
    """One request, one query at a time: q [n, Hq, D] are the last n of k, v [L, Hkv, D]'s positions."""
    count, heads, head_dim = q.shape
    out = torch.empty(count, heads, head_dim, dtype=torch.float64)
    for row in range(count):
        last = k.shape[0] - count + row + 1
        seen = slice(max(0, last - window) if window else 0, last)
        for head in range(heads):
            group = head // (heads // k.shape[1])
            weights = (k[seen, group].double() @ q[row, head].double() * scale).softmax(0)
            out[row, head] = weights @ v[seen, group].double()
    return out.flatten(1)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30, 0.0])
@pytest.mark.parametrize("block_tokens", [4, 16])
@pytest.mark.parametrize("window", [0, 1, 6, 13, 40])
def test_paged_attention_sees_exactly_its_own_requests_tokens(fill: float, block_tokens: int, window: int) -> None:
    """Prompt chunks and decode rows in one batch; whatever else lies in the pool has no effect."""
    torch.manual_seed(3)
    spans = [(5, 5), (1, 9), (1, 17), (6, 19), (1, 3), (1, 31), (30, 47)]  # tokens in this step, context with them
    layers = pool(60, block_tokens, fill)
    kv = layers[1]
    free = iter(torch.randperm(59).add(1).tolist())
    queries, expected, decode, prompts, start = [], [], [], [], 0
    for count, context in spans:
        table = torch.tensor([next(free) for _ in range(math.ceil(context / block_tokens))])
        k, v = torch.randn(2, context, KV_HEADS, HEAD_DIM)
        for position in range(context):
            kv.k[table[position // block_tokens], :, position % block_tokens] = k[position]
            kv.v[table[position // block_tokens], :, position % block_tokens] = v[position]
        q = torch.randn(count, 2 * KV_HEADS, HEAD_DIM)
        queries.append(q)
        expected.append(dense_attention(q, k, v, 0.3, window))
        if count == 1:
            decode.append((start, table, context))
        else:
            prompts.append(PromptSpan(start, count, context, table))
        start += count
    width = max(len(table) for _, table, _ in decode)
    group = DecodeGroup(
        rows=torch.tensor([row for row, _, _ in decode]),
        tables=torch.stack([torch.cat((table, table[:1].expand(width - len(table)))) for _, table, _ in decode]),
        lengths=torch.tensor([context for _, _, context in decode]),
    )
    unused = torch.empty(0, dtype=torch.int64)
    batch = AttentionBatch(unused, unused, unused, (group,), tuple(prompts))
    out = paged_attention(queries_only(torch.cat(queries)), kv, batch, 0.3, window)
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 5, 30])
def test_prompt_attention_is_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    torch.manual_seed(4)
    kv = pool(12, 8, 0.0)[0]
    kv.k.normal_()
    kv.v.normal_()
    unused = torch.empty(0, dtype=torch.int64)
    span = PromptSpan(0, 50, 70, torch.arange(1, 10))
    batch = AttentionBatch(unused, unused, unused, (), (span,))
    q = torch.randn(50, 4, HEAD_DIM)
    whole = paged_attention(queries_only(q), kv, batch, 0.2, window)
    monkeypatch.setattr(reference, "_SCORES_PER_TILE", 4 * 70 * 7)
    torch.testing.assert_close(paged_attention(queries_only(q), kv, batch, 0.2, window), whole, atol=1e-6, rtol=1e-6)


def test_gather_works_for_any_strides() -> None:
    """The fast path needs contiguous (token, head_dim) runs; any other cache takes the general one."""
    torch.manual_seed(5)
    fast = pool(6, 4, 0.0)[2].k
    fast.normal_()
    slow = torch.empty(6, 4, KV_HEADS, HEAD_DIM).transpose(1, 2)
    slow.copy_(fast)
    tables = torch.tensor([[1, 5], [2, 2]])
    expected = fast[tables].transpose(1, 2).reshape(2, KV_HEADS, 8, HEAD_DIM)
    assert slow.stride()[2:] != (HEAD_DIM, 1)
    assert torch.equal(reference._gather(fast, tables), expected)
    assert torch.equal(reference._gather(slow, tables), expected)


def test_rope_rotates_and_writes_each_token_to_its_slot() -> None:
    torch.manual_seed(6)
    kv = pool(4, 4, 0.0)[1]
    before = kv.k.clone()
    positions = torch.tensor([0, 5, 900])
    unused = torch.tensor([2, 1, 3])
    batch = AttentionBatch(positions, unused, torch.tensor([3, 1, 0]), (), ())
    frequencies = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    qkv = torch.randn(3, (4 + 2 * KV_HEADS) * HEAD_DIM)
    rotated = rope_write_kv(qkv.clone(), *rope_tables(positions, frequencies), kv, batch)
    heads = qkv.view(3, -1, HEAD_DIM)
    turned = torch.view_as_complex(torch.stack(heads[:, :6].chunk(2, -1), -1).contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones(3, 4), positions[:, None] * frequencies)[:, None])
    expected = torch.cat(turned.unbind(-1), -1)
    torch.testing.assert_close(rotated.q, expected[:, :4], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(rotated.k, expected[:, 4:6], atol=2e-5, rtol=1e-5)
    assert torch.equal(rotated.v, heads[:, 6:])
    for row, (block, offset) in enumerate([(2, 3), (1, 1), (3, 0)]):
        torch.testing.assert_close(kv.k[block, :, offset], expected[row, 4:], atol=2e-5, rtol=1e-5)
        assert torch.equal(kv.v[block, :, offset], heads[row, 6:])
    assert (kv.k != before).any(-1).sum() == 3 * KV_HEADS


def test_queries_and_keys_are_normalised_head_by_head_before_they_are_rotated() -> None:
    torch.manual_seed(8)
    normed, plain = pool(2, 4, 0.0)[0], pool(2, 4, 0.0)[0]
    batch = AttentionBatch(torch.tensor([3, 70]), torch.tensor([1, 1]), torch.tensor([0, 2]), (), ())
    tables = rope_tables(batch.positions, torch.tensor([1.0, 0.1, 0.01, 0.001]), 1.5)
    qkv = torch.randn(2, (4 + 2 * KV_HEADS) * HEAD_DIM)
    weights = torch.randn(2, HEAD_DIM)
    q = rope_write_kv(qkv.clone(), *tables, normed, batch, QkNorm(weights[0], weights[1], 1e-5)).q
    heads = qkv.view(2, -1, HEAD_DIM).double()
    heads[:, :6] /= (heads[:, :6].square().mean(-1, keepdim=True) + 1e-5).sqrt()
    heads[:, :4] *= weights[0]
    heads[:, 4:6] *= weights[1]
    expected = rope_write_kv(heads.float().flatten(1), *tables, plain, batch).q
    torch.testing.assert_close(q, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normed.k, plain.k, atol=1e-5, rtol=1e-5)
    assert torch.equal(normed.v[1, :, 2], qkv.view(2, -1, HEAD_DIM)[1, 6:])
    assert q.square().sum(-1).allclose((heads[:, :4].float() * 1.5).square().sum(-1))  # rotated, and scaled by 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_take_their_mean_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    x, residual, weight = torch.randn(3, 5, 64).to(dtype).mul_(100).unbind(0)
    total = (residual + x).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    normed, added = add_rms_norm(x, residual.clone(), weight, 1e-6)
    assert normed.dtype == dtype and torch.equal(added, residual + x)
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(rms_norm(added, weight, 1e-6), normed)


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    gate_up = torch.randn(3, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)
