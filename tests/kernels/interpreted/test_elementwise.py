"""Norms, gated activation and rotation by the interpreted kernels, against their references."""

from __future__ import annotations

import pytest
import torch

from pd.kernels import reference
from pd.kernels.activation_triton import run_silu_mul
from pd.kernels.attention import AttentionBatch, LayerKv
from pd.kernels.norm_triton import MAX_COLUMNS, run_norm, run_scale
from pd.kernels.rope import QkNorm
from pd.kernels.rope_triton import run_rope_tables, run_rope_write

DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # of one rounding in each type


def close(found: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def rows(count: int, width: int, dtype: torch.dtype, gap: int = 0) -> torch.Tensor:
    """[count, width], with `gap` elements between one row and the next that are NaN."""
    whole = torch.full((count, width + gap), float("nan"), dtype=dtype)
    whole[:, :width] = torch.randn(count, width)
    return whole[:, :width]


def gaps_untouched(part: torch.Tensor) -> bool:
    whole = part.as_strided((len(part), part.stride(0)), (part.stride(0), 1))
    return bool(whole[:, part.shape[1] :].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width", "gap"), [(1, 4096, 0), (3, 64, 16), (2, 5, 3), (5, 1000, 24), (4, 1, 0)])
def test_norms_are_those_of_the_reference(count: int, width: int, gap: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, residual, weight = (
        rows(count, width, dtype, gap),
        rows(count, width, dtype, 2 * gap),
        torch.randn(width).to(dtype),
    )
    close(run_norm(x, None, weight, 1e-5, False), reference.rms_norm(x, weight, 1e-5), 4)
    expected, total = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    kept = x.clone()
    close(run_norm(x, residual, weight, 1e-5, False), expected, 4)
    assert torch.equal(residual, total) and torch.equal(x, kept)
    assert gaps_untouched(x) and gaps_untouched(residual)
    close(run_norm(x, None, None, 1e-5, False), reference.rms_norm(x, None, 1e-5), 4)
    close(run_scale(x, 1e-5, False), reference.rms_scale(x, 1e-5), 4)


def test_norms_of_large_values_do_not_overflow_in_half_precision() -> None:
    x, weight = torch.full((2, 96), 6e4, dtype=torch.float16), torch.ones(96, dtype=torch.float16)
    assert torch.equal(run_norm(x, None, weight, 1e-6, False), torch.ones_like(x))


def test_no_rows_are_no_launch() -> None:
    x, weight = torch.empty(0, 8), torch.ones(8)
    assert run_norm(x, x, weight, 1e-6, False).shape == (0, 8)
    assert run_silu_mul(x, False).shape == (0, 4)


def test_what_the_norm_cannot_take_is_refused() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    for wrong in (x.T.contiguous().T, x.half()):
        with pytest.raises(ValueError, match="contiguous rows, of the weight's dtype"):
            run_norm(wrong, None, weight, 1e-6, False)
    with pytest.raises(ValueError, match="contiguous rows, of the weight's dtype"):
        run_norm(x, x[:1], weight, 1e-6, False)
    with pytest.raises(ValueError, match=r"contiguous, \[8\]"):
        run_norm(x, None, torch.ones(9), 1e-6, False)
    wide = MAX_COLUMNS + 1
    for run in (lambda x: run_norm(x, None, torch.ones(wide), 1e-6, False), lambda x: run_scale(x, 1e-6, False)):
        with pytest.raises(ValueError, match=f"at most {MAX_COLUMNS}"):
            run(torch.empty(0, wide))
    with pytest.raises(ValueError, match="contiguous rows"):
        run_scale(x.T.contiguous().T, 1e-6, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "half", "gap"), [(1, 14336, 0), (65, 3, 2), (3, 1025, 8), (2, 2049, 0)])
def test_the_gated_activation_is_that_of_the_reference(count: int, half: int, gap: int, dtype: torch.dtype) -> None:
    torch.manual_seed(half)
    gate_up = rows(count, 2 * half, dtype, gap)
    gate_up *= 4
    close(run_silu_mul(gate_up, False), reference.silu_mul(gate_up), 4)
    scale = torch.rand(count) + 0.5
    close(run_silu_mul(gate_up, False, scale), reference.silu_mul(gate_up, scale), 4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity, as on the GPU
def test_the_gated_activation_of_extremes_is_that_of_torch() -> None:
    gate_up = torch.tensor([[0.0, -0.0, 90.0, -90.0, -1e4, 1e4, 1.0], [1.0] * 7]).flatten()[None]
    close(run_silu_mul(gate_up, False), reference.silu_mul(gate_up))


def test_an_odd_row_of_the_gated_activation_is_refused() -> None:
    for wrong in (torch.ones(2, 7), torch.ones(8, 2).T):
        with pytest.raises(ValueError, match="2 I"):
            run_silu_mul(wrong, False)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("pairs", [64, 32, 5])
def test_the_tables_are_those_of_the_reference(pairs: int, kind: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 77, 4095, 131_071, 1_000_003], dtype=kind)
    frequencies = 500_000.0 ** -(torch.arange(pairs) / pairs)
    expected = reference.rope_tables(positions, frequencies, 1.3)
    for found, table in zip(run_rope_tables(positions, frequencies, 1.3, False), expected, strict=True):
        close(found, table)


def cache(blocks: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, plain: bool) -> LayerKv:
    """The second of three layers of a pool [block, head, layer, k|v, token, dim]; or one with dims far apart."""
    if plain:
        whole = torch.zeros(blocks, heads, 3, 2, tokens, head_dim, dtype=dtype)
        return LayerKv(whole[:, :, 1, 0], whole[:, :, 1, 1])
    k = torch.zeros(head_dim, tokens, heads, blocks, dtype=dtype).permute(3, 2, 1, 0)
    return LayerKv(k, torch.zeros(tokens, blocks, heads, head_dim, dtype=dtype).permute(1, 2, 0, 3))


SHAPES = [(32, 8, 128), (16, 8, 64), (14, 2, 64), (28, 4, 128), (4, 2, 96), (1, 1, 8), (3, 1, 10), (2, 2, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("normed", "deferred"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), SHAPES)
def test_rotation_and_its_writes_are_those_of_the_reference(
    q_heads: int, kv_heads: int, head_dim: int, normed: bool, deferred: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(head_dim + q_heads)
    gap = 16 if normed else 0
    qkv = rows(3, (q_heads + 2 * kv_heads) * head_dim, dtype, gap)
    positions = torch.tensor([3, 900, 70_000])
    tables = reference.rope_tables(positions, 10_000.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim), 1.0)
    slots = torch.tensor([4, 1, 4]), torch.tensor([0, 5, 2])
    norm = QkNorm(torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype), 1e-6) if normed else None
    scale = torch.rand(3) + 0.5 if deferred else None
    for plain in (True, False):
        found, expected = (cache(5, kv_heads, 6, head_dim, dtype, plain) for _ in range(2))
        wide = AttentionBatch(positions, *slots, (), ())
        narrow = AttentionBatch(positions, slots[0].int(), slots[1].int(), (), ())
        # The reference takes its input apart, the kernel turns it in place.
        whole = reference.rope_write_kv(qkv.contiguous(), *tables, expected, wide, norm, scale)
        turned = rows(3, qkv.shape[1], dtype, gap).copy_(qkv)
        heads = run_rope_write(turned, *tables, found, narrow if plain else wide, norm, False, scale)
        for one, other in zip((*heads, *found[:2]), (*whole, *expected[:2]), strict=True):
            close(one, other, 4)
        assert all(one.untyped_storage().data_ptr() == turned.untyped_storage().data_ptr() for one in heads)
        assert torch.equal(found.v, expected.v) and gaps_untouched(turned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("normed", "deferred"), [(False, False), (True, True)])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (4, 2, 96), (3, 1, 10)])
