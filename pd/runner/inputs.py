"""The runner's batch state between steps, and a step's flat inputs built from it.

The scheduler sends deltas; this table holds what they add up to. A request's sampled tokens are appended here at once,
so that the next order may be executed before the scheduler has seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from pd.errors import ProtocolError
from pd.kernels.attention import AttentionBatch, DecodeGroup, PromptSpan
from pd.messages import Admit, StepOrder
from pd.types import SamplingParams

if TYPE_CHECKING:
    from pd.runner.grammar import Constraint
    from pd.runner.shaping import Biases

Int32 = npt.NDArray[np.int32]

#: Most block-table entries x rows that one decode group gathers at once; bounds the memory of padded contexts.
_GROUP_BLOCKS = 1024


class Growing:
    """int32 array with amortised append. `view` is valid until the next append."""

    def __init__(self, values: Int32) -> None:
        self._data = np.empty(max(16, len(values) * 5 // 4), dtype=np.int32)
        self._data[: len(values)] = values
        self._length = len(values)

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> Int32:
        return self._data[: self._length]

    def at(self, index: int) -> int:
        return int(self._data[index])

    def set(self, index: int, value: int) -> None:
        self._data[index] = value

    def append(self, value: int) -> None:
        if self._length == len(self._data):
            grown = np.empty(2 * self._length, dtype=np.int32)
            grown[: self._length] = self._data
            self._data = grown
        self._data[self._length] = value
        self._length += 1


@dataclass
class Request:
    """One admitted request. `tokens` is prompt and everything emitted; the KV of the first `computed` exists."""

    key: int
    epoch: int
    prompt_len: int
    computed: int
    tokens: Growing
    blocks: Growing
    sampling: SamplingParams
    choices: int  # to be sampled at the next sampled position; 1 after the first
    logprob_start: int
    prompt_top_logprobs: int
    constraint: Constraint | None = None  # where there is a grammar
    slot: int = -1  # where the device keeps its state, if it does
    biases: Biases | None = None  # once they have been needed there
    plain_from: int = 0  # known tokens from which on it asks that device for no more than a draw from all

    @property
    def too_short(self) -> bool:
        """Fewer tokens emitted than `min_tokens`, counted from the original prompt's end."""
        return len(self.tokens) - self.prompt_len < self.sampling.min_tokens


@dataclass(frozen=True)
class Row:
    """One row of an order: `count` tokens of `request` from position `first`, at `start` in the flat batch."""

    request: Request
    first: int
    count: int
    start: int
    sample: bool

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclass(frozen=True)
class StepInputs:
    rows: list[Row]
    tokens: torch.Tensor  # int64[T]
    batch: AttentionBatch


@dataclass
class RequestTable:
    """All admitted requests by key. `num_blocks` bounds every block id that an order names."""

    num_blocks: int
    requests: dict[int, Request] = field(default_factory=dict)

    def apply(self, order: StepOrder) -> None:
        """Release, admit, grow. Raises ProtocolError for a key or block that does not exist."""
        for key in order.release:
            if self.requests.pop(key, None) is None:
                raise ProtocolError("release", f"request {key} is not admitted")
        for admit in order.admit:
            self._admit(admit)
        if not (order.grow_keys_i64 or order.grow_blocks_i32):
            return
        keys = np.frombuffer(order.grow_keys_i64, dtype=np.int64)
        blocks = self.block_ids("grow_blocks_i32", order.grow_blocks_i32)
        if len(keys) != len(blocks):
            raise ProtocolError("grow_blocks_i32", f"{len(blocks)} blocks for {len(keys)} keys")
        for key, block in zip(keys.tolist(), blocks.tolist(), strict=True):
            self.find("grow_keys_i64", key).blocks.append(block)

    def find(self, where: str, key: int) -> Request:
        request = self.requests.get(key)
        if request is None:
            raise ProtocolError(where, f"request {key} is not admitted")
        return request

    def block_ids(self, where: str, data: bytes) -> Int32:
        ids = np.frombuffer(data, dtype=np.int32)
        if len(ids) and ids.view(np.uint32).max() >= self.num_blocks:  # of which a negative one is the largest
            raise ProtocolError(where, f"block {ids.min()}..{ids.max()} outside 0..{self.num_blocks - 1}")
        return ids

    def rows(self, order: StepOrder) -> list[Row]:
        """The order's rows, checked against what each request has. Does not change `computed`."""
        keys = np.frombuffer(order.rows_i64, dtype=np.int64).tolist()
        counts = np.frombuffer(order.counts_i32, dtype=np.int32).tolist()
        samples = list(order.sample_u8)
        if not len(keys) == len(counts) == len(samples):
            raise ProtocolError("rows_i64", f"{len(keys)} rows, {len(counts)} counts, {len(samples)} sample flags")
        if len(set(keys)) != len(keys):
            raise ProtocolError("rows_i64", "a request has two rows")
        rows, start = [], 0
        for key, count, sample in zip(keys, counts, samples, strict=True):
            request = self.find("rows_i64", key)
            known = len(request.tokens)
            end = request.computed + count
            if count < 1 or end > known or (sample and end != known):
                what = f"{count} tokens from {request.computed} of {known} known, sample {sample}"
                raise ProtocolError("counts_i32", f"request {key}: {what}")
            rows.append(Row(request, request.computed, count, start, bool(sample)))
            start += count
        return rows

    def _admit(self, admit: Admit) -> None:
        if admit.key in self.requests:
            raise ProtocolError("admit", f"request {admit.key} is admitted already")
        tokens = np.frombuffer(admit.tokens_i32, dtype=np.int32)
        if not 0 < admit.prompt_len <= len(tokens) or not 0 <= admit.computed < len(tokens):
            lengths = f"{len(tokens)} tokens, prompt {admit.prompt_len}, computed {admit.computed}"
            raise ProtocolError("admit", f"request {admit.key}: {lengths}")
        self.requests[admit.key] = Request(
            key=admit.key,
            epoch=admit.epoch,
            prompt_len=admit.prompt_len,
            computed=admit.computed,
            tokens=Growing(tokens),
            blocks=Growing(self.block_ids("admit.blocks_i32", admit.blocks_i32)),
            sampling=admit.sampling,
            choices=admit.choices,
            logprob_start=admit.logprob_start,
            prompt_top_logprobs=admit.prompt_top_logprobs,
        )


