"""A runner without a model: answers one step late, like a GPU, and notices damaged memory.

Its KV memory holds, for each token slot, the token and its position. Before a token is "sampled" the whole context is
read back through the block table and compared with the request's tokens: a block that was reused too early, landed
late or was never written raises `Corruption` instead of giving a plausible answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from pd.errors import PdError
from pd.messages import (
    Admit,
    FailedRow,
    LogprobRow,
    PromptLogprobs,
    PromptRow,
    StepDone,
    StepOrder,
    TokenLogprobs,
    TopLogprobs,
)
from pd.types import SamplingParams


class Corruption(PdError):
    """The KV of a position is not what the request's own tokens would have written."""


def default_next_token(tokens: npt.NDArray[np.int32], sampling: SamplingParams) -> int:
    """A deterministic stand-in for a model: depends on every token before, on the seed and on the choice."""
    weights = np.arange(1, len(tokens) + 1, dtype=np.int64)
    drawn = sampling.seed * 40503 + sampling.choice * 7919
    return int((int((tokens * weights).sum()) * 2654435761 + drawn) % 50_000) + 100


def token_logprobs(tokens: list[int], sampling: SamplingParams) -> TokenLogprobs:
    """Made up, but of each token: itself, with a minus; its successors as alternatives; its distance to wanted ids."""
    width = sampling.top_logprobs
    ids = [token + 1 + rank for token in tokens for rank in range(width)]
    wanted = [token - other for token in tokens for other in sampling.token_ids_logprob]
    tops = TopLogprobs(width, np.array(ids, "<i4").tobytes(), (-np.array(ids, "<f4")).tobytes()) if width else None
    return TokenLogprobs((-np.array(tokens, "<f4")).tobytes(), tops, np.array(wanted, "<f4").tobytes())


def prompt_logprobs(tokens: list[int], start: int, end: int) -> PromptLogprobs | None:
    """Made up: each token, with a minus; the first one has none. None where there is no position."""
    if start >= end:
        return None
    values = -np.array(tokens[start:end], "<f4")
    if start == 0:
        values[0] = np.nan
    return PromptLogprobs(start, values.tobytes())


@dataclass
class _Row:
    tokens: list[int]
    computed: int
    blocks: list[int]
    sampling: SamplingParams
    epoch: int
    choices: int  # to be sampled next; 1 after the first
    prompt_len: int
    logprob_start: int


