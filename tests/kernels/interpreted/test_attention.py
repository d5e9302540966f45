"""Attention by the interpreted kernels, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from pd.kernels import attention_device, attention_plan
from pd.kernels.attention import Heads
from pd.kernels.attention_plan import Split
from pd.kernels.attention_prefill_triton import PromptConfig, prompt_attention
from pd.kernels.attention_triton import DecodeConfig, decode_attention
from pd.kernels.reference import paged_attention_device
from tests.kernels.attention_kit import attention_case

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}
CONTEXTS = [(1, context) for context in (1, 0, 16, 33, 64, 130, 0)]


def check_decode(
    window: int = 0, split: Split | None = None, config: DecodeConfig | None = None, **case: object
) -> None:
    heads, kv, batch = attention_case(CONTEXTS, **case)  # type: ignore[arg-type]
    out = torch.full((len(CONTEXTS), heads.q[0].numel()), float("nan"), dtype=heads.q.dtype)
    decode_attention(heads.q, kv, batch, out, 0.2, window, split, config)
    expected = paged_attention_device(heads, kv, batch, 0.2, window)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[out.dtype], rtol=1e-5)
    assert not out[batch.lengths == 0].any(), "padding rows are zeros"
    assert batch.arrivals is None or not batch.arrivals.any(), "left as they were found"


@pytest.mark.parametrize("arrivals", [True, False], ids=["the last part combines", "a kernel combines"])
@pytest.mark.parametrize("split", [Split(*one) for one in ((1, 1), (2, 1), (5, 32), (12, 1))], ids=str)
@pytest.mark.parametrize("window", [0, 20])
def test_decode_rows_see_their_own_tokens_whatever_the_parts(window: int, split: Split, arrivals: bool) -> None:
    """More parts than a row has steps, and rows of one part beside rows of many."""
    check_decode(window, split, DecodeConfig(step=16), arrivals=arrivals)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_reads_blocks_of_any_size(page: int, dtype: torch.dtype) -> None:
    check_decode(split=Split(2, 1), page=page, dtype=dtype)


@pytest.mark.parametrize(("page", "dtype"), [(16, torch.float32), (64, torch.float16)], ids=str)
def test_decode_reads_one_byte_blocks_of_any_size(page: int, dtype: torch.dtype) -> None:
    check_decode(split=Split(2, 1), page=page, dtype=dtype, fp8=True)


@pytest.mark.parametrize("arrivals", [True, False], ids=["the last part combines", "a kernel combines"])
@pytest.mark.parametrize("window", [0, 20])
def test_one_byte_keys_and_values_are_scaled_whatever_the_parts(window: int, arrivals: bool) -> None:
    check_decode(window, Split(5, 16), DecodeConfig(step=16), arrivals=arrivals, fp8=True)


@pytest.mark.parametrize("window", [1, 64])
def test_decode_windows_begin_anywhere(window: int) -> None:
    check_decode(window, Split(3, 1))


@pytest.mark.parametrize(
    ("group", "kv_heads", "head_dim", "fp8"),
    [(1, 3, 128, False), (7, 2, 48, False), (8, 1, 64, False), (20, 1, 64, False), (7, 2, 48, True), (1, 3, 128, True)],
)
def test_decode_takes_any_number_of_heads(group: int, kv_heads: int, head_dim: int, fp8: bool) -> None:
    check_decode(split=Split(3, 1), group=group, kv_heads=kv_heads, head_dim=head_dim, fp8=fp8)


def test_queries_that_float16_cannot_hold_attend_to_one_byte_keys() -> None:
    """They are scaled first."""
    heads, kv, batch = attention_case([(1, 40)], fp8=True)
    heads.q[:] *= 2e5
    kv = kv._replace(k_scale=1e-4)
    half = heads._replace(q=heads.q.bfloat16().float())
    out = torch.empty(1, heads.q[0].numel(), dtype=torch.float16)
    decode_attention(half.q, kv, batch, out, 0.2, 0)
    torch.testing.assert_close(out.float(), paged_attention_device(half, kv, batch, 0.2, 0), atol=2e-3, rtol=1e-3)


SPANS = [(1, 40), (1, 3), (1, 0), (5, 5), (2, 70), (70, 103), (41, 41)]  # decode rows, then prompts


def check_prompts(
    window: int = 0, config: PromptConfig | None = None, split: Split | None = None, **case: object
) -> None:
    heads, kv, batch = attention_case(SPANS, **case)  # type: ignore[arg-type]
    assert batch.tiles is not None
    out = torch.full(heads.q.shape, float("nan"), dtype=heads.q.dtype).flatten(1)
    prompt_attention(heads.q, kv, batch, out, 0.2, window, batch.tiles, config, split)
    expected = paged_attention_device(heads, kv, batch, 0.2, window)
    torch.testing.assert_close(out[3:], expected[3:], atol=TOLERANCE[out.dtype], rtol=1e-5)
    assert out[:3].isnan().all(), "decode rows are not touched"


@pytest.mark.parametrize(("window", "step"), [(0, 16), (0, 64), (1, 16), (20, 16), (64, 64)])
def test_prompt_tokens_see_what_came_before_them(window: int, step: int) -> None:
    check_prompts(window, PromptConfig(rows=64, step=step))


@pytest.mark.parametrize("split", [Split(2, 32), Split(3, 16), Split(16, 1)], ids=str)
@pytest.mark.parametrize("window", [0, 20])
def test_the_keys_of_a_tile_may_be_divided(window: int, split: Split) -> None:
    check_prompts(window, PromptConfig(rows=64, step=16), split)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prompts_read_blocks_of_any_size(page: int, dtype: torch.dtype) -> None:
    check_prompts(page=page, dtype=dtype)


@pytest.mark.parametrize(("page", "dtype"), [(32, torch.float32), (16, torch.float16)], ids=str)
def test_prompts_read_one_byte_blocks_of_any_size(page: int, dtype: torch.dtype) -> None:
    check_prompts(page=page, dtype=dtype, fp8=True)


@pytest.mark.parametrize(
    ("group", "kv_heads", "head_dim", "fp8"),
    [(1, 2, 64, False), (7, 2, 48, False), (8, 1, 128, False), (20, 1, 64, False), (7, 2, 48, True)],
)
def test_prompts_take_any_number_of_heads(group: int, kv_heads: int, head_dim: int, fp8: bool) -> None:
    check_prompts(group=group, kv_heads=kv_heads, head_dim=head_dim, fp8=fp8)


@pytest.mark.parametrize(("window", "split"), [(0, Split(2, 32)), (20, Split(16, 1))], ids=str)
def test_one_byte_keys_of_a_tile_may_be_divided(window: int, split: Split) -> None:
    check_prompts(window, PromptConfig(rows=64, step=16), split, fp8=True)


def test_only_the_tiles_that_are_named_are_computed() -> None:
    heads, kv, batch = attention_case(SPANS)
    assert batch.tiles is not None
    out = torch.full(heads.q.shape, float("nan")).flatten(1)
    chosen = batch.tiles[batch.tiles[:, 0] == 2]
    prompt_attention(heads.q, kv, batch, out, 0.2, 0, chosen)
    written = torch.zeros(len(out), dtype=torch.bool)
    written[batch.prompts[2].start :][: batch.prompts[2].count] = True
    assert torch.equal(~out.isnan().any(1), written)


@pytest.mark.parametrize(("window", "fp8"), [(0, False), (30, False), (500, False), (0, True)])
@pytest.mark.parametrize(
    ("spans", "at_once"),
    [
        (SPANS, [(1, 48)]),
        ([(41, 41)], [(1, 48)]),
        ([(48, 48)], [(1, 48)]),
        ([(48, 48), (48, 48)], [(2, 96)]),
        ([(1, 9), (48, 48), (30, 30), (90, 90)], [(1, 48), (1, 32)]),
        ([(1, 9), (48, 48), (41, 41), (46, 46), (30, 30)], [(2, 96), (1, 48), (1, 32)]),
    ],
    ids=str,
)
def test_each_row_of_a_batch_gets_its_kernel(
    spans: list[tuple[int, int]],
    at_once: list[tuple[int, int]],
    window: int,
    fp8: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, but for cuDNN: prompts of about 48 tokens without a prefix go to torch's plain attention."""
    monkeypatch.setattr(attention_plan, "FRESH_LENGTHS", (32, 48))
    monkeypatch.setattr(attention_device, "BACKENDS", [SDPBackend.MATH])
    served = []

    def count(heads: Heads, prompts: int, scale: float) -> torch.Tensor:
        served.append((prompts, len(heads.q)))
        return causal(heads, prompts, scale)

    causal = attention_device._causal
    monkeypatch.setattr(attention_device, "_causal", count)
    heads, kv, batch = attention_case(spans, dtype=torch.float16, fp8=fp8)
    out = attention_device.paged_attention(heads, kv, batch, 0.2, window)
    expected = paged_attention_device(heads, kv, batch, 0.2, window)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=1e-3)
    assert served == ([] if window == 30 else at_once)
