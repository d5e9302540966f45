"""RMS normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch

from pd.kernels import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H], weight [H] -> [T, H] in x's dtype; the mean square is taken in float32."""
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its rms_norm: (normed [T, H], new residual [T, H]). `residual` is overwritten."""
    return reference.add_rms_norm(x, residual, weight, eps)
