"""The KV pool: one span of memory, block-major, `[block, kv_head, layer, k|v, token, head_dim]`.

Block 0 is scratch: positions that have no block write there, and nothing that matters reads it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from pd.abc.transfer import Region, host_region
from pd.errors import ConfigError
from pd.kernels.attention import LayerKv
from pd.runner.cuda_memory import allocate_device_region, device_bytes
from pd.types import BlockShape

#: Most that the CPU's pool takes when neither its size nor its share is set: more would only cost page tables.
DEFAULT_CPU_CAP = 2 << 30
DEFAULT_CPU_SHARE = 0.15

#: Of the memory that a GPU has free, for weights and pool.
DEFAULT_GPU_SHARE = 0.88


#: Where a container's memory limit and use stand (cgroup v2).
CGROUP = Path("/sys/fs/cgroup")


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that may still be used on this host, and in this container where it has a limit."""
    free: int = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, max(0, int(limit) - int((cgroup / "memory.current").read_text())))
    except FileNotFoundError:  # no cgroup v2, or its root: no limit
        pass
    return free


def count_blocks(shape: BlockShape, *, max_total_tokens: int, fraction: float, free_bytes: int) -> int:
    """Blocks of the pool, scratch included.

    `max_total_tokens` > 0 decides alone; otherwise `fraction` of the free memory, by default DEFAULT_CPU_SHARE and at
    most DEFAULT_CPU_CAP. Raises ConfigError when that leaves no block to use.
    """
    if max_total_tokens > 0:
        blocks = -(-max_total_tokens // shape.tokens) + 1
        if blocks * shape.nbytes > free_bytes:
            needed = blocks * shape.nbytes / 2**30
            raise ConfigError(
                "--max-total-tokens",
                f"{max_total_tokens} tokens need {needed:.2f} GiB, {free_bytes / 2**30:.2f} are free",
            )
        return blocks
    room = int(free_bytes * fraction) if fraction > 0 else min(int(free_bytes * DEFAULT_CPU_SHARE), DEFAULT_CPU_CAP)
    if room < 2 * shape.nbytes:
        raise ConfigError("--mem-fraction-static", f"{room} bytes hold no KV block of {shape.nbytes} bytes")
    return room // shape.nbytes


def count_device_blocks(
    shape: BlockShape, *, max_total_tokens: int, fraction: float, free_before: int, free_bytes: int
) -> int:
    """Blocks of a GPU's pool, scratch included.

    `free_before` bytes were free before the weights came, `free_bytes` are free now. `max_total_tokens` > 0 decides
    alone; otherwise weights and pool take `fraction` of `free_before` (0: DEFAULT_GPU_SHARE), and what is left is for
    activations and graphs. Raises ConfigError when that leaves no block to use.
    """
    if max_total_tokens > 0:
        return count_blocks(shape, max_total_tokens=max_total_tokens, fraction=0.0, free_bytes=free_bytes)
    share = fraction or DEFAULT_GPU_SHARE
    room = int(free_bytes - (1 - share) * free_before)
    if room < 2 * shape.nbytes:
        weights = (free_before - free_bytes) / 2**30
        raise ConfigError(
            "--mem-fraction-static",
            f"{share} of {free_before / 2**30:.2f} GiB, of which weights take {weights:.2f}, holds no KV block",
            "raise it, or free memory of this GPU",
        )
    return room // shape.nbytes


def allocate_region(
    nbytes: int, supply: Callable[[int, str], Region | None] | None = None, device: str = "cpu"
) -> Region:
    """Memory of "cpu" or "cuda:N" for the pool: the backend's (`supply(nbytes, device)`), else our own, zeroed."""
    region = supply(nbytes, device) if supply is not None else None
    if region is None:
        region = (
            host_region(memoryview(mmap.mmap(-1, nbytes)))
            if device == "cpu"
            else allocate_device_region(nbytes, device)
        )
    usable = region.nbytes if region.buffer is None else region.buffer.nbytes
    if region.device != device or usable < nbytes or (device == "cpu" and region.buffer is None):
        raise ConfigError("--transfer", f"the backend's memory cannot hold a KV pool of {nbytes} bytes")
    return region


class KvPool:
    """Tensor views over a region that the caller keeps registered for as long as the pool lives."""

    def __init__(
        self,
        region: Region,
        shape: BlockShape,
        num_blocks: int,
        dtype: torch.dtype,
        scales: Sequence[tuple[float, float]] = (),
    ) -> None:
        """`scales`: of each layer's keys and values, where `dtype` is of one byte; none means 1."""
        assert dtype.itemsize == shape.itemsize and len(scales) in (0, shape.layers)
        self.region, self.shape, self.num_blocks = region, shape, num_blocks
        memory = device_bytes(region) if region.buffer is None else torch.frombuffer(region.buffer, dtype=torch.uint8)
        #: uint8, where it is
        self.memory = memory[: num_blocks * shape.nbytes]
        raw = self.memory.view(dtype)
        #: [block, kv_head, layer, k|v, token, head_dim]
        self.tensor = raw.view(num_blocks, shape.kv_heads, shape.layers, 2, shape.tokens, shape.head_dim)
        self.layers: Sequence[LayerKv] = [
            LayerKv(self.tensor[:, :, layer, 0], self.tensor[:, :, layer, 1], *(scales[layer] if scales else ()))
            for layer in range(shape.layers)
        ]
        self._bytes = self.memory.view(*self.tensor.shape[:-1], -1)

    @property
    def bytes(self) -> memoryview:
        """The pool's memory, where it is the host's."""
        assert self.region.buffer is not None
        return self.region.buffer

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of every head and layer of one block into another."""
        self._bytes[target, ..., :tokens, :] = self._bytes[source, ..., :tokens, :]
