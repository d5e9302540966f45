"""A read of memory that keeps nothing: what the rate of an op that only reads is compared with."""

from __future__ import annotations

import torch


def read_all(memory: torch.Tensor) -> torch.Tensor:
    """Reads every word of int32[n], n a multiple of 4,096, on its GPU; int32[n / 4096] sums."""
    from pd.kernels.bandwidth_triton import launch_read

    return launch_read(memory)
