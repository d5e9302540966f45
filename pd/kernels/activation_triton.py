"""silu(gate) * up, elementwise over two halves of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pd.kernels.launch import launch_options

WARPS = 4


@triton.jit
def silu_mul_kernel(gate_up, scale, out, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """gate_up [T, 2 COLUMNS], its rows `stride` apart; scale float32[T] or None; out [T, COLUMNS], contiguous.

    In float32; silu is rounded to the type of both before the product, as torch does.
    """
    program = tl.program_id(0)
    parts: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = (program // parts).to(tl.int64)
    columns = program % parts * BLOCK + tl.arange(0, BLOCK)
    seen = columns < COLUMNS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = gate_up + row * stride + columns
    gate = tl.load(place, mask=seen)
    up = tl.load(place + COLUMNS, mask=seen)
    if scale is not None:
        factor = tl.load(scale + row)
        gate = (gate.to(tl.float32) * factor).to(gate.dtype)
        up = (up.to(tl.float32) * factor).to(up.dtype)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * COLUMNS + columns, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=seen)


def run_silu_mul(gate_up: torch.Tensor, pdl: bool, scale: torch.Tensor | None = None) -> torch.Tensor:
    """[T, 2 I] -> [T, I]. Rows may be any distance apart, their elements are neighbours; else ValueError."""
    rows, width = gate_up.shape
    if width % 2 or gate_up.stride(1) != 1:
        raise ValueError("gate_up is [T, 2 I] with contiguous rows")
    columns = width // 2
    out = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    block = block_of(rows)
    with torch.cuda.device_of(gate_up):
        silu_mul_kernel[(rows * triton.cdiv(columns, block),)](
            gate_up, scale, out, gate_up.stride(0), COLUMNS=columns, BLOCK=block, **launch_options(WARPS, pdl=pdl)
        )
    return out


def block_of(rows: int) -> int:
    """Columns of a program: 8 per thread, many programs, for a few rows; 16, fewer and longer ones, for many."""
    return 1024 if rows <= 64 else 2048
