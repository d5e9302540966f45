"""`pd.abc.transfer.DeviceMemory` for the CPU: device memory is host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pd.abc.transfer import Region
from pd.errors import TransferError
from pd.transfer.digest import digest_span


class HostMemory:
    """Regions with a `buffer`. Thread-safe: it keeps no state."""

    @property
    def device(self) -> str:
        return "cpu"

    def digest(
        self, regions: Sequence[Region], spans: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        out = np.empty(len(spans), dtype=np.uint64)
        for index, ((region, offset, length), key) in enumerate(zip(spans.tolist(), keys.tolist(), strict=True)):
            out[index] = digest_span(_slice(regions[region], offset, length), key)
        return out

    def copy(self, region: Region, offset: int, buffer: memoryview, *, to_device: bool) -> None:
        part = _slice(region, offset, buffer.nbytes)
        if to_device:
            part[:] = buffer.cast("B")
        else:
            buffer.cast("B")[:] = part

    def enter(self) -> None:
        """Nothing to do: a host has no current device."""

    def fence(self) -> None:
        """Nothing to do: the host sees every completed write."""


def _slice(region: Region, offset: int, length: int) -> memoryview:
    if region.buffer is None:
        raise TransferError(f"region {region.index} on {region.device} is not host memory")
    if offset < 0 or offset + length > region.nbytes:
        raise TransferError(f"bytes {offset}..{offset + length} outside region {region.index} of {region.nbytes}")
    return region.buffer.cast("B")[offset : offset + length]
