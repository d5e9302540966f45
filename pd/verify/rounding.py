"""transformers that attends to keys and values as a KV cache of one byte an element has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_NAME = "pd-rounding"
_MOST = 448.0


@contextmanager
def rounded_kv(model: Any, scales: Sequence[tuple[float, float]]) -> Iterator[None]:
    """Until the block ends, keys and values of `model` are rounded to float8_e4m3fn times their layer's scales.

    `scales`: of each layer's keys and values. What is beyond float8's largest number becomes that.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        k, v = (
            _rounded(one, scale).repeat_interleave(q.shape[1] // one.shape[1], dim=1)
            for one, scale in zip((k, v), scales[module.layer_idx], strict=True)
        )
        weights = (q @ k.transpose(2, 3) * scaling + mask[..., : k.shape[2]]).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before, model.config._attn_implementation = model.config._attn_implementation, _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _rounded(values: torch.Tensor, scale: float) -> torch.Tensor:
    return (values / scale).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn).to(values.dtype) * scale
