"""RMS normalisation, alone and fused with the residual addition before it.

Where a weight is None the norm has no gain: it was multiplied into the projection that follows.
"""

from __future__ import annotations

import torch

from pd.kernels import reference
from pd.kernels.launch import pdl_supported


def rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] -> float32[T], what RMS normalisation multiplies each row by.

    A linear projection of the normed row is the projection of the row, times this: so a large batch is projected as it
    is, and whoever reads the result anyway scales it. That saves writing and reading the normed rows.
    """
    if not x.is_cuda:
        return reference.rms_scale(x, eps)
    from pd.kernels.norm_triton import run_scale

    return run_scale(x, eps, pdl_supported(x.device))


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [T, H], weight [H] or None -> [T, H] in x's dtype; the mean square is taken in float32."""
    if not x.is_cuda:
        return reference.rms_norm(x, weight, eps)
    from pd.kernels.norm_triton import run_norm

    return run_norm(x, None, weight, eps, pdl_supported(x.device))


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its rms_norm: (normed [T, H], new residual [T, H]). `residual` is overwritten."""
    if not x.is_cuda:
        return reference.add_rms_norm(x, residual, weight, eps)
    from pd.kernels.norm_triton import run_norm

    return run_norm(x, residual, weight, eps, pdl_supported(x.device)), residual
