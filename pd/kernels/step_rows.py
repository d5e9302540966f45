"""What a step on a GPU makes on the device from the few words per row that the host sends.

The device keeps, per request slot, the block table, the last sampled token and the sampling parameters. So an order can
be executed before the host has seen the tokens of the one before it, and a decode step needs four words per row.
Slot `slots - 1` is scratch: rows that only fill up a captured batch point to it, attend to nothing, and write to KV
block 0, which is scratch, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pd.kernels import reference
from pd.kernels.sampling_device import DeviceSampling


@dataclass(frozen=True)
class SlotState:
    """`tables` int32[slots, W]: block ids, 0 where there is none. `last` int32[slots].

    `params` int32[slots, 8]: temperature, top_p, min_p (bits of float32), top_k, choice, 0, and the seed's two halves,
    the lower one first.
    """

    tables: torch.Tensor
    last: torch.Tensor
    params: torch.Tensor

    @property
    def scratch(self) -> int:
        return int(self.last.shape[0]) - 1


@dataclass(frozen=True)
class StepRows:
    """R rows of a step, the first `decode` of which compute one token each; T flat tokens, theirs first.

    The host fills `slots`, `lengths` (tokens attended to, own ones included; 0 for rows that fill up) and `grown` (the
    block that holds the row's last position if it is new, else -1), int32[R]; and of `tokens`, `positions`, `blocks`,
    `offsets`, int32[T], all but this: a decode row's token may be -1 (the slot's last), and its block and offset are
    made on the device. `tables` int32[R, W] is made on the device.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    grown: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    tables: torch.Tensor
    decode: int


def prepare_rows(state: SlotState, rows: StepRows, page_size: int) -> None:
    """Make what `StepRows` says is made on the device; blocks that rows have `grown` enter their slots' tables."""
    if not rows.slots.is_cuda:
        reference.prepare_rows(state, rows, page_size)
        return
    from pd.kernels.step_rows_triton import launch_prepare_rows

    launch_prepare_rows(state, rows, page_size)


def gather_sampling(state: SlotState, slots: torch.Tensor, lengths: torch.Tensor) -> DeviceSampling:
    """The parameters of each row's slot; `lengths` is the position of the token to be sampled."""
    if not slots.is_cuda:
        return reference.gather_sampling(state, slots, lengths)
    from pd.kernels.step_rows_triton import launch_gather_sampling

    return launch_gather_sampling(state, slots, lengths)


def store_last(state: SlotState, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """`last[slots[i]] = tokens[i]`, both int32[S]. No slot but scratch may occur twice."""
    if not slots.is_cuda:
        reference.store_last(state, slots, tokens)
        return
    from pd.kernels.step_rows_triton import launch_store_last

    launch_store_last(state, slots, tokens)
