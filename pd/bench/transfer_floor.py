"""What no backend beats by much: the simplest copy of the same bytes, by the benchmark's own process."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from pd.abc import Region, Spans
from pd.bench.transfer_pool import allocate_on_gpu, fill


class Floor(Protocol):
    what: str

    def pump(self, spans: Spans) -> tuple[float, float]:
        """(seconds, CPU seconds)."""


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds of this process)."""
    cpu, start = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


class HostCopy:
    """The spans copied out of another process's memory, one memmove each, by the simplest loop."""

    what = "one memmove for each span, from the sender's shared memory"

    def __init__(self, source: mmap.mmap, target: Region) -> None:
        self._source, self._target = np.frombuffer(source, dtype=np.uint8), target

    def pump(self, spans: Spans) -> tuple[float, float]:
        source, target = np.uint64(self._source.ctypes.data), np.uint64(self._target.address)
        rows = np.column_stack((spans[:, 3] + target, spans[:, 1] + source, spans[:, 4])).tolist()
        move = ctypes.memmove

        def copy() -> None:
            for there, here, length in rows:
                move(there, here, length)

        return timed(copy)


class DeviceCopy:
    """As many bytes in one plain copy: within a GPU, or from one to another. Its source is memory of its own."""

    def __init__(self, device: str, target: Region) -> None:
        from pd.runner.cuda_memory import copy_region

        self._source, self._target, self._copy = allocate_on_gpu(target.nbytes, device), target, copy_region
        fill(self._source, 1)
        self.what = f"one plain copy of as many bytes, {device} to {target.device}"

    def pump(self, spans: Spans) -> tuple[float, float]:
        nbytes = int(spans[:, 4].sum())
        return timed(lambda: self._copy(self._source, self._target, nbytes))
