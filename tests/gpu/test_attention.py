"""Attention over paged KV on the GPU against the reference, which computes in float32 from the same values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pd.kernels.attention import LayerKv, paged_attention
from pd.kernels.attention_plan import Split
from pd.kernels.attention_triton import decode_attention
from pd.kernels.reference import as_bytes, paged_attention_device
from tests.kernels.attention_kit import Case, attention_case

#: Absolute and relative: results are means of values of size 1. A unit in the last place of a 16-bit output, and as
#: much again for weights that are rounded to 16 bits before they are multiplied.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALE = 0.125
CONTEXTS = [(1, context) for context in (1, 0, 31, 32, 33, 64, 500, 1024, 1025, 8200, 0, 20_001)]


def check(case: Case, out: torch.Tensor, window: int = 0) -> None:
    heads, kv, batch = case
    expected = paged_attention_device(heads, kv, batch, SCALE, window)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[out.dtype], rtol=TOLERANCE[out.dtype])
    assert batch.arrivals is None or not batch.arrivals.any(), "left as they were found"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 1, 100, 4096])
def test_decode_rows_see_their_own_tokens(dtype: torch.dtype, head_dim: int, window: int) -> None:
    case = attention_case(CONTEXTS, group=4, kv_heads=8, head_dim=head_dim, page=32, dtype=dtype, device="cuda")
    check(case, paged_attention(*case, SCALE, window), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "window"), [(64, 0), (96, 100), (128, 0), (128, 4096), (256, 0)])
def test_decode_rows_and_prompts_read_one_byte_keys_and_values(dtype: torch.dtype, head_dim: int, window: int) -> None:
    """Products are of float16, or of float32 with such queries: no further from the reference than those of 16 bits."""
    shape = {"group": 4, "kv_heads": 4, "head_dim": head_dim, "page": 32, "dtype": dtype, "device": "cuda"}
    for rows in (CONTEXTS, PROMPTS):
        case = attention_case(rows, fp8=True, **shape)  # type: ignore[arg-type]
        check(case, paged_attention(*case, SCALE, window), window)


@pytest.mark.parametrize(("group", "kv_heads", "page"), [(1, 5, 16), (7, 4, 64), (20, 2, 128)])
def test_one_byte_blocks_of_any_size_serve_any_number_of_heads(group: int, kv_heads: int, page: int) -> None:
    for rows in (CONTEXTS, PROMPTS):
        case = attention_case(
            rows, group=group, kv_heads=kv_heads, page=page, dtype=torch.bfloat16, device="cuda", fp8=True
        )
        check(case, paged_attention(*case, SCALE))


@pytest.mark.parametrize("arrivals", [True, False], ids=["the last part combines", "a kernel combines"])
@pytest.mark.parametrize("parts", [1, 2, 7, 64])
@pytest.mark.parametrize(("page", "fp8"), [(16, False), (64, False), (128, False), (32, True)])
def test_decode_is_the_same_in_any_number_of_parts(page: int, fp8: bool, parts: int, arrivals: bool) -> None:
    case = attention_case(CONTEXTS, page=page, dtype=torch.bfloat16, device="cuda", arrivals=arrivals, fp8=fp8)
    heads, kv, batch = case
    out = torch.full_like(heads.q, float("nan"), memory_format=torch.contiguous_format).flatten(1)
    for _ in range(3):  # what is counted on the device is ready for the next launch
        decode_attention(heads.q, kv, batch, out, SCALE, 0, Split(parts, 64))
        check(case, out)
        assert not out[batch.lengths == 0].any()


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 5), (7, 4), (8, 1), (20, 2)])
def test_decode_takes_any_number_of_heads(group: int, kv_heads: int) -> None:
    case = attention_case(CONTEXTS, group=group, kv_heads=kv_heads, dtype=torch.bfloat16, device="cuda")
    check(case, paged_attention(*case, SCALE))


def spread(case: Case, blocks: int) -> Case:
    """The same with its blocks further apart than 32-bit offsets reach: the pool's last are `blocks` away."""
    heads, kv, batch = case
    count, *inner = kv.k.shape
    pool = torch.zeros(blocks, 2, *inner, dtype=kv.k.dtype, device=kv.k.device)
    for place, part in enumerate(kv[:2]):
        as_bytes(pool)[-count:, place] = as_bytes(part)
    tables = batch.tables + (blocks - count)
    moved = replace(batch, tables=tables)
    return Case(heads, LayerKv(pool[:, 0], pool[:, 1], *kv[2:]), moved)


@pytest.mark.parametrize(("fp8", "blocks"), [(False, 41_000), (True, 82_000)])
def test_blocks_beyond_32_bits_of_offset_are_found(fp8: bool, blocks: int) -> None:
    """5.4 GB of pool: elements, not only bytes, beyond 2^31; with one byte an element words of two of them."""
    rows = [(1, 700), (1, 90), (1, 3000)]
    case = attention_case(rows, kv_heads=8, head_dim=128, page=32, dtype=torch.bfloat16, device="cuda", fp8=fp8)
    far = spread(case, blocks)
    assert far.kv.k.stride(0) * (blocks - 100) > 2**31 * (2 if fp8 else 1)
    check(far, paged_attention(*far, SCALE))


def test_a_captured_decode_step_follows_lengths_that_change() -> None:
    """Also in a graph's private pool, with rows that come and go."""
    case = attention_case(CONTEXTS, kv_heads=8, head_dim=128, page=32, dtype=torch.bfloat16, device="cuda")
    batch, lengths = case.batch, case.batch.lengths.clone()
    paged_attention(*case, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*case, SCALE)
    for part in (1.0, 0.5, 0.0, 0.9):
        batch.lengths.copy_((lengths * part).int())
        graph.replay()
        check(case, out)


PROMPTS = [(1, 700), (1, 0), (17, 17), (128, 128), (600, 8600), (33, 70), (1000, 1000), (300, 20_300), (2, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 1, 100, 4096])
def test_prompts_and_decode_rows_share_a_batch(dtype: torch.dtype, head_dim: int, window: int) -> None:
    case = attention_case(PROMPTS, group=4, kv_heads=2, head_dim=head_dim, page=32, dtype=dtype, device="cuda")
    assert case.batch.fresh
    check(case, paged_attention(*case, SCALE, window), window)


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 5), (7, 4), (8, 1), (20, 2)])
@pytest.mark.parametrize("page", [16, 64, 128])
def test_prompts_take_any_number_of_heads_and_blocks_of_any_size(group: int, kv_heads: int, page: int) -> None:
    case = attention_case(PROMPTS, group=group, kv_heads=kv_heads, page=page, dtype=torch.bfloat16, device="cuda")
    check(case, paged_attention(*case, SCALE))


@pytest.mark.parametrize("count", [900, 1024, 2048, 8100, 8192])
def test_cudnn_takes_a_prompt_without_a_prefix_as_it_lies(count: int) -> None:
    case = attention_case([(count, count)], kv_heads=8, head_dim=128, page=32, dtype=torch.bfloat16, device="cuda")
    heads = case.heads
    out = paged_attention(*case, SCALE)
    check(case, out)
    assert out.is_contiguous()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # an error where it does not take these strides
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in heads)
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_prompts_in_blocks_beyond_32_bits_of_offset_are_found() -> None:
    rows = [(90, 90), (500, 3000)]
    case = attention_case(rows, kv_heads=8, head_dim=128, page=32, dtype=torch.bfloat16, device="cuda")
    far = spread(case, 41_000)
    check(far, paged_attention(*far, SCALE))
