"""`pd.abc.transfer.SharedDeviceMemory` of a CUDA GPU, and memory of one as a `Region`."""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pd.abc.transfer import MappedMemory, Region
from pd.errors import ConfigError, TransferError
from pd.kernels.digest import digest_spans
from pd.runner.cuda_ipc import SPANS, CudaMapping, CudaPull, CudaPulls

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

#: Bytes of a pinned buffer: long enough for PCIe's full speed, short enough that what the host copies stays cached.
CHUNK = 4 << 20

#: Copies at a time. They are made of the host's memory bandwidth, of which a few threads take all.
LANES = 4

#: Numbers of the CUDA runtime: cudaDevAttrGPUDirectRDMAFlushWritesOptions, …WritesOrdering, and their values.
_FLUSH_OPTIONS, _FLUSH_BY_HOST = 117, 1
_WRITES_ORDERING, _TO_OWNER = 118, 100
_CURRENT_DEVICE = 0


def allocate_device_region(nbytes: int, device: str) -> Region:
    """Zeroed memory of "cuda:N" that any stream may use. Raises ConfigError where so much is not free."""
    try:
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "--mem-fraction-static", f"{device} has no {nbytes / 2**30:.2f} GiB free for the KV pool", "set less"
        ) from error
    torch.cuda.synchronize(device)  # the zeros are there before another stream writes
    return Region(index=0, address=memory.data_ptr(), nbytes=nbytes, device=device, owner=memory)


def device_bytes(region: Region) -> torch.Tensor:
    """uint8[nbytes] over the region's own memory: a part of its owner where that is a tensor, else of no one's."""
    owner = region.owner
    if isinstance(owner, torch.Tensor) and owner.is_contiguous():
        raw, start = owner.view(-1).view(torch.uint8), region.address - owner.data_ptr()
        if 0 <= start <= raw.numel() - region.nbytes:
            return raw[start : start + region.nbytes]
    return torch.as_tensor(_Foreign(region), device=region.device)


def copy_region(source: Region, target: Region, nbytes: int) -> None:
    """Plain copy of the first bytes of a region to another, on the same GPU or between two; returns when done."""
    device_bytes(target)[:nbytes].copy_(device_bytes(source)[:nbytes], non_blocking=True)
    for region in (source, target):
        torch.cuda.synchronize(region.device)


