"""What a runner keeps on its device between steps, by request slot, and how requests enter and leave it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch

from pd.errors import ProtocolError
from pd.kernels.step_rows import SlotState
from pd.runner.device_inputs import Packed
from pd.runner.inputs import Int32, Request

_PARAMS = struct.Struct("=3f3iQ")


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
        count = len(requests)
        packed = Packed({"slots": 2 * count, "tables": count * self.width, "params": count * 8})
        memory, host = packed.on_host(self._device.type == "cuda")
        slots, tables = host["slots"].view(np.int64), host["tables"].reshape(count, -1)
        params = host["params"].reshape(count, -1)
        for place, request in enumerate(requests):
            request.slot = slots[place] = self._free.pop()
            length = len(request.blocks)
            tables[place, :length] = request.blocks.view
            tables[place, length:] = 0
            params[place] = _params(request)
        # One copy for all three: each is a launch, and the step's first kernel waits behind them.
        fields = packed.of(memory.to(self._device, non_blocking=True))
        index = fields["slots"].view(torch.int64)
        self.state.tables.index_copy_(0, index, fields["tables"].view(count, -1))
        self.state.params.index_copy_(0, index, fields["params"].view(count, -1))

    def grow(self, request: Request, place: int, block: int) -> None:
        """Set one entry of a table where no row of the step does it."""
        self.state.tables[request.slot, place] = block


def _params(request: Request) -> Int32:
    """One row of `SlotState.params`."""
    sampling = request.sampling
    return np.frombuffer(
        _PARAMS.pack(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            max(0, sampling.top_k),
            sampling.choice,
            0,
            sampling.seed & (1 << 64) - 1,
        ),
        dtype=np.int32,
    )
