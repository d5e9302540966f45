"""A "device" whose memory other processes can map: memfds behind `SharedDeviceMemory`. What a GPU is to `direct`.

Run as a program, it is an end of a transfer over such memory (see `pd.testing.transfer_peer`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from pd.abc import DeviceMemory, Region
from pd.errors import ProtocolError, TransferError
from pd.ipc.memory import SharedMemory
from pd.testing.transfer_peer import Side, main
from pd.transfer.digest import digest_span

LANES = 3


def contents(region: Region) -> np.ndarray:
    """uint8[nbytes] of a region of this device."""
    return np.frombuffer(region.owner.buffer, dtype=np.uint8)


class Mapped:
    def __init__(self) -> None:
        self.memory: list[SharedMemory] = []
        self.pulls = 0

    def close(self) -> None:
        assert self.pulls == 0, "unmapped while a pull reads it"
        for one in self.memory:
            one.close()


class DevicePull:
    """Copies on a thread of its own, as a device does."""

    def __init__(self, device: SharedDevice, mapped: Mapped, source: int, region: Region, spans, words) -> None:
        self._device, self._mapped = device, mapped
        self._theirs = np.frombuffer(mapped.memory[source].buffer, dtype=np.uint8)
        self._ours, self._spans, self._words = contents(region), spans.tolist(), words
        self._thread = threading.Thread(target=self._copy)
        self._sums: list[int] = []
        self._released = False
        mapped.pulls += 1

    def _copy(self) -> None:
        for i, (source, target, length) in enumerate(self._spans):
            self._ours[target : target + length] = self._theirs[source : source + length]
            if self._words is not None:
                self._sums.append(digest_span(self._ours[target : target + length], int(self._words[i])))

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> npt.NDArray[np.uint64]:
        self._thread.join()
        return np.array(self._sums, dtype=np.uint64)

    def release(self) -> None:
        assert not self._released and not self._thread.is_alive()
        self._released = True
        del self._theirs
        self._mapped.pulls -= 1
        self._device.lanes.release()


class SharedDevice:
    """`mappable` False: memory of others cannot be mapped, as in a container."""

    device = "fake:0"
    pull_spans = 50
    mappable = True
    exports = True

    def __init__(self) -> None:
        self.lanes = threading.Semaphore(LANES)

    def allocate(self, nbytes: int) -> Region:
        owner = SharedMemory.create("fake-device", nbytes)
        return Region(0, 1 << 40, nbytes, self.device, None, owner)

    def digest(self, regions: Sequence[Region], spans: np.ndarray, keys: np.ndarray) -> np.ndarray:
        rows = zip(spans.tolist(), keys.tolist(), strict=True)
        out = [digest_span(contents(regions[region])[at : at + length], key) for (region, at, length), key in rows]
        return np.array(out, dtype=np.uint64)

    def copy(self, region: Region, offset: int, buffer: memoryview, *, to_device: bool) -> None:
        there, here = contents(region)[offset : offset + buffer.nbytes], np.frombuffer(buffer, dtype=np.uint8)
        if to_device:
            there[:] = here
        else:
            np.copyto(here, there)

    def enter(self) -> None:
        pass

    def fence(self) -> None:
        pass

    def export(self, regions: Sequence[Region]) -> bytes:
        if not self.exports:
            raise TransferError("memory of this device has no handles")
        return msgspec.msgpack.encode([(os.getpid(), one.owner.fd) for one in regions])

    def open(self, handle: bytes, sizes: Sequence[int]) -> Mapped:
        if not self.mappable:
            raise TransferError("no handle can be opened here")
        mapped = Mapped()
        try:
            for (pid, fd), size in zip(msgspec.msgpack.decode(handle, type=list[tuple[int, int]]), sizes, strict=True):
                mapped.memory.append(SharedMemory.attach(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR), size))
        except (OSError, ValueError, ProtocolError) as error:
            mapped.close()
            raise TransferError(f"the handle cannot be opened: {error}") from error
        return mapped

    def prepare(self, mapped: Mapped, source: int, region: Region, spans: np.ndarray, words) -> DevicePull:
        assert len(spans) <= self.pull_spans
        self.lanes.acquire()
        return DevicePull(self, mapped, source, region, spans, words)


class DeviceSide(Side):
    """An end whose region is memory of a `SharedDevice`."""

    def device_memory(self) -> DeviceMemory:
        return SharedDevice()

    def allocate(self, nbytes: int) -> Region:
        assert isinstance(self.device, SharedDevice)
        return self.device.allocate(nbytes)

    def contents(self, region: int) -> np.ndarray:
        return contents(self.regions[region])

    def ways(self) -> dict[str, int]:
        """Connections of this sender by the way that their bytes go."""
        return dict(self.backend.ways)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(DeviceSide)
