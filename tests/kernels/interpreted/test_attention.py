"""Decode attention by the interpreted kernels, against the reference."""

from __future__ import annotations

import pytest
import torch

from pd.kernels.attention_plan import DecodeSplit
from pd.kernels.attention_triton import DecodeConfig, decode_attention
from pd.kernels.reference import paged_attention_device
from tests.kernels.attention_kit import attention_case

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
CONTEXTS = [(1, context) for context in (1, 15, 0, 16, 33, 64, 65, 130, 0)]


def check_decode(
    window: int = 0, split: DecodeSplit | None = None, config: DecodeConfig | None = None, **case: object
) -> None:
    heads, kv, batch = attention_case(CONTEXTS, **case)  # type: ignore[arg-type]
    out = torch.full((len(CONTEXTS), heads.q[0].numel()), float("nan"), dtype=heads.q.dtype)
    decode_attention(heads.q, kv, batch, out, 0.2, window, split, config)
    expected = paged_attention_device(heads, kv, batch, 0.2, window)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[out.dtype], rtol=1e-5)
    assert not out[batch.lengths == 0].any(), "padding rows are zeros"
    assert batch.arrivals is None or not batch.arrivals.any(), "left as they were found"


@pytest.mark.parametrize("arrivals", [True, False], ids=["the last part combines", "a kernel combines"])
@pytest.mark.parametrize("split", [None, *(DecodeSplit(*one) for one in ((1, 1), (2, 1), (5, 32), (12, 1)))])
@pytest.mark.parametrize("window", [0, 1, 20, 64])
def test_decode_rows_see_their_own_tokens_whatever_the_parts(
    window: int, split: DecodeSplit | None, arrivals: bool
) -> None:
    """More parts than a row has steps, and rows of one part beside rows of many."""
    check_decode(window, split, DecodeConfig(step=16), arrivals=arrivals)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_reads_blocks_of_any_size(page: int, dtype: torch.dtype) -> None:
    check_decode(split=DecodeSplit(2, 1), page=page, dtype=dtype)


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 3), (7, 2), (8, 1), (20, 1)])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_decode_takes_any_number_of_heads(group: int, kv_heads: int, head_dim: int) -> None:
    check_decode(split=DecodeSplit(3, 1), group=group, kv_heads=kv_heads, head_dim=head_dim)