def build_inputs(rows: list[Row], page_size: int) -> StepInputs:
    """Flat token batch of one step, rows in order. Positions without a block get scratch block 0."""
    if not rows:
        empty = torch.empty(0, dtype=torch.int64)
        return StepInputs([], empty, AttentionBatch(empty, empty, empty, (), ()))
    tokens = np.concatenate([row.request.tokens.view[row.first : row.end] for row in rows])
    positions = np.concatenate([np.arange(row.first, row.end) for row in rows])
    tables = [_table(row, page_size) for row in rows]
    blocks = np.concatenate(
        [
            table[np.arange(row.first, row.end) // page_size] if row.count > 1 else table[-1:]
            for row, table in zip(rows, tables, strict=True)
        ]
    )
    single = [index for index, row in enumerate(rows) if row.count == 1]
    prompts = tuple(
        PromptSpan(row.start, row.count, row.end, torch.from_numpy(table))
        for row, table in zip(rows, tables, strict=True)
        if row.count > 1
    )
    batch = AttentionBatch(
        positions=torch.from_numpy(positions),
        blocks=torch.from_numpy(blocks),
        offsets=torch.from_numpy(positions % page_size),
        decode=_decode_groups(rows, tables, single),
        prompts=prompts,
    )
    return StepInputs(rows, torch.from_numpy(tokens.astype(np.int64)), batch)


def _table(row: Row, page_size: int) -> npt.NDArray[np.int64]:
    """The blocks that hold the row's first `end` tokens, scratch where the request has none."""
    needed = -(-row.end // page_size)
    table = np.zeros(needed, dtype=np.int64)
    have = row.request.blocks.view[:needed]
    table[: len(have)] = have
    return table


def _decode_groups(
    rows: list[Row], tables: Sequence[npt.NDArray[np.int64]], single: list[int]
) -> tuple[DecodeGroup, ...]:
    """Rows of one token, in groups whose tables differ in length by less than a factor of two: little padding."""
    groups: list[list[int]] = []
    for index in sorted(single, key=lambda index: len(tables[index])):
        longest = len(tables[index])
        if groups and longest < 2 * len(tables[groups[-1][0]]) and (len(groups[-1]) + 1) * longest <= _GROUP_BLOCKS:
            groups[-1].append(index)
        else:
            groups.append([index])
    result = []
    for members in groups:
        padded = np.empty((len(members), len(tables[members[-1]])), dtype=np.int64)
        for place, index in enumerate(members):
            table = tables[index]
            padded[place, : len(table)] = table
            padded[place, len(table) :] = table[0]
        result.append(
            DecodeGroup(
                rows=torch.tensor([rows[index].start for index in members]),
                tables=torch.from_numpy(padded),
                lengths=torch.tensor([rows[index].end for index in members]),
            )
        )
    return tuple(result)
