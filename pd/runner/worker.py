"""Executes step orders: the runner without its process. One thread, no sockets."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from pd.errors import ProtocolError
from pd.messages import Admit, FailedRow, LogprobRow, PromptRow, Push, StepDone, StepOrder
from pd.models.registry import Model
from pd.runner.grammar import Grammars
from pd.runner.inputs import RequestTable, Row, StepInputs, build_inputs
from pd.runner.kv_pool import KvPool
from pd.runner.logprobs import prompt_logprobs
from pd.runner.sampler import Sampled, sample
from pd.types import SamplingParams

#: (blocks int32[n], valid tokens int32[n]) -> uint64[n]
DigestBlocks = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int32]], npt.NDArray[np.uint64]]


class Worker:
    """`step` may be called with order N+1 before anybody has seen the tokens of N: they are kept here.

    `digest` answers `complete_i32`, `push` starts a hand-off's push, `grammars` constrain; an order that needs one that
    is not there is a ProtocolError, like any order that does not fit the state. After an error the state is undefined.
    """

    def __init__(
        self,
        model: Model,
        pool: KvPool,
        *,
        vocab_size: int,
        rank: int = 0,
        digest: DigestBlocks | None = None,
        push: Callable[[Push], None] | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.table = RequestTable(pool.num_blocks)
        self._model, self._pool, self._vocab, self._rank = model, pool, vocab_size, rank
        self._digest, self._push, self._grammars = digest, push, grammars

    @torch.inference_mode()
    def step(self, order: StepOrder) -> StepDone:
        started = time.perf_counter()
        self.table.apply(order)
        for admit in order.admit:
            if admit.sampling.grammar:
                self._constrain(admit.key)
        for copy in order.copies:
            self._copy(copy.src, copy.dst, copy.tokens)
        inputs = build_inputs(self.table.rows(order), self._pool.shape.tokens)
        sampled: list[Sampled | None] = [None] * len(inputs.rows)
        prompts: list[PromptRow] = []
        if inputs.rows:
            hidden = self._model.forward(inputs.tokens, inputs.batch, self._pool.layers)
            prompts = self._prompt_logprobs(inputs, hidden)
            sampled = self._sample(inputs, hidden)
            self._advance(inputs.rows, sampled)
        digests = self._digests(order)
        self._start_pushes(order)
        return self._done(order, inputs.rows, sampled, prompts, digests, started)

    def warm_up(self) -> None:
        """Take the first steps, which are slow, before anybody waits for them. Touches the scratch block only."""
        key = -1
        tokens = np.zeros(4, dtype=np.int32).tobytes()
        admit = Admit(key, 0, tokens, 4, 0, b"", SamplingParams(temperature=1.0, top_p=0.9, logprobs=True))
        row = np.array([key], dtype=np.int64).tobytes()
        self.step(StepOrder(0, row, np.array([4], dtype=np.int32).tobytes(), b"\1", admit=[admit]))
        self.step(StepOrder(0, row, np.array([1], dtype=np.int32).tobytes(), b"\1"))
        self.table.apply(StepOrder(0, b"", b"", b"", release=[key]))

    def _constrain(self, key: int) -> None:
        if self._grammars is None:
            raise ProtocolError("admit", f"request {key}: this runner has no grammars")
        self._grammars.constrain(self.table.requests[key])

    def _copy(self, source: int, target: int, tokens: int) -> None:
        blocks, size = self._pool.num_blocks, self._pool.shape.tokens
        if not (0 <= source < blocks and 0 <= target < blocks and 0 <= tokens <= size):
            raise ProtocolError("copies", f"{tokens} tokens of block {source} to {target}")
        self._pool.copy(source, target, tokens)

    def _prompt_logprobs(self, inputs: StepInputs, hidden: torch.Tensor) -> list[PromptRow]:
        result = []
        for index, row in enumerate(inputs.rows):
            if row.request.logprob_start >= 0:
                part = hidden[row.start : row.start + row.count]
                logprobs = prompt_logprobs(self._model, part, row, self._vocab)
                if logprobs is not None:
                    result.append(PromptRow(index, logprobs))
        return result

    def _sample(self, inputs: StepInputs, hidden: torch.Tensor) -> list[Sampled | None]:
        wanted = [index for index, row in enumerate(inputs.rows) if row.sample]
        sampled: list[Sampled | None] = [None] * len(inputs.rows)
        if wanted:
            last = torch.tensor([inputs.rows[index].start + inputs.rows[index].count - 1 for index in wanted])
            logits = self._model.logits(hidden[last])
            requests = [inputs.rows[index].request for index in wanted]
            forbidden = self._grammars.forbidden(requests) if self._grammars is not None else {}
            for index, result in zip(wanted, sample(requests, logits, forbidden), strict=True):
                sampled[index] = result
        return sampled

    @staticmethod
    def _advance(rows: list[Row], sampled: list[Sampled | None]) -> None:
        """The request goes on with its first choice; the scheduler admits the others as requests of their own."""
        for row, result in zip(rows, sampled, strict=True):
            row.request.computed = row.end
            if result is not None:
                row.request.tokens.append(result.tokens[0])
                row.request.choices = 1
                if row.request.constraint is not None:
                    row.request.constraint.advance(result.tokens[0])

    def _digests(self, order: StepOrder) -> bytes:
        blocks = self.table.block_ids("complete_i32", order.complete_i32)
        tokens = np.frombuffer(order.complete_tokens_i32, dtype=np.int32)
        if len(blocks) != len(tokens):
            raise ProtocolError("complete_tokens_i32", f"{len(tokens)} token counts for {len(blocks)} blocks")
        if not len(blocks):
            return b""
        if self._digest is None:
            raise ProtocolError("complete_i32", "this runner computes no digests")
        return self._digest(blocks, tokens).astype(np.uint64).tobytes()

    def _start_pushes(self, order: StepOrder) -> None:
        for push in order.pushes:
            if self._push is None:
                raise ProtocolError("pushes", "this runner has no transfer engine")
            self._push(push)

    def _done(
        self,
        order: StepOrder,
        rows: list[Row],
        sampled: list[Sampled | None],
        prompts: list[PromptRow],
        digests: bytes,
        started: float,
    ) -> StepDone:
        tokens = [result.tokens if result is not None else [] for result in sampled]
        return StepDone(
            step=order.step,
            rank=self._rank,
            keys_i64=order.rows_i64,
            epochs_i32=np.array([row.request.epoch for row in rows], dtype=np.int32).tobytes(),
            counts_u8=bytes(len(some) for some in tokens),
            tokens_i32=np.array([token for some in tokens for token in some], dtype=np.int32).tobytes(),
            logprobs=[
                LogprobRow(index, result.logprobs)
                for index, result in enumerate(sampled)
                if result is not None and result.logprobs is not None
            ],
            prompt_logprobs=prompts,
            digests_u64=digests,
            compute_us=int((time.perf_counter() - started) * 1e6),
            failed=[
                FailedRow(index, row.request.constraint.problem)
                for index, row in enumerate(rows)
                if row.sample and row.request.constraint is not None and row.request.constraint.problem
            ],
        )
