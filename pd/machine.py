"""What this machine has, as far as it can be seen without torch, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path


def has_accelerator() -> bool:
    """Whether the kernel shows one: NVIDIA's or Ascend's."""
    return has_cuda_gpu() or any(Path("/dev").glob("davinci[0-9]*"))


def has_cuda_gpu() -> bool:
    """Whether one of NVIDIA's is among them (under WSL2 /dev/dxg): what `--device auto` computes on."""
    return any(any(Path("/dev").glob(pattern)) for pattern in ("nvidia[0-9]*", "dxg"))
