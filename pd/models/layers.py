"""Pieces that models share: a linear projection and RoPE's frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pd.kernels.linear import linear
from pd.models.rope import RopeConfig


@dataclass(frozen=True)
class Linear:
    """weight [out, in], bias [out] or None; x [T, in] -> [T, out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    """float32[head_dim / 2]; position * frequency is the rotation's angle.

    "linear" divides every frequency by `factor`. "llama3" (Llama 3.1's release) divides those whose wavelength exceeds
    original_context / low_freq_factor, keeps those below original_context / high_freq_factor, and interpolates between.
    "yarn" (https://arxiv.org/abs/2309.00071) keeps the frequencies that turn more than beta_fast times within
    original_context, divides those that turn less than beta_slow times, and blends linearly, by index, between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = (rope.original_context / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        scaled = torch.where(wavelengths > rope.original_context / low, frequencies / rope.factor, between)
        frequencies = torch.where(wavelengths < rope.original_context / high, frequencies, scaled)
    elif rope.kind == "yarn":
        first, last = _yarn_range(rope, head_dim)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)
        kept = 1 - ramp.clamp(0, 1)
        divided = 1.0 / (rope.factor * rope.theta**exponents)
        frequencies = divided * (1 - kept) + frequencies * kept
    return frequencies.to(device)


def _yarn_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Indices of the frequencies that turn beta_fast and beta_slow times within the original context."""

    def index(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last + 0.001 if first == last else last