def test_a_one_byte_cache_has_the_references_bytes_and_attention_sees_what_it_has(
    q_heads: int, kv_heads: int, head_dim: int, normed: bool, deferred: bool, dtype: torch.dtype
) -> None:
    """Also of what is too large for it, and of what is no number."""
    torch.manual_seed(head_dim + q_heads)
    qkv = rows(4, (q_heads + 2 * kv_heads) * head_dim, dtype)
    # Turned by 0: what is rounded to one byte is exactly the same in both.
    tables = reference.rope_tables(torch.zeros(4), torch.ones(head_dim // 2), 1.0)
    qkv[:2, q_heads * head_dim :] *= 1000
    qkv[2, (q_heads + kv_heads) * head_dim :: 3] = float("nan")
    qkv[3, (q_heads + kv_heads) * head_dim :: 5] = float("-inf")
    slots = torch.tensor([4, 1, 4, 2]), torch.tensor([0, 5, 2, 3])
    norm = QkNorm(*torch.ones(2, head_dim, dtype=dtype), 1e-6) if normed else None
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0]) if deferred else None
    batch = AttentionBatch(torch.zeros(4), *slots, (), ())
    for plain in (True, False):
        found, expected = (
            LayerKv(*(part.to(torch.float8_e4m3fn) for part in cache(5, kv_heads, 6, head_dim, dtype, plain)[:2]),
                    k_scale=0.37, v_scale=1.9)
            for _ in range(2)
        )  # fmt: skip
        whole = reference.rope_write_kv(qkv.clone(), *tables, expected, batch, norm, scale)
        turned = qkv.clone()
        heads = run_rope_write(turned, *tables, found, batch, norm, False, scale)
        for one, other in zip(found[:2], expected[:2], strict=True):
            different = one.float().nan_to_num(1e3) != other.float().nan_to_num(1e3)
            # A norm's sum is added up in another order: now and then its result falls on the other side of a border.
            assert different.float().mean() <= (0.01 if normed else 0.0)
        assert found.v[1, 0, 5].float().amax() == -found.v[2, 0, 3].float().amin() == 448.0
        if not normed:
            for one, other in zip(heads, whole, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        kept = found.k[slots[0], :, slots[1]].float() * found.k_scale
        torch.testing.assert_close(heads[1].float(), kept.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_what_the_rotation_cannot_take_is_refused() -> None:
    kv = cache(2, 2, 4, 8, torch.float32, True)
    qkv, table, slots = torch.zeros(3, 64), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    batch = AttentionBatch(slots, slots, slots, (), ())
    for wrong, found in {
        "contiguous rows": (torch.zeros(64, 3).T, table, table, kv, batch, None),
        r"\(Hq \+ 2 \* 2\) \* 8\]": (qkv[:, :32], table, table, kv, batch, None),
        "same shape": (qkv, table, table, LayerKv(kv.k, kv.v[:1]), batch, None),
        "cos and sin": (qkv, table, table[:2], kv, batch, None),
        "blocks and offsets": (qkv, table, table, kv, AttentionBatch(slots, slots[:2], slots, (), ()), None),
        "norms": (qkv, table, table, kv, batch, QkNorm(torch.ones(8), torch.ones(4), 1e-6)),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            run_rope_write(*found, False)
    with pytest.raises(ValueError, match="float32"):
        run_rope_tables(slots, torch.ones(4, dtype=torch.float64), 1.0, False)
