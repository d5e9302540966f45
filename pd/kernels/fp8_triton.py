"""float8_e4m3fn (Triton's float8e4nv) in kernels: what is written saturates, what is read in pairs."""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def to_fp8(values):
    """float32 to nearest even; what is larger than 448 becomes 448. Comparisons are false of NaN, which so remains."""
    values = tl.where(values > FP8_MAX, FP8_MAX, values)
    return tl.where(values < -FP8_MAX, -FP8_MAX, values).to(tl.float8e4nv)


@triton.jit
def first_of_pairs(words, kind: tl.constexpr):
    """int16, each two neighbouring elements -> the first ones, in `kind`."""
    return words.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(kind)


@triton.jit
def second_of_pairs(words, kind: tl.constexpr):
    return (words >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(kind)
