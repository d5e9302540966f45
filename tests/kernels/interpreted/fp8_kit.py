"""Triton's interpreter converts float8_e4m3fn as a GPU does: of itself it rounds without carry, and knows no NaN there.

What it gets wrong (3.6 to 3.9): 127.9 becomes 64 and not 128, 0.0015 becomes 0 and not 2^-9, NaN becomes 480 and back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FP8 = torch.float8_e4m3fn


def round_fp8_as_hardware() -> None:
    """For the rest of the process; every other conversion stays as it was."""
    plain = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float8e4nv and target in (tl.float16, tl.float32):
            exact = _tensor(values, np.uint8).view(FP8).float().numpy()
            kind, bits = (np.float16, np.uint16) if target == tl.float16 else (np.float32, np.uint32)
            return exact.astype(kind).view(bits)
        if target == tl.float8e4nv and source in (tl.float16, tl.float32):
            wide = _tensor(values, np.float16 if source == tl.float16 else np.float32).float()
            return wide.clamp(-448, 448).to(FP8).view(torch.uint8).numpy()
        return plain(values, source, target, rounding)

    interpreter._convert_float = convert


def _tensor(values: Any, kind: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).view(kind))
