"""The memory at one end of `pd bench transfer`: the host's or a GPU's. Torch is imported for a GPU only."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from pd.abc import DeviceMemory, Region, Spans, TransferBackend, host_region
from pd.errors import ConfigError
from pd.ipc.memory import SharedMemory
from pd.runner.memory import HostMemory
from pd.testing.transfer_peer import pattern

U64 = npt.NDArray[np.uint64]

#: Bytes that are written to a pool at a time.
CHUNK = 64 << 20


def parse_device(text: str, flag: str) -> str:
    """ "cpu" or "cuda:N"; "cuda" is the first GPU. Raises ConfigError for anything else, or a GPU not here."""
    kind, colon, number = text.partition(":")
    if text == "cpu":
        return text
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ConfigError(flag, f"{text!r} is no device", "cpu, cuda or cuda:N")
    there = device_names()
    if int(number or 0) >= len(there):
        raise ConfigError(flag, f"no {text} on this machine", f"GPUs that torch sees: {', '.join(there) or 'none'}")
    return f"cuda:{int(number or 0)}"


def device_names() -> list[str]:
    """The GPUs that torch sees."""
    from pd.runner.cuda_memory import device_names

    return device_names()


@functools.cache
def device_memory(device: str) -> DeviceMemory:
    if device == "cpu":
        return HostMemory()
    from pd.runner.cuda_memory import CudaMemory

    return CudaMemory(int(device.partition(":")[2]), alone=lambda: True)  # nothing here computes


def allocate(backend: TransferBackend, nbytes: int, device: str) -> Region:
    """A pool as a runner lays it: the backend's own memory, else a memfd or plain memory of the GPU."""
    region = backend.allocate(nbytes, device) if backend.capabilities.allocates else None
    if region is not None:
        return region
    if device != "cpu":
        return allocate_on_gpu(nbytes, device)
    shared = SharedMemory.create("pd-bench", nbytes)
    return host_region(shared.buffer, shared)


def allocate_on_gpu(nbytes: int, device: str) -> Region:
    """Raises ConfigError where so much is not free."""
    from pd.runner.cuda_memory import allocate_device_region

    try:
        return allocate_device_region(nbytes, device)
    except ConfigError as error:
        raise ConfigError("--bytes", f"{device} has no {nbytes / 2**30:.2f} GiB free for a pool", "set less") from error


def fill(region: Region, seed: int) -> None:
    """Random bytes, the same for the same seed and size; every page is touched."""
    data, memory = pattern(seed, region.nbytes), device_memory(region.device)
    for start in range(0, region.nbytes, CHUNK):
        memory.copy(region, start, data[start : start + CHUNK].data, to_device=True)


def clear(region: Region) -> None:
    zeros, memory = bytearray(min(CHUNK, region.nbytes)), device_memory(region.device)
    for start in range(0, region.nbytes, CHUNK):
        part = memoryview(zeros)[: region.nbytes - start]
        memory.copy(region, start, part, to_device=True)


def span_digests(region: Region, spans: Spans, side: int) -> U64:
    """Of what spans name in `region`: by their local columns (`side` 0) or by their remote ones (2)."""
    table = np.zeros((len(spans), 3), dtype=np.uint64)
    table[:, 1], table[:, 2] = spans[:, side + 1], spans[:, 4]
    found: U64 = device_memory(region.device).digest([region], table, np.zeros(len(spans), np.uint64))
    return found
