"""Executes step orders on a GPU: launched as they come, without waiting for the results of the one before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pd.kernels.step_rows import prepare_rows
from pd.messages import FailedRow, PromptRow, Push, StepDone, StepOrder
from pd.models.registry import Model
from pd.runner.device_inputs import UNKNOWN, InputBuilder
from pd.runner.device_sampler import DeviceSampler
from pd.runner.device_state import DeviceState, upload
from pd.runner.drawn import Drawn, to_host
from pd.runner.grammar import Grammars
from pd.runner.graphs import Outcome, StepGraphs
from pd.runner.inputs import Int32, Request, Row
from pd.runner.kv_pool import KvPool
from pd.runner.orders import Orders
from pd.runner.results import failed_rows, step_done
from pd.runner.sampler import Sampled
from pd.runner.shaping import asks_more

#: (blocks, valid tokens) -> int64[n] on the device, launched behind the step that completes the blocks.
LaunchDigests = Callable[[Int32, Int32], torch.Tensor]


@dataclass
class Launched:
    """A step on its way. Its tokens are on the host once `resolve` returns."""

    order: StepOrder
    rows: list[Row]
    wanted: list[int]  # the rows that sample
    started: float
    places: list[int] = field(default_factory=list)  # of the tokens to come, in their requests
    sampled: dict[int, Sampled] = field(default_factory=dict)  # by row
    prompts: list[PromptRow] = field(default_factory=list)
    failed: list[FailedRow] = field(default_factory=list)
    drawn: Drawn | None = None  # on the way to the host
    digests: torch.Tensor | None = None
    event: torch.cuda.Event | None = None

    def resolve(self) -> None:
        """Wait for the device and tell the requests their tokens."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        if self.drawn is None:
            return
        requests = [self.rows[row].request for row in self.wanted]
        results = self.drawn.results([request.sampling for request in requests])
        for row, place, request, result in zip(self.wanted, self.places, requests, results, strict=True):
            request.tokens.set(place, result.tokens[0])
            if request.constraint is not None:
                request.constraint.advance(result.tokens[0])
            self.sampled[row] = result
        self.drawn = None