def device_names() -> list[str]:
    """The GPUs of this process; "cuda:N" is number N."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


class _Foreign:
    """Device memory that torch did not allocate, in the form in which torch takes it; the tensor keeps this alive."""

    def __init__(self, region: Region) -> None:
        self._region = region

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self._region.nbytes,),
            "typestr": "|u1",
            "data": (self._region.address, False),
            "version": 2,
        }


class CudaMemory:
    """Thread-safe: CUDA's current device and torch's current stream belong to a thread, so every method sets its own.

    Its streams wait for no other stream, and none for them: a transfer never waits behind a step. So what `digest` and
    `copy` read must be complete when they are called, as memory that was landed or whose step is done is; and they
    return when they are done.
    """

    def __init__(self, index: int, alone: Callable[[], bool] = lambda: False) -> None:
        """Of "cuda:`index`". `alone` may say, from any thread, that no step runs: pulls then take the whole GPU."""
        self._device = torch.device("cuda", index)
        runtime = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")  # torch has loaded it
        with torch.cuda.device(self._device):
            self._digests = torch.cuda.Stream()
            self._flush = _remote_writes_flush(runtime, index)
            # Made before there are steps: to pin memory can make the driver wait for all that runs.
            self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
            for _ in range(LANES):
                self._lanes.put(_Lane())
        self.pulls = CudaPulls(self._device, runtime, alone)
        self._warm_up()

    @property
    def device(self) -> str:
        return str(self._device)

    def digest(self, regions: Sequence[Region], spans: U64, keys: U64) -> U64:
        out = np.zeros(len(spans), dtype=np.uint64)
        for index in np.unique(spans[:, 0]).tolist():
            mine = spans[:, 0] == index
            table = np.column_stack((spans[mine, 1:], keys[mine]))
            memory = self._span(regions[index], 0, int((table[:, 0] + table[:, 1]).max()))
            with torch.cuda.device(self._device), torch.cuda.stream(self._digests):
                digests = digest_spans(memory, table.astype(np.int64)).cpu()
            out[mine] = digests.numpy().view(np.uint64)
        return out

    def copy(self, region: Region, offset: int, buffer: memoryview, *, to_device: bool) -> None:
        memory = self._span(region, offset, buffer.nbytes)
        host = np.frombuffer(buffer, dtype=np.uint8)
        with self._lane() as lane:
            if to_device:
                lane.store(host, memory)
            else:
                lane.load(memory, host)

    def enter(self) -> None:
        torch.cuda.set_device(self._device)

    def fence(self) -> None:
        """No stream needs to wait: a kernel sees every write that had completed when it was launched.

        A copy or a peer's kernel writes through this device's L2 cache, where its kernels read, and their L1 caches
        begin empty. Who calls this has seen the writes complete, and the work that is to see them is launched later:
        whatever was launched before (a step is ordered while another one runs) uses other blocks.

        A network card's writes are another matter: that they were acknowledged to the peer does not mean that they have
        left the PCIe bus, and not every GPU orders them before later kernels by itself.
        """
        with torch.cuda.device(self._device):
            self._flush()

    @property
    def pull_spans(self) -> int:
        return SPANS

    def export(self, regions: Sequence[Region]) -> bytes:
        return self.pulls.export(regions)

    def open(self, handle: bytes, sizes: Sequence[int]) -> CudaMapping:
        return self.pulls.open(handle, sizes)

    def prepare(self, mapped: MappedMemory, source: int, region: Region, spans: I64, words: U64 | None) -> CudaPull:
        assert isinstance(mapped, CudaMapping)
        return self.pulls.prepare(mapped, source, self._span(region, 0, region.nbytes), spans, words)

    def _span(self, region: Region, offset: int, length: int) -> torch.Tensor:
        if region.device != self.device:
            raise TransferError(f"region {region.index} is memory of {region.device}, not of {self.device}")
        if offset < 0 or offset + length > region.nbytes:
            raise TransferError(f"bytes {offset}..{offset + length} outside region {region.index} of {region.nbytes}")
        return device_bytes(region)[offset : offset + length]

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """A lane for this thread alone; where all are taken, after one of the copies in them."""
        lane = self._lanes.get()
        try:
            with torch.cuda.device(self._device):
                yield lane
        finally:
            self._lanes.put(lane)

    def _warm_up(self) -> None:
        """Compile now what the first hand-offs need, and not in two threads at once."""
        words = torch.zeros(4, dtype=torch.int64, device=self._device)
        region = Region(0, words.data_ptr(), 32, self.device, owner=words)
        torch.cuda.synchronize(self._device)
        for offset in (0, 8):  # aligned to 16 bytes, and not
            self.digest([region], np.array([[0, offset, 16]], np.uint64), np.zeros(1, np.uint64))


class _Lane:
    """A stream and two pinned buffers: while one is on its way the host fills or empties the other."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._done = [torch.cuda.Event(blocking=True) for _ in range(2)]  # blocking: waiting takes no CPU time

    def store(self, host: U8, memory: torch.Tensor) -> None:
        """Host to device."""
        with torch.cuda.stream(self._stream):
            for i, start in enumerate(range(0, len(host), CHUNK)):
                self._done[i % 2].synchronize()  # what it held before has left; at once if it never held anything
                part = host[start : start + CHUNK]
                staged = self._buffers[i % 2][: len(part)]
                np.copyto(staged.numpy(), part)
                memory[start : start + CHUNK].copy_(staged, non_blocking=True)
                self._done[i % 2].record()
            for done in self._done:
                done.synchronize()

    def load(self, memory: torch.Tensor, host: U8) -> None:
        """Device to host."""
        starts = range(0, len(host), CHUNK)
        with torch.cuda.stream(self._stream):
            for i, start in enumerate(starts):
                part = memory[start : start + CHUNK]
                self._buffers[i % 2][: len(part)].copy_(part, non_blocking=True)
                self._done[i % 2].record()
                if i:
                    self._empty(i - 1, host[starts[i - 1] : start])
            if starts:
                self._empty(len(starts) - 1, host[starts[-1] :])

    def _empty(self, i: int, part: U8) -> None:
        self._done[i % 2].synchronize()
        np.copyto(part, self._buffers[i % 2][: len(part)].numpy())


def _remote_writes_flush(runtime: ctypes.CDLL, index: int) -> Callable[[], None]:
    """What makes the writes of a network card visible to later kernels of the current device; nothing if they are."""

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(runtime.cudaDeviceGetAttribute(ctypes.byref(value), number, index), "cudaDeviceGetAttribute")
        return value.value

    if attribute(_WRITES_ORDERING) >= _TO_OWNER or not attribute(_FLUSH_OPTIONS) & _FLUSH_BY_HOST:
        return lambda: None
    flush = runtime.cudaDeviceFlushGPUDirectRDMAWrites
    return lambda: _check(flush(_CURRENT_DEVICE, _TO_OWNER), "cudaDeviceFlushGPUDirectRDMAWrites")


def _check(code: int, call: str) -> None:
    if code:
        raise TransferError(f"{call} failed with CUDA error {code}")
