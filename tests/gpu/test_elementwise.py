"""Norms, gated activation and rotation on the GPU against their references, eagerly, in chains and in CUDA graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pd.kernels import reference
from pd.kernels.activation import silu_mul
from pd.kernels.attention import AttentionBatch, LayerKv
from pd.kernels.launch import pdl_supported
from pd.kernels.norm import add_rms_norm, rms_norm
from pd.kernels.norm_triton import run_norm
from pd.kernels.rope import QkNorm, rope_tables, rope_write_kv

DEVICE = "cuda:0"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: Of one rounding: a product whose float32 value lies on the other side of a boundary is one step away.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

OPS = SimpleNamespace(
    add_rms_norm=add_rms_norm, rope_tables=rope_tables, rope_write_kv=rope_write_kv, silu_mul=silu_mul
)


def close(found: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def rows(count: int, width: int, dtype: torch.dtype, gap: int = 0) -> torch.Tensor:
    """[count, width], with `gap` elements between one row and the next that are NaN."""
    whole = torch.full((count, width + gap), float("nan"), dtype=dtype, device=DEVICE)
    whole[:, :width] = torch.randn(count, width, device=DEVICE)
    return whole[:, :width]


def gaps_untouched(part: torch.Tensor) -> bool:
    whole = part.as_strided((len(part), part.stride(0)), (part.stride(0), 1))
    return bool(whole[:, part.shape[1] :].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "width", "gap"),
    [
        (1, 4096, 0),
        (256, 4096, 0),
        (8192, 4096, 0),
        (7, 5120, 64),
        (33, 1001, 3),
        (3, 64, 1),
        (2, 16384, 0),
        (2, 32768, 8),
    ],
)
def test_norms(count: int, width: int, gap: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    weight = torch.randn(width, device=DEVICE).to(dtype)
    x, residual = rows(count, width, dtype, gap), rows(count, width, dtype, 2 * gap)
    close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 4)
    expected, total = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    kept = x.clone()
    normed, added = add_rms_norm(x, residual, weight, 1e-5)
    close(normed, expected, 4)
    assert torch.equal(added, total) and added.data_ptr() == residual.data_ptr() and torch.equal(x, kept)
    assert gaps_untouched(x) and gaps_untouched(residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "half", "gap"),
    [(1, 14336, 0), (64, 14336, 0), (65, 14336, 0), (8192, 3072, 0), (300, 1025, 6), (3, 7, 1), (80_000, 14336, 0)],
)
def test_the_gated_activation(count: int, half: int, gap: int, dtype: torch.dtype) -> None:
    """The last is beyond 2^31 elements."""
    if count * half > 1 << 30 and dtype != torch.bfloat16:
        pytest.skip("one type is enough")
    torch.manual_seed(half)
    gate_up = rows(count, 2 * half, dtype, gap)
    found = silu_mul(gate_up)
    for part in (slice(0, 4096), slice(-4096, None)):
        close(found[part], reference.silu_mul(gate_up[part]), 4)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "pairs"), [(1, 64), (257, 32), (8192, 64), (5, 5)])
def test_tables_of_rotation(tokens: int, pairs: int, kind: torch.dtype) -> None:
    positions = torch.randint(0, 1 << 20, (tokens,), device=DEVICE, dtype=kind)
    frequencies = 500_000.0 ** -(torch.arange(pairs, device=DEVICE) / pairs)
    expected = reference.rope_tables(positions.cpu(), frequencies.cpu(), 1.3)
    for found, table in zip(rope_tables(positions, frequencies, 1.3), expected, strict=True):
        torch.testing.assert_close(found.cpu(), table, rtol=0, atol=4e-7)


def pool(blocks: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> LayerKv:
    """The second of three layers of a pool [block, head, layer, k|v, token, dim]."""
    whole = torch.zeros(blocks, heads, 3, 2, tokens, head_dim, dtype=dtype, device=DEVICE)
    return LayerKv(whole[:, :, 1, 0], whole[:, :, 1, 1])


def slots(tokens: int, blocks: int, block_tokens: int, kind: torch.dtype) -> AttentionBatch:
    """Every token in a slot of its own."""
    place = torch.randperm(blocks * block_tokens, device=DEVICE)[:tokens].to(kind)
    positions = torch.randint(0, 100_000, (tokens,), device=DEVICE, dtype=kind)
    return AttentionBatch(positions, place // block_tokens, place % block_tokens, (), ())


def tables_of(batch: AttentionBatch, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    return reference.rope_tables(batch.positions, frequencies, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 37, 2049])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (16, 8, 64), (14, 2, 64), (28, 4, 128), (4, 2, 96), (3, 1, 10)]
)
def test_rotation_and_its_writes(
    q_heads: int, kv_heads: int, head_dim: int, tokens: int, kind: torch.dtype, normed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(head_dim + q_heads)
    gap = 16 if normed else 0
    gains = torch.randn(2, head_dim, device=DEVICE).to(dtype)
    norm = QkNorm(gains[0], gains[1], 1e-6) if normed else None
    blocks = tokens // 32 + 3
    batch = slots(tokens, blocks, 32, kind)
    wide = AttentionBatch(batch.positions, batch.blocks.long(), batch.offsets.long(), (), ())
    tables = tables_of(batch, head_dim)
    found, expected = (pool(blocks, kv_heads, 32, head_dim, dtype) for _ in range(2))
    qkv = rows(tokens, (q_heads + 2 * kv_heads) * head_dim, dtype, gap)
    whole = reference.rope_write_kv(qkv.clone(), *tables, expected, wide, norm)
    heads = rope_write_kv(qkv, *tables, found, batch, norm)
    for one, other in zip((*heads, *found[:2]), (*whole, *expected[:2]), strict=True):
        close(one, other, 4)
    assert all(one.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for one in heads)
    assert torch.equal(found.v, expected.v) and gaps_untouched(qkv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 37, 2049])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (4, 2, 96), (3, 1, 10)])
def test_a_one_byte_cache_has_the_references_bytes_and_attention_sees_what_it_has(
    q_heads: int, kv_heads: int, head_dim: int, tokens: int, dtype: torch.dtype
) -> None:
    """Also of what is too large for it, and of NaN. A sum that is rounded otherwise may turn a key to its neighbour."""
    torch.manual_seed(head_dim + q_heads)
    blocks = tokens // 32 + 3
    batch = slots(tokens, blocks, 32, torch.int64)
    tables = tables_of(batch, head_dim)
    qkv = rows(tokens, (q_heads + 2 * kv_heads) * head_dim, dtype)
    qkv[::3, q_heads * head_dim :] *= 1000
    qkv[::5, (q_heads + kv_heads) * head_dim :: 7] = float("nan")
    found, expected = (
        LayerKv(*(part.to(torch.float8_e4m3fn) for part in pool(blocks, kv_heads, 32, head_dim, dtype)[:2]),
                k_scale=0.37, v_scale=1.9)
        for _ in range(2)
    )  # fmt: skip
    whole = reference.rope_write_kv(qkv.clone(), *tables, expected, batch, None)
    heads = rope_write_kv(qkv, *tables, found, batch)
    assert torch.equal(found.v.view(torch.uint8), expected.v.view(torch.uint8))
    torch.testing.assert_close(heads.v, whole[2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.k.float(), expected.k.float(), rtol=0.13, atol=2**-9)
    assert (found.k.float() != expected.k.float()).count_nonzero() <= 0.02 * tokens * kv_heads * head_dim
    kept = found.k.float()[batch.blocks, :, batch.offsets] * found.k_scale
    torch.testing.assert_close(heads.k, kept.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("blocks", "stride"), [(5, 1 << 30), (2, (1 << 32) + 64)])
def test_slots_beyond_two_to_the_31_elements_are_written(blocks: int, stride: int) -> None:
    """The last block's offset does not fit into 32 bits, nor does its stride in the second case."""
    memory = torch.zeros((1 << 32) + 4096, dtype=torch.float16, device=DEVICE)
    kv = LayerKv(*(memory[start:].as_strided((blocks, 2, 4, 64), (stride, 256, 64, 1)) for start in (0, 512)))
    last = torch.full((1,), blocks - 1, device=DEVICE, dtype=torch.int32)
    batch = AttentionBatch(last, last, torch.full_like(last, 3), (), ())
    heads = rope_write_kv(rows(1, 6 * 64, torch.float16), *tables_of(batch, 64), kv, batch)
    assert torch.equal(kv.k[-1, :, 3], heads.k[0]) and torch.equal(kv.v[-1, :, 3], heads.v[0])
    assert heads.k.any() and memory.count_nonzero() <= 4 * 64


