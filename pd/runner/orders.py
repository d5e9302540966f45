"""What every worker makes of an order in the same way, whatever it computes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pd.errors import ProtocolError
from pd.messages import PromptRow, Push, StepOrder
from pd.models.registry import Model
from pd.runner.grammar import Grammars
from pd.runner.inputs import Int32, Request, RequestTable, Row
from pd.runner.kv_pool import KvPool
from pd.runner.logprobs import prompt_logprobs


@dataclass
class Orders:
    """A worker's requests and what their orders refer to.

    `push` starts a hand-off's push, `grammars` constrain; an order that needs one that is not there is a ProtocolError.
    """

    model: Model
    pool: KvPool
    vocab_size: int
    push: Callable[[Push], None] | None = None
    grammars: Grammars | None = None
    table: RequestTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = RequestTable(self.pool.num_blocks)

    def constrain(self, order: StepOrder) -> None:
        """The admitted requests that have a grammar."""
        for admit in order.admit:
            if admit.sampling.grammar:
                if self.grammars is None:
                    raise ProtocolError("admit", f"request {admit.key}: this runner has no grammars")
                self.grammars.constrain(self.table.requests[admit.key])

    def copy_blocks(self, order: StepOrder) -> None:
        blocks, size = self.pool.num_blocks, self.pool.shape.tokens
        for copy in order.copies:
            if not (0 <= copy.src < blocks and 0 <= copy.dst < blocks and 0 <= copy.tokens <= size):
                raise ProtocolError("copies", f"{copy.tokens} tokens of block {copy.src} to {copy.dst}")
            self.pool.copy(copy.src, copy.dst, copy.tokens)

    def completed(self, order: StepOrder, digests: object | None) -> tuple[Int32, Int32]:
        """(blocks, valid tokens) whose digests are wanted; `digests` computes them, and is only looked for."""
        blocks = self.table.block_ids("complete_i32", order.complete_i32)
        tokens = np.frombuffer(order.complete_tokens_i32, dtype=np.int32)
        if len(blocks) != len(tokens):
            raise ProtocolError("complete_tokens_i32", f"{len(tokens)} token counts for {len(blocks)} blocks")
        if len(blocks) and digests is None:
            raise ProtocolError("complete_i32", "this runner computes no digests")
        return blocks, tokens

    def start_pushes(self, order: StepOrder) -> None:
        for push in order.pushes:
            if self.push is None:
                raise ProtocolError("pushes", "this runner has no transfer engine")
            self.push(push)

    def allowed(self, requests: Sequence[Request]) -> Mapping[int, Int32]:
        """By index of the constrained requests: bits of the tokens that they can have."""
        return self.grammars.allowed(requests) if self.grammars is not None else {}

    def prompt_logprobs(self, rows: Sequence[Row], hidden: torch.Tensor) -> list[PromptRow]:
        """Of the rows that ask for them; `hidden` [T, H] of all rows."""
        result = []
        for index, row in enumerate(rows):
            if row.request.logprob_start >= 0:
                part = hidden[row.start : row.start + row.count]
                logprobs = prompt_logprobs(self.model, part, row, self.vocab_size)
                if logprobs is not None:
                    result.append(PromptRow(index, logprobs))
        return result
