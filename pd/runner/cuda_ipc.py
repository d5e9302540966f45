"""CUDA IPC: memory of this GPU for other processes of the host, theirs mapped here, and pulls out of it.

A handle stands for a whole allocation, which another process maps with its own GPU current, whichever GPU the memory is
of and whether or not `CUDA_VISIBLE_DEVICES` shows it that one. So no device numbers are exchanged: what counts is
whether the mapping can be read, and a probe tells.

A pull is launched in slices on a stream of its own, each as wide as the GPU is free (`pd.runner.cuda_slices`).
"""

from __future__ import annotations

import ctypes
import queue
import secrets
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from pd.abc.transfer import Region
from pd.errors import TransferError
from pd.kernels.block_copy import copy_share, plan_share
from pd.kernels.spans import Share, as_words
from pd.runner.cuda_slices import Slices, Width, widths
from pd.transfer.digest import digest_span

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

#: Spans of one pull, and pulls that may be prepared.
SPANS, LANES = 1 << 14, 4

#: Bytes of the probe.
PROBE = 4096

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class _Span(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of an allocation."""

    handle: bytes
    offset: int
    nbytes: int


class _Export(msgspec.Struct, frozen=True, array_like=True, tag="cuda-ipc/1"):
    """Of some regions on the GPU `uuid`, and of bytes that are known to both sides."""

    uuid: str
    regions: list[_Span]
    probe: _Span
    digest: int


class CudaMapping:
    """Memory of another process: a tensor int64[words] per region, said to be of the device here, which reads it.

    `own`: it is memory of this very GPU.
    """

    def __init__(self, device: torch.device, runtime: ctypes.CDLL, own: bool) -> None:
        self._device, self._runtime, self.own = device, runtime, own
        self._bases: list[int] = []
        self.words: list[torch.Tensor] = []

    def add(self, span: _Span) -> None:
        """Map one more. Raises TransferError."""
        if len(span.handle) != _HANDLE_BYTES or not 0 <= span.offset < 1 << 48 or not 0 < span.nbytes < 1 << 48:
            raise TransferError("not a handle of CUDA memory")
        handle, base = _Handle.from_buffer_copy(span.handle), ctypes.c_void_p()
        # By the runtime and not by torch, which would count the users of this memory in a file that both sides open.
        code = self._runtime.cudaIpcOpenMemHandle(ctypes.byref(base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
        _check(self._runtime, code, "cudaIpcOpenMemHandle")
        assert base.value is not None
        self._bases.append(base.value)
        # Not through __cuda_array_interface__: torch would ask where the memory is, and copy it here.
        storage = torch._C._construct_storage_from_data_pointer(base.value + span.offset, self._device, span.nbytes)
        self.words.append(as_words(torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)))

    def close(self) -> None:
        self.words.clear()
        with torch.cuda.device(self._device):
            while self._bases:
                code = self._runtime.cudaIpcCloseMemHandle(ctypes.c_void_p(self._bases.pop()))
                _check(self._runtime, code, "cudaIpcCloseMemHandle")


class CudaPull:
    """One pull: `pd.abc.transfer.Pull`."""

    def __init__(self, pulls: CudaPulls, lane: _Lane) -> None:
        self._pulls, self._lane = pulls, lane

    def start(self) -> None:
        self._pulls.start(self._lane)

    def finish(self) -> U64:
        return self._pulls.finish(self._lane)

    def release(self) -> None:
        self._pulls.give_back(self._lane)


class CudaPulls:
    """The pulls of one GPU. Thread-safe. `alone` says whether the GPU has nothing else to do."""

    def __init__(self, device: torch.device, runtime: ctypes.CDLL, alone: Callable[[], bool]) -> None:
        self._device, self._runtime, self.alone = device, runtime, alone
        with torch.cuda.device(device):
            # First in line: a slice is short or bounded, and what it brings is waited for.
            stream = torch.cuda.Stream(priority=-1)
            properties = torch.cuda.get_device_properties(device)
            self._uuid = str(properties.uuid)
            self.widths = dict(widths(properties.multi_processor_count))
            self._slices = Slices(lambda own: self.widths[self.alone(), own])
            # All that pulls need is made now: to allocate or pin memory can make the driver wait for all that runs.
            self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()
            for _ in range(LANES):
                self._lanes.put(_Lane(device, stream))
            self._probe = torch.from_numpy(np.frombuffer(secrets.token_bytes(PROBE), np.uint8).copy()).to(device)
            self._found = torch.zeros(PROBE, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
        self._digest = digest_span(self._probe.cpu().numpy(), 0)
        self._warm_up()

    # --- ours, for others ---

    def export(self, regions: Sequence[Region]) -> bytes:
        with torch.cuda.device(self._device):
            self._runtime.cudaFree(None)  # frees nothing: the driver's call below needs the context to be this thread's
            spans = [self._export(region.address, region.nbytes) for region in regions]
            probe = self._export(self._probe.data_ptr(), PROBE)
        return msgspec.msgpack.encode(_Export(self._uuid, spans, probe, self._digest))

    def _export(self, address: int, nbytes: int) -> _Span:
        driver = ctypes.CDLL("libcuda.so.1")
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        code = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        if code:
            raise TransferError(f"cuMemGetAddressRange failed with CUDA error {code}")
        if address + nbytes > base.value + size.value:
            raise TransferError("memory of several allocations has no handle: unset expandable_segments")
        handle = _Handle()
        code = self._runtime.cudaIpcGetMemHandle(ctypes.byref(handle), ctypes.c_void_p(base.value))
        _check(self._runtime, code, "cudaIpcGetMemHandle")
        return _Span(bytes(handle), address - base.value, nbytes)

    # --- theirs, here ---

    def open(self, handle: bytes, sizes: Sequence[int]) -> CudaMapping:
        try:
            export = msgspec.msgpack.decode(handle, type=_Export)
        except msgspec.MsgspecError as error:
            raise TransferError(f"no handle of CUDA memory: {error}") from error
        if [span.nbytes for span in export.regions] != list(sizes) or export.probe.nbytes != PROBE:
            raise TransferError("handles of other regions")
        mapping = CudaMapping(self._device, self._runtime, export.uuid == self._uuid)
        try:
            with torch.cuda.device(self._device):
                for span in (*export.regions, export.probe):
                    mapping.add(span)
            if self._read_probe(mapping, len(export.regions)) != export.digest:
                raise TransferError("memory of the peer's GPU is not read right from this one")
        except BaseException:
            mapping.close()
            raise
        return mapping

    def _read_probe(self, mapping: CudaMapping, index: int) -> int:
        pull = self.prepare(mapping, index, self._found, np.array([[0, 0, PROBE]]), np.zeros(1, np.uint64))
        try:
            pull.start()
            return int(pull.finish()[0])
        finally:
            pull.release()

    def prepare(
        self, mapping: CudaMapping, source: int, target: torch.Tensor, spans: I64, words: U64 | None
    ) -> CudaPull:
        """See `pd.abc.transfer.SharedDeviceMemory`; `target` is the region's memory."""
        positions = words.astype(np.int64) if words is not None else np.zeros(len(spans), np.int64)
        lane = self._lanes.get()
        try:
            lane.plan(mapping.words[source], as_words(target), mapping.own, spans, positions)
        except BaseException:
            self._lanes.put(lane)
            raise
        return CudaPull(self, lane)

    def start(self, lane: _Lane) -> None:
        with torch.cuda.device(self._device):
            self._slices.add(lane)

    def finish(self, lane: _Lane) -> U64:
        with torch.cuda.device(self._device):
            self._slices.launched(lane)
            sums = lane.finish()
            self._slices.go_on()
        return sums

    def give_back(self, lane: _Lane) -> None:
        lane.forget()
        self._lanes.put(lane)

    def _warm_up(self) -> None:
        """Compile now what pulls need, and not in two threads at once."""
        words, target = torch.zeros(PROBE // 8, dtype=torch.int64, device=self._device), as_words(self._found)
        torch.cuda.synchronize(self._device)
        lane = self._lanes.get()
        with torch.cuda.device(self._device):
            for width in {width.form: width for width in self.widths.values()}.values():
                for offset in (0, 8):  # aligned to 16 bytes, and not
                    lane.plan(words, target, True, np.array([[offset, 0, 16]]), np.zeros(1, np.int64))
                    lane.launch(0, lane.tiles, width)
                    lane.finish()
        self.give_back(lane)


class _Lane:
    """What one pull needs: its table and digests, in pinned memory and on the device, and a stream that brings them.

    That they have one of their own lets them travel while the pull before is under way.
    """

    def __init__(self, device: torch.device, pulls: torch.cuda.Stream) -> None:
        """`pulls`: the stream on which the kernels run."""
        # Digests, which begin as zeros, and the table lie together: one copy brings both.
        size = _table_start(SPANS) + 5 * (SPANS + 1)
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._there = torch.zeros(size, dtype=torch.int64, device=device)
        self._sums = torch.zeros(SPANS, dtype=torch.int64, pin_memory=True)
        self._pulls, self._stream = pulls, torch.cuda.Stream()
        self._brought = torch.cuda.Event()
        self._done = torch.cuda.Event(blocking=True)  # blocking: waiting takes no CPU time
        self._source: torch.Tensor | None = None
        self._target: torch.Tensor | None = None
        self._share: Share | None = None
        self._count = 0
        self.own = False

    @property
    def tiles(self) -> int:
        assert self._share is not None
        return self._share.tiles

    def forget(self) -> None:
        """Keep no memory of others alive."""
        self._source = self._target = self._share = None

    def plan(self, source: torch.Tensor, target: torch.Tensor, own: bool, spans: I64, positions: I64) -> None:
        self._count = count = len(spans)
        assert 0 < count <= SPANS
        host, start = self._host.numpy(), _table_start(count)
        host[:start] = 0
        table = host[start : start + 5 * (count + 1)].reshape(5, -1)
        self._share = plan_share(source, target, spans, positions, table)
        self._source, self._target, self.own = source, target, own

    def launch(self, first: int, last: int, width: Width) -> torch.cuda.Event:
        """See `pd.runner.cuda_slices.Sliced`. With the device current."""
        assert self._share is not None and self._source is not None and self._target is not None
        count, start = self._count, _table_start(self._count)
        used = start + 5 * (count + 1)
        there = self._there[:used]
        if first == 0:
            with torch.cuda.stream(self._stream):
                there.copy_(self._host[:used], non_blocking=True)
                self._brought.record()
            self._pulls.wait_event(self._brought)
        digests, table = there[:count], there[start:].view(5, -1)
        with torch.cuda.stream(self._pulls):
            copy_share(
                self._source, self._target, self._share, table, digests, width.programs, width.form, (first, last)
            )
            slice_done = torch.cuda.Event(blocking=True)
            slice_done.record()
        if last == self._share.tiles:
            self._stream.wait_event(slice_done)
            with torch.cuda.stream(self._stream):
                self._sums[:count].copy_(digests, non_blocking=True)
                self._done.record()
        return slice_done

    def finish(self) -> U64:
        self._done.synchronize()
        return self._sums[: self._count].numpy().view(np.uint64).copy()


def _table_start(count: int) -> int:
    """Words before the table of so many spans. Always at 16 bytes: a kernel is compiled for one alignment."""
    return count + count % 2


def _check(runtime: ctypes.CDLL, code: int, call: str) -> None:
    if code:
        runtime.cudaGetLastError()  # else torch would find it at its next call, and take it for its own
        raise TransferError(f"{call} failed with CUDA error {code}")