HEAD_DIM, KV_HEADS = 64, 4
WIDTHS = (8192, 4096, 2048, 1024)


class Chain:
    """Norms, rotations and activations of ever narrower rows: each kernel reads what the one before it has written."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(tokens)
        self.start = torch.randn(tokens, WIDTHS[0], device=DEVICE)
        self.residuals = [torch.randn(tokens, width, device=DEVICE) for width in WIDTHS]
        self.gains = [torch.rand(width, device=DEVICE) + 0.5 for width in WIDTHS]
        self.norm = QkNorm(torch.ones(HEAD_DIM, device=DEVICE), torch.ones(HEAD_DIM, device=DEVICE), 1e-6)
        self.frequencies = 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
        self.blocks = tokens // 32 + 1
        self.batch = slots(tokens, self.blocks, 32, torch.int64)

    def run(self, ops: Any) -> list[torch.Tensor]:
        """What every kernel has left behind, by the ops of a namespace."""
        kv = pool(self.blocks, KV_HEADS, 32, HEAD_DIM, torch.float32)
        x, left = self.start, [*kv[:2]]
        residuals = [one.clone() for one in self.residuals]
        tables = ops.rope_tables(self.batch.positions, self.frequencies, 1.0)
        for residual, gain in zip(residuals, self.gains, strict=True):
            normed, residual = ops.add_rms_norm(x, residual, gain, 1e-6)
            heads = ops.rope_write_kv(normed, *tables, kv, self.batch, self.norm)
            x = ops.silu_mul(torch.cat(heads, 1).flatten(1) if ops is reference else normed)
            left += [residual, x]
        return left


@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_a_chain_of_dependent_launches_computes_what_its_references_do(tokens: int) -> None:
    chain = Chain(tokens)
    assert pdl_supported(chain.start.device) == (torch.cuda.get_device_capability() >= (9, 0))
    expected = chain.run(reference)
    first = chain.run(OPS)
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for _ in range(20):
        for one, other in zip(chain.run(OPS), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_graph_of_dependent_launches_repeats_them(tokens: int) -> None:
    chain = Chain(tokens)
    expected = chain.run(OPS)  # compiles, too, which no capture may do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        left = chain.run(OPS)
    for _ in range(50):
        for one in left:
            one.fill_(float("nan"))
        graph.replay()
        for one, other in zip(left, expected, strict=True):
            assert torch.equal(one, other)


def test_with_and_without_dependent_launches_the_result_is_the_same_bits() -> None:
    weight, x = torch.randn(4096, device=DEVICE), torch.randn(64, 4096, device=DEVICE)
    torch.cuda.synchronize()
    plain = run_norm(x, None, weight, 1e-6, False)
    assert torch.equal(run_norm(x, None, weight, 1e-6, pdl_supported(x.device)), plain)
