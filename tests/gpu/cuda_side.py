"""An end of a transfer whose region is a GPU's memory (see `pd.testing.transfer_peer`); run as a program, in a process.

PD_TEST_CUDA_DEVICE is the GPU's number in the process, PD_TEST_NO_CUDA_IPC=1 stands for a container without IPC.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pd.abc import DeviceMemory, Region
from pd.errors import TransferError
from pd.runner.cuda_ipc import CudaMapping
from pd.runner.cuda_memory import CudaMemory, allocate_device_region
from pd.testing.transfer_peer import Side, main
from pd.transfer.queues import POSTS_IN_FLIGHT
from pd.transfer.workers import POLL_FIRST


class Isolated(CudaMemory):
    """As in a container of its own."""

    def open(self, handle: bytes, sizes: Sequence[int]) -> CudaMapping:
        raise TransferError("no IPC here")


@functools.cache
def cuda_memory(index: int, isolated: bool) -> CudaMemory:
    return Isolated(index) if isolated else CudaMemory(index)


class CudaSide(Side):
    def device_memory(self) -> DeviceMemory:
        isolated = os.environ.get("PD_TEST_NO_CUDA_IPC") == "1"
        memory = cuda_memory(int(os.environ.get("PD_TEST_CUDA_DEVICE", "0")), isolated)
        memory.enter()
        return memory

    def allocate(self, nbytes: int) -> Region:
        return allocate_device_region(nbytes, self.device.device)

    def contents(self, region: int) -> np.ndarray:
        data = np.empty(self.regions[region].nbytes, dtype=np.uint8)
        self.device.copy(self.regions[region], 0, data.data, to_device=False)
        return data

    def write(self, offset: int, data: np.ndarray, region: int = 0) -> None:
        self.device.copy(self.regions[region], offset, np.ascontiguousarray(data).data, to_device=True)

    def ways(self) -> dict[str, int]:
        """Connections of this sender by the way that their bytes go."""
        return dict(self.backend.ways)  # type: ignore[attr-defined]

    def handle(self) -> str:
        assert isinstance(self.device, CudaMemory)
        return self.device.export([self.region]).hex()

    def send_all(self, peer: str, block: int, tag: int, times: int) -> float:
        """Seconds to send the whole region so many times, in blocks from random places."""
        count = self.region.nbytes // block
        spans = np.zeros((count, 5), dtype=np.uint64)
        spans[:, 1] = np.random.default_rng(block).permutation(count) * block
        spans[:, 3] = np.arange(count) * block
        spans[:, 4] = block
        step, there, waiting = self.capabilities.max_spans_per_post, self._peers[peer], list[Any]()
        left = [spans[i : i + step] for i in range(0, count, step)] * times
        start = time.perf_counter()
        while left or waiting:
            while left and len(waiting) < POSTS_IN_FLIGHT:
                waiting.append(self.backend.post(there, left.pop(), tag))
            waiting = [ticket for ticket in waiting if not self.backend.poll(ticket)]
            time.sleep(POLL_FIRST)
        return time.perf_counter() - start


if __name__ == "__main__":
    main(CudaSide)
