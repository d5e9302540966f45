"""What a runner keeps on its device between steps, by request slot, and how requests enter and leave it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pd.errors import ProtocolError
from pd.kernels.shaping import MOST_COUNTED, WORD_BITS, token_bits
from pd.kernels.step_rows import SlotState
from pd.runner.device_inputs import Packed, bring
from pd.runner.inputs import Int32, Request
from pd.runner.sampler import is_penalised
from pd.runner.shaping import plain_from

_PARAMS = struct.Struct("=3f3iQ")

#: Slots that there is room for when the first request with penalties comes.
_FIRST_COUNTED = 16


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, made in the current stream's order and without waiting for it."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


class TokenCounts:
    """Which tokens a request's prompt has and how often it emitted each, by slot, for those that have penalties.

    Two bytes and a bit for each token of the vocabulary and each slot: 4.4 MB for 16 slots and 128,256 tokens. There is
    room for no more slots than such requests have needed. Those in use have low numbers, so that is not more than twice
    the most requests that have run at once.
    """

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self._slots, self._device = slots, device
        self.seen = torch.zeros(0, -(-vocab // WORD_BITS), dtype=torch.int32, device=device)
        self.counts = torch.zeros(0, vocab, dtype=torch.int16, device=device)

    def admit(self, requests: Sequence[Request]) -> None:
        """Begin with the tokens that each has, which are all known. Prompts that are cached count like others."""
        counted = [request for request in requests if is_penalised(request.sampling)]
        if not counted:
            return
        self._grow(1 + max(request.slot for request in counted))
        slots = np.array([request.slot for request in counted], dtype=np.int64)
        places, counts = zip(*(self._emitted(request) for request in counted), strict=True)
        vocab = self.counts.shape[1]
        fields = bring(
            {
                "slots": slots.view(np.int32),
                "seen": np.stack([token_bits(one.tokens.view[: one.prompt_len], vocab) for one in counted]),
                "places": np.concatenate(places).view(np.int32),
                "counts": np.concatenate(counts).view(np.int32),
            },
            self._device,
        )
        index = fields["slots"].view(torch.int64)
        self.seen.index_copy_(0, index, fields["seen"])
        self.counts.index_fill_(0, index, 0)
        there, emitted = (fields[name].view(torch.int64) for name in ("places", "counts"))
        self.counts.view(-1).index_copy_(0, there, emitted.short())

    def _emitted(self, request: Request) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(place among all counts, count) of each token that it has emitted."""
        tokens, counts = np.unique(request.tokens.view[request.prompt_len :].astype(np.int64), return_counts=True)
        return request.slot * self.counts.shape[1] + tokens, counts.astype(np.int64).clip(max=MOST_COUNTED)

    def _grow(self, slots: int) -> None:
        rows = len(self.counts)
        if slots <= rows:
            return
        more = min(max(2 * rows, slots, _FIRST_COUNTED), self._slots) - rows
        self.seen, self.counts = (
            torch.cat((old, old.new_zeros(more, old.shape[1]))) for old in (self.seen, self.counts)
        )


class DeviceState:
    """Slots of requests. A slot that is freed may be filled again at once: the device does both in order."""

    def __init__(self, slots: int, width: int, kv_heads: int, vocab: int, device: torch.device) -> None:
        """`slots` requests at once, each of at most `width` blocks; one more slot is scratch."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.state = SlotState(zeros(slots + 1, width), zeros(slots + 1), zeros(slots + 1, 8))
        #: What `DeviceBatch` says of it, for any batch of these requests.
        self.arrivals = zeros((slots + 1) * kv_heads)
        self.tokens = TokenCounts(slots, vocab, device)
        self._device, self._free = device, list(reversed(range(slots)))  # low ones first

    @property
    def slots(self) -> int:
        """For requests: without scratch."""
        return self.state.scratch

    @property
    def width(self) -> int:
        return int(self.state.tables.shape[1])

    def release(self, request: Request) -> None:
        self._free.append(request.slot)
        request.slot = -1

    def admit(self, requests: Sequence[Request]) -> None:
        """Give each a slot and bring its table and parameters there, and what penalties need to know of its tokens."""
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
            request.plain_from = plain_from(request.sampling, request.prompt_len)
            length = len(request.blocks)
            tables[place, :length] = request.blocks.view
            tables[place, length:] = 0
            params[place] = _params(request)
        # One copy for all three: each is a launch, and the step's first kernel waits behind them.
        fields = packed.of(memory.to(self._device, non_blocking=True))
        index = fields["slots"].view(torch.int64)
        self.state.tables.index_copy_(0, index, fields["tables"].view(count, -1))
        self.state.params.index_copy_(0, index, fields["params"].view(count, -1))
        self.tokens.admit(requests)

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
