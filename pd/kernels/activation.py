"""The gated activation of the MLP."""

from __future__ import annotations

import torch

from pd.kernels import reference
from pd.kernels.launch import pdl_supported


def silu_mul(gate_up: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """[T, 2 I] (gate, then up) -> silu(gate) * up, [T, I]; with `scale` float32[T], of the rows times it."""
    if not gate_up.is_cuda:
        return reference.silu_mul(gate_up, scale)
    from pd.kernels.activation_triton import run_silu_mul

    return run_silu_mul(gate_up, pdl_supported(gate_up.device), scale)
