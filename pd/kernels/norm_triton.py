"""RMS norm of one row per program, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pd.kernels.launch import launch_options

#: Widest row: what a program of 32 warps holds in registers.
MAX_COLUMNS = 1 << 15


@triton.jit
def norm_kernel(
    x, residual, weight, out, x_stride, residual_stride, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [T, COLUMNS], contiguous, is the norm of x, or of x + residual, which then replaces the residual.

    Everything is computed in float32. The sum, the scaled row and the result are rounded to x's type.
    """
    columns = tl.arange(0, BLOCK)
    seen = columns < COLUMNS
    row = tl.program_id(0).to(tl.int64)
    if weight is not None:
        gain = tl.load(weight + columns, mask=seen, other=0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + columns, mask=seen, other=0)
    if residual is not None:
        place = residual + row * residual_stride + columns
        value = (tl.load(place, mask=seen, other=0).to(tl.float32) + value.to(tl.float32)).to(value.dtype)
        tl.store(place, value, mask=seen)
    wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / COLUMNS + eps)
    if weight is not None:
        normed = gain.to(tl.float32) * normed.to(value.dtype).to(tl.float32)
    tl.store(out + row * COLUMNS + columns, normed.to(value.dtype), mask=seen)


@triton.jit
def scale_kernel(x, out, stride, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out float32[T]: the reciprocal of each row's root mean square."""
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    wide = tl.load(x + row * stride + columns, mask=columns < COLUMNS, other=0).to(tl.float32)
    tl.store(out + row, tl.rsqrt(tl.sum(wide * wide) / COLUMNS + eps))


def run_scale(x: torch.Tensor, eps: float, pdl: bool) -> torch.Tensor:
    """float32[T] of x [T, H]; rows may be any distance apart, their elements are neighbours, else ValueError."""
    rows, columns = x.shape
    if x.stride(1) != 1 or columns > MAX_COLUMNS:
        raise ValueError(f"x is [T, H] with contiguous rows of at most {MAX_COLUMNS} elements")
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):
        scale_kernel[(rows,)](
            x, out, x.stride(0), eps, COLUMNS=columns, BLOCK=block, **launch_options(warps(block), pdl=pdl)
        )
    return out


def run_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float, pdl: bool
) -> torch.Tensor:
    """rms_norm of x [T, H], or of x + `residual`, which is overwritten with the sum.

    Rows may be any distance apart, their elements are neighbours. ValueError for anything else, and above MAX_COLUMNS.
    """
    rows, columns = x.shape
    given = (x,) if residual is None else (x, residual)
    dtype = x.dtype if weight is None else weight.dtype
    if any(one.shape != x.shape or one.stride(1) != 1 or one.dtype != dtype for one in given):
        raise ValueError("x and residual are [T, H] with contiguous rows, of the weight's dtype")
    whole = weight is None or (weight.shape == (columns,) and weight.is_contiguous())
    if not whole or columns > MAX_COLUMNS:
        raise ValueError(f"the weight is contiguous, [{columns}], of at most {MAX_COLUMNS} elements")
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    options = launch_options(warps(block), pdl=pdl)
    with torch.cuda.device_of(x):
        norm_kernel[(rows,)](x, residual, weight, out, *strides, eps, COLUMNS=columns, BLOCK=block, **options)
    return out


def warps(block: int) -> int:
    """16 elements per thread: a row of 4,096 is read in two rounds, and reduced over few warps."""
    return min(max(block // 512, 1), 32)