@dataclass
class FakeRunner:
    """Pure: `step(order)` queues an order; `finish()` completes the oldest one and returns its result."""

    num_blocks: int
    page_size: int
    next_token: Callable[[npt.NDArray[np.int32], SamplingParams], int] = default_next_token
    requests: dict[int, _Row] = field(default_factory=dict)
    pending: list[StepOrder] = field(default_factory=list)
    fails: str = ""  # rows with this grammar fail when they sample
    failing: dict[str, int] = field(default_factory=dict)  # grammar -> rows fail when so many tokens were emitted

    def __post_init__(self) -> None:
        #: token | position << 32 of every slot; -1: never written.
        self.memory = np.full((self.num_blocks, self.page_size), -1, dtype=np.int64)

    def step(self, order: StepOrder) -> None:
        self.pending.append(order)

    def finish(self) -> StepDone:
        """Compute the oldest order."""
        order = self.pending.pop(0)
        for key in order.release:
            self.requests.pop(key, None)
        for admit in order.admit:
            self._admit(admit)
        for copy in order.copies:
            self.memory[copy.dst, : copy.tokens] = self.memory[copy.src, : copy.tokens]
        grow_keys = np.frombuffer(order.grow_keys_i64, "<i8").tolist()
        for key, block in zip(grow_keys, np.frombuffer(order.grow_blocks_i32, "<i4").tolist(), strict=True):
            self.requests[key].blocks.append(block)
        keys = np.frombuffer(order.rows_i64, "<i8").tolist()
        counts = np.frombuffer(order.counts_i32, "<i4").tolist()
        epochs, produced, tokens, logprobs = [], bytearray(), [], []
        failed, prompts = [], []
        for index, (key, count, sample) in enumerate(zip(keys, counts, order.sample_u8, strict=True)):
            row = self.requests[key]
            if sample and self._fails(row):
                failed.append(FailedRow(index, "no token fits"))
            epochs.append(row.epoch)
            of_prompt = _of_prompt(row, count)
            if of_prompt is not None:
                prompts.append(PromptRow(index, of_prompt))
            self._compute(key, row, count)
            some = self._sample(key, row) if sample else []
            if some and row.sampling.logprobs:
                logprobs.append(LogprobRow(len(produced), token_logprobs(some, row.sampling)))
            tokens += some
            produced.append(len(some))
        return StepDone(
            order.step,
            0,
            order.rows_i64,
            np.array(epochs, "<i4").tobytes(),
            bytes(produced),
            np.array(tokens, "<i4").tobytes(),
            logprobs,
            prompts,
            digests_u64=self._digests(order),
            failed=failed,
        )

    def _admit(self, admit: Admit) -> None:
        tokens = np.frombuffer(admit.tokens_i32, "<i4").tolist()
        blocks = np.frombuffer(admit.blocks_i32, "<i4").tolist()
        self.requests[admit.key] = _Row(
            tokens,
            admit.computed,
            blocks,
            admit.sampling,
            admit.epoch,
            admit.choices,
            admit.prompt_len,
            admit.logprob_start,
        )

    def _fails(self, row: _Row) -> bool:
        grammar = row.sampling.grammar
        if not grammar:
            return False
        return grammar == self.fails or len(row.tokens) - row.prompt_len >= self.failing.get(grammar, 1 << 30)

    def _compute(self, key: int, row: _Row, count: int) -> None:
        if row.computed + count > len(row.tokens):
            raise Corruption(f"request {key}: {row.computed} + {count} positions, {len(row.tokens)} tokens known")
        for position in range(row.computed, row.computed + count):
            page = position // self.page_size
            block = row.blocks[page] if page < len(row.blocks) else 0
            self.memory[block, position % self.page_size] = row.tokens[position] | position << 32
        row.computed += count

    def _sample(self, key: int, row: _Row) -> list[int]:
        if row.computed != len(row.tokens):
            raise Corruption(f"request {key}: sampled at {row.computed} of {len(row.tokens)} tokens")
        tokens = np.array(row.tokens, dtype=np.int64)
        expected = tokens | np.arange(len(tokens), dtype=np.int64) << 32
        held = self.memory[row.blocks].reshape(-1)[: row.computed]
        if not np.array_equal(held, expected[: len(held)]) or len(held) < row.computed:
            wrong = int(np.argmax(held != expected[: len(held)])) if len(held) else 0
            raise Corruption(f"request {key}: position {wrong} of {row.computed} is damaged (blocks {row.blocks})")
        first = row.sampling.choice
        drawn = [
            self.next_token(tokens.astype(np.int32), msgspec.structs.replace(row.sampling, choice=choice))
            for choice in range(first, first + row.choices)
        ]
        row.tokens.append(drawn[0])
        row.choices = 1
        return drawn

    def _digests(self, order: StepOrder) -> bytes:
        blocks = np.frombuffer(order.complete_i32, "<i4").tolist()
        valid = np.frombuffer(order.complete_tokens_i32, "<i4").tolist()
        return np.array([self.digest(b, n) for b, n in zip(blocks, valid, strict=True)], dtype="<u8").tobytes()

    def digest(self, block: int, tokens: int) -> int:
        """Position-keyed sum over the first `tokens` slots of a block."""
        keys = np.arange(1, tokens + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
        return int((self.memory[block, :tokens].astype(np.uint64) * keys).sum(dtype=np.uint64))


def _of_prompt(row: _Row, count: int) -> PromptLogprobs | None:
    """What the row's next `count` positions say of the prompt: each of the token after it."""
    if row.logprob_start < 0:
        return None
    start = max(row.logprob_start, row.computed + 1 if row.computed else 0)
    return prompt_logprobs(row.tokens, start, min(row.computed + count + 1, row.prompt_len))


def reference_tokens(
    prompt: list[int],
    sampling: SamplingParams,
    count: int,
    next_token: Callable[[npt.NDArray[np.int32], SamplingParams], int] = default_next_token,
) -> list[int]:
    """What any healthy deployment of this stand-in answers, stop tokens applied."""
    tokens, out = list(prompt), []
    for _ in range(count):
        token = next_token(np.array(tokens, dtype=np.int32), sampling)
        tokens.append(token)
        out.append(token)
        if token in sampling.stop_token_ids:
            break
    return out
