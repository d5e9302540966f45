"""The gated activation of the MLP."""

from __future__ import annotations

import torch

from pd.kernels import reference


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 I] (gate, then up) -> silu(gate) * up, [T, I]."""
    return reference.silu_mul(gate_up)