class DeviceWorker:
    """`launch` may be called with order N+1 before `finish` has returned the results of N.

    The device keeps each request's last token, and what else its next one depends on, so that nothing waits for tokens
    but a grammar: what may come next is worked out on the host, from all that came. So a step with a constrained row
    waits for the one before it when its layers are on their way, and only its mask comes behind them. `pushes` start
    when their step is done. After an error the state is undefined.
    """

    def __init__(
        self,
        model: Model,
        pool: KvPool,
        state: DeviceState,
        *,
        vocab_size: int,
        group: int,
        rank: int = 0,
        digest: LaunchDigests | None = None,
        push: Callable[[Push], None] | None = None,
        grammars: Grammars | None = None,
        by_torch: bool = False,
        spin: bool = False,
    ) -> None:
        """`group` query heads share a kv head. `by_torch`: attention without kernels, for comparison.

        `spin`: who waits for a step's event occupies a core meanwhile, without the interpreter's lock.
        """
        self._orders = Orders(model, pool, vocab_size, push, grammars)
        self.table = self._orders.table
        self._model, self._pool, self._state, self._rank, self._digest = model, pool, state, rank, digest
        self._graphs: StepGraphs | None = None
        self._by_torch, self._spin = by_torch, spin
        self._device = state.state.last.device
        self._inputs = InputBuilder(pool.shape.tokens, group, state.state.scratch, self._device)
        self.sampler = DeviceSampler(state)
        self._pending: deque[Launched] = deque()
        self._launching = False
        self._tell: Callable[[torch.cuda.Event | None], None] = lambda event: None

    def start(self, graphs: StepGraphs | None, launched: Callable[[torch.cuda.Event | None], None]) -> None:
        """After the first steps. `launched` is told of each step the event that it ends with, None if it has ended."""
        self._graphs, self._tell = graphs, launched

    @property
    def busy(self) -> bool:
        """A step is under way, or about to be. From any thread."""
        return self._launching or bool(self._pending)

    # --- orders ---

    @torch.inference_mode()
    def launch(self, order: StepOrder) -> None:
        self._launching = True
        launched = Launched(order, [], [], time.perf_counter())
        grown = self._apply(order)
        rows = launched.rows = self.table.rows(order)
        launched.wanted = [index for index, row in enumerate(rows) if row.sample]
        if rows:
            self._compute(launched, self._grown_rows(rows, grown))
        self._launch_digests(launched)
        if self._device.type == "cuda":
            launched.event = torch.cuda.Event(blocking=not self._spin)
            launched.event.record()
        self._pending.append(launched)
        self._launching = False
        self._tell(launched.event)

    def finish(self) -> StepDone:
        """Results of the oldest step that was launched; waits for it. What it pushes starts now."""
        launched = self._pending[0]
        launched.resolve()
        self._pending.popleft()
        order = launched.order
        self._orders.start_pushes(order)
        sampled = [launched.sampled.get(index) for index in range(len(launched.rows))]
        digests = launched.digests.numpy().tobytes() if launched.digests is not None else b""
        micros = int((time.perf_counter() - launched.started) * 1e6)
        rows, prompts, failed = launched.rows, launched.prompts, launched.failed
        return step_done(order, self._rank, rows, sampled, prompts, failed, digests, micros)

    def step(self, order: StepOrder) -> StepDone:
        """`launch` and `finish`, where no other step is under way."""
        self.launch(order)
        return self.finish()

    # --- state ---

    def _apply(self, order: StepOrder) -> list[tuple[Request, int, int]]:
        """Release, admit, grow, copy; returns growth as (request, place in its table, block)."""
        for key in order.release:
            request = self.table.requests.get(key)
            if request is not None:
                self._state.release(request)
        self.table.apply(order)
        self._state.admit([self.table.requests[admit.key] for admit in order.admit])
        self._orders.constrain(order)
        self._orders.copy_blocks(order)
        return self._growth(order)

    def _growth(self, order: StepOrder) -> list[tuple[Request, int, int]]:
        """What `RequestTable.apply` has appended, from the last one of each request backwards."""
        if not order.grow_keys_i64:
            return []
        keys = np.frombuffer(order.grow_keys_i64, dtype=np.int64).tolist()
        blocks = np.frombuffer(order.grow_blocks_i32, dtype=np.int32).tolist()
        seen: dict[int, int] = {}
        growth = []
        for key, block in zip(reversed(keys), reversed(blocks), strict=True):
            request = self.table.requests[key]
            seen[key] = seen.get(key, 0) + 1
            growth.append((request, len(request.blocks) - seen[key], block))
        return growth

    def _grown_rows(self, rows: Sequence[Row], growth: Sequence[tuple[Request, int, int]]) -> dict[int, int]:
        """Row -> new block, where it is the block of a decode row's token; the others enter the tables now."""
        if not growth:
            return {}
        size = self._pool.shape.tokens
        decode = {row.request.key: index for index, row in enumerate(rows[: _decode_rows(rows)])}
        grown: dict[int, int] = {}
        for request, place, block in growth:
            index = decode.get(request.key, -1)
            if index >= 0 and rows[index].first // size == place:
                grown[index] = block
            else:
                self._state.grow(request, place, block)
        return grown

    # --- computing ---

    def _compute(self, launched: Launched, grown: Mapping[int, int]) -> None:
        rows = launched.rows
        samples = [rows[index] for index in launched.wanted]
        outcome = self._replay(rows, grown)
        if outcome is None:
            outcome = self._launch_kernels(rows, grown)
        elif len(outcome.logits) > len(samples):  # a captured decode batch samples every row
            outcome = _of_rows(outcome, launched.wanted)
        if outcome.hidden is not None:
            launched.prompts = self._orders.prompt_logprobs(rows, outcome.hidden)
        if samples:
            launched.drawn = self._sample([row.request for row in samples], outcome).to_host()
            launched.failed = failed_rows(rows)
        self._advance(launched)

    def _replay(self, rows: Sequence[Row], grown: Mapping[int, int]) -> Outcome | None:
        """By a captured graph, where there is one for it."""
        if self._graphs is None:
            return None
        decode = _decode_rows(rows)
        if decode == 0:
            return self._graphs.prompts(rows)
        return self._graphs.decode(rows, grown) if decode == len(rows) and not _tells_prompts(rows) else None

    def _launch_kernels(self, rows: Sequence[Row], grown: Mapping[int, int]) -> Outcome:
        arrays = self._inputs.build(rows, _decode_rows(rows), grown)
        prepare_rows(self._state.state, arrays.rows, self._pool.shape.tokens)
        batch = arrays.batch(self._state.arrivals, self._by_torch)
        hidden = self._model.forward(arrays.rows.tokens, batch, self._pool.layers)
        last = hidden.index_select(0, arrays.sample_rows)
        logits = self._model.logits(last) if len(last) else last
        return Outcome(logits, arrays.sample_slots, arrays.sample_lengths, hidden=hidden)

    def _sample(self, requests: Sequence[Request], outcome: Outcome) -> Drawn:
        if outcome.tokens is not None and not any(asks_more(request) for request in requests):
            return Drawn(outcome.tokens)
        return self.sampler.sample(requests, outcome, self._allowed(requests))

    def _allowed(self, requests: Sequence[Request]) -> Mapping[int, Int32]:
        """What grammars allow, which is known once their requests' last tokens are on the host."""
        constrained = [request for request in requests if request.constraint is not None]
        if any(request.tokens.at(len(request.tokens) - 1) == UNKNOWN for request in constrained):
            for earlier in self._pending:
                earlier.resolve()
        return self._orders.allowed(requests)

    @staticmethod
    def _advance(launched: Launched) -> None:
        """The request goes on with its first choice; the scheduler admits the others as requests of their own."""
        for row in launched.rows:
            row.request.computed = row.end
        for index in launched.wanted:
            request = launched.rows[index].request
            launched.places.append(len(request.tokens))
            request.tokens.append(UNKNOWN)
            request.choices = 1

    def _launch_digests(self, launched: Launched) -> None:
        blocks, tokens = self._orders.completed(launched.order, self._digest)
        if len(blocks) and self._digest is not None:
            launched.digests = to_host(self._digest(blocks, tokens))


def _decode_rows(rows: Sequence[Row]) -> int:
    """How many rows of one token come first."""
    return next((index for index, row in enumerate(rows) if row.count > 1), len(rows))


def _tells_prompts(rows: Sequence[Row]) -> bool:
    """Logprobs of prompt tokens are asked for, which are of the hidden states."""
    return any(row.request.logprob_start >= 0 and row.first < row.request.prompt_len for row in rows)


def _of_rows(outcome: Outcome, rows: Sequence[int]) -> Outcome:
    chosen = upload(np.array(rows, dtype=np.int64), outcome.logits.device)
    assert outcome.tokens is not None
    return Outcome(
        outcome.logits[chosen], outcome.slots[chosen], outcome.lengths[chosen], outcome.tokens[chosen], outcome.hidden
    )
