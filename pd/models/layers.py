"""Pieces that models share: a linear projection and RoPE's frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pd.models.dense import RopeConfig


@dataclass(frozen=True)
class Linear:
    """weight [out, in], bias [out] or None; x [T, in] -> [T, out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def inverse_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    """float32[head_dim / 2]; position * frequency is the rotation's angle.

    "linear" divides every frequency by `factor`. "llama3" (Llama 3.1's release) divides those whose wavelength exceeds
    original_context / low_freq_factor, keeps those below original_context / high_freq_factor, and interpolates between.
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
    return frequencies.to(device)
