"""What a runner keeps on its device between steps, by request slot, and how requests enter and leave it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pd.errors import ProtocolError
from pd.kernels.step_rows import SlotState
from pd.runner.inputs import Request


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, made in the current stream's order and without waiting for it."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


class DeviceState:
    """Slots of requests. A slot that is freed may be filled again at once: the device does both in order."""

    def __init__(self, slots: int, width: int, kv_heads: int, device: torch.device) -> None:
        """`slots` requests at once, each of at most `width` blocks; one more slot is scratch."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.state = SlotState(zeros(slots + 1, width), zeros(slots + 1), zeros(slots + 1, 8))
        #: What `DeviceBatch` says of it, for any batch of these requests.
        self.arrivals = zeros((slots + 1) * kv_heads)
        self._device, self._free = device, list(range(slots))

    @property
    def width(self) -> int:
        return int(self.state.tables.shape[1])

    def release(self, request: Request) -> None:
        self._free.append(request.slot)
        request.slot = -1

    def admit(self, requests: Sequence[Request]) -> None:
        """Give each a slot and bring its table and parameters there. Its tokens stay on the host, which knows them."""
        if len(requests) > len(self._free):
            raise ProtocolError("admit", f"{len(requests)} requests more than this runner has slots for")
        if not requests:
            return
        widest = max(len(request.blocks) for request in requests)
        if widest > self.width:
            raise ProtocolError("admit.blocks_i32", f"a table of {widest} blocks where {self.width} are the most")
        tables = np.zeros((len(requests), self.width), dtype=np.int32)
        params = np.zeros((len(requests), 8), dtype=np.int32)
        for place, request in enumerate(requests):
            request.slot = self._free.pop()
            tables[place, : len(request.blocks)] = request.blocks.view
            params[place] = _params(request)
        slots = upload(np.array([request.slot for request in requests], dtype=np.int64), self._device)
        self.state.tables.index_copy_(0, slots, upload(tables, self._device))
        self.state.params.index_copy_(0, slots, upload(params, self._device))

    def grow(self, request: Request, place: int, block: int) -> None:
        """Set one entry of a table where no row of the step does it."""
        self.state.tables[request.slot, place] = block


def _params(request: Request) -> np.ndarray:
    """One row of `SlotState.params`."""
    sampling = request.sampling
    row = np.zeros(8, dtype=np.int32)
    row[:3] = np.array([sampling.temperature, sampling.top_p, sampling.min_p], dtype=np.float32).view(np.int32)
    row[3], row[4] = max(0, sampling.top_k), sampling.choice
    row[6:8] = np.array([sampling.seed & (1 << 64) - 1], dtype=np.uint64).view(np.int32)
    return row
