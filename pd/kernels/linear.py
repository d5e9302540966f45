"""Linear projections: few rows by kernels that stream the weight, where those beat cuBLAS."""

from __future__ import annotations

import functools

import torch

from pd.kernels.linear_configs import Config, config_for


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] or None -> x weight^T + bias, [T, N]."""
    config = _config(x, weight)
    if config is None:
        return torch.nn.functional.linear(x, weight, bias)
    from pd.kernels import linear_triton

    return linear_triton.launch(x, weight, bias, config)


def add_linear(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """residual [T, N] += x [T, K] weight[N, K]^T, rounded once; for many rows (cuBLAS reads the residual while it
    multiplies).
    """
    torch.addmm(residual, x, weight.t(), out=residual)


def _config(x: torch.Tensor, weight: torch.Tensor) -> Config | None:
    """The launch of a kernel; None where torch does it."""
    if not x.is_cuda or x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        return None
    config = config_for(x.shape[0], weight.shape[0], weight.shape[1])
    if config is None or not (_is_hopper(x.device) and _accessible(x) and weight.is_contiguous()):
        return None
    return config


def _accessible(x: torch.Tensor) -> bool:
    """Rows of whole 32 bytes that start at a multiple of 16, as every access of 16 bytes and the copy engine need."""
    return x.stride(1) == 1 and x.shape[1] % 16 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)
