"""Executes step orders: the runner without its process. One thread, no sockets."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from pd.messages import PromptRow, Push, StepDone, StepOrder
from pd.models.registry import Model
from pd.runner.grammar import Grammars
from pd.runner.inputs import Row, StepInputs, build_inputs
from pd.runner.kv_pool import KvPool
from pd.runner.orders import Orders
from pd.runner.results import failed_rows, step_done
from pd.runner.sampler import Sampled, sample

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
        ended: Callable[[None], None] = lambda event: None,
    ) -> None:
        """`ended` is told of each step that `launch` has computed."""
        self._orders = Orders(model, pool, vocab_size, push, grammars)
        self.table = self._orders.table
        self._model, self._pool, self._rank, self._digest = model, pool, rank, digest
        self._results: deque[StepDone] = deque()
        self._ended = ended

    def launch(self, order: StepOrder) -> None:
        """`step`, whose result `finish` returns: the runner's loop knows GPUs, which are not waited for."""
        self._results.append(self.step(order))
        self._ended(None)

    def finish(self) -> StepDone:
        """The oldest step's results."""
        return self._results.popleft()

    @torch.inference_mode()
    def step(self, order: StepOrder) -> StepDone:
        started = time.perf_counter()
        self.table.apply(order)
        self._orders.constrain(order)
        self._orders.copy_blocks(order)
        inputs = build_inputs(self.table.rows(order), self._pool.shape.tokens)
        sampled: list[Sampled | None] = [None] * len(inputs.rows)
        prompts: list[PromptRow] = []
        if inputs.rows:
            hidden = self._model.forward(inputs.tokens, inputs.batch, self._pool.layers)
            prompts = self._orders.prompt_logprobs(inputs.rows, hidden)
            sampled = self._sample(inputs, hidden)
            self._advance(inputs.rows, sampled)
        digests = self._digests(order)
        self._orders.start_pushes(order)
        micros = int((time.perf_counter() - started) * 1e6)
        failed = failed_rows(inputs.rows)
        return step_done(order, self._rank, inputs.rows, sampled, prompts, failed, digests, micros)

    def _sample(self, inputs: StepInputs, hidden: torch.Tensor) -> list[Sampled | None]:
        wanted = [index for index, row in enumerate(inputs.rows) if row.sample]
        sampled: list[Sampled | None] = [None] * len(inputs.rows)
        if wanted:
            last = torch.tensor([inputs.rows[index].start + inputs.rows[index].count - 1 for index in wanted])
            logits = self._model.logits(hidden[last]).float()
            requests = [inputs.rows[index].request for index in wanted]
            allowed = self._orders.allowed(requests)
            for index, result in zip(wanted, sample(requests, logits, allowed), strict=True):
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
        blocks, tokens = self._orders.completed(order, self._digest)
        if not len(blocks) or self._digest is None:
            return b""
        return self._digest(blocks, tokens).astype(np.uint64).tobytes()
