"""Continuous batching: which requests compute what in the next step, and what a finished step means for them.

The batcher orders one step ahead: order N+1 leaves before the tokens of step N are back, and the runner keeps each
request's last token. At most `DEPTH` steps are in flight. Everything here is arithmetic over requests and the block
pool; what a token means to a client is `state.py`'s business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pd.errors import ProtocolError
from pd.messages import Admit, CopyBlock, Push, StepDone, StepOrder
from pd.scheduler.blocks import BlockPool
from pd.scheduler.handoff_base import to_i32
from pd.scheduler.prefix import PrefixCache
from pd.scheduler.request import Request, State

DEPTH = 2

#: (request, first page, blocks) -> the push that sends these pages, or None when nobody wants them.
Pusher = Callable[[Request, int, list[int]], Push | None]


@dataclass(frozen=True)
class BatchLimits:
    """Tokens per step. `prefill_tokens` bounds all prompts together, `chunk` one request's share."""

    page_size: int
    max_running: int
    chunk: int
    prefill_tokens: int
    reserve_blocks: int
    digests: bool  # a prefill instance digests the blocks that it completes


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prompt row of a step: `request` computes tokens up to `end`; `pages` are completed by it, as (index, valid)."""

    request: Request
    epoch: int
    row: int
    size: int
    end: int
    last: bool
    pages: list[tuple[int, int]]


@dataclass(slots=True)
class InFlight:
    """One ordered step: the decode rows come first, then the chunks."""

    step: int
    at: float
    decode: list[Request]
    epochs: list[int]
    chunks: list[Chunk]


@dataclass(slots=True)
class _Rows:
    """Raw arrays of an unchanged decode batch, reused from step to step."""

    requests: list[Request]
    epochs: list[int]
    keys: bytes
    counts: bytes
    samples: bytes


@dataclass
class Batcher:
    limits: BatchLimits
    pool: BlockPool
    prefix: PrefixCache
    pusher: Pusher
    retracted: Callable[[Request], None]
    step: int = 0
    inflight: deque[InFlight] = field(default_factory=deque)
    prefilling: list[Request] = field(default_factory=list)
    retractions: int = 0
    count: int = 0  # running slots taken: requests inside the runner, and choices to come of prompts inside it

    def __post_init__(self) -> None:
        self._running: dict[int, Request] = {}  # by key: decoding, results may still be due
        self._active: list[Request] = []  # of those, the ones with samples left to order
        self._rows: _Rows | None = None  # cache of the active batch's arrays
        self._forking: dict[int, Request] = {}  # by key: prompts of several choices whose first tokens are on the way
        self._copies: dict[int, CopyBlock] = {}  # by key: before the next step; the source block is held until it ends
        self._admit: list[Admit] = []
        self._release: list[int] = []

    # --- queries ---

    @property
    def busy(self) -> bool:
        return bool(self.inflight or self.prefilling or self._active or self._admit)

    def needs(self, request: Request, blocks: int, others: int) -> int:
        """Blocks that must be available for one more request to take `blocks` beside those that it holds.

        The growth reserve of all, and copies of its partial block for its choices, are to be left; if the pool is too
        small for that it must be empty otherwise.
        """
        copies = request.slots - 1 if request.known % self.limits.page_size else 0
        reserve = self.limits.reserve_blocks * (self.count + others + request.slots) + copies
        return blocks + min(reserve, max(0, self.pool.total - len(request.blocks) - blocks))

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.limits.page_size)

    # --- entering and leaving ---

    def enter(self, request: Request, computed: int) -> None:
        """The runner takes the request with its next order; KV of `computed` tokens is in its blocks already.

        Ownership: `request.blocks` hold one reference each, kept until `leave`.
        """
        self.count += request.slots
        request.ordered = request.done = computed
        request.capacity = len(request.blocks) * self.limits.page_size
        request.left = max(0, request.max_tokens - request.emitted)
        self._admit.append(
            Admit(
                request.key,
                request.epoch,
                bytes(request.tokens),
                request.prompt_len,
                computed,
                to_i32(request.blocks),
                request.sampling,
                request.choices,
                -1 if request.started else request.logprob_start,
                request.prompt_top_logprobs,
            )
        )
        if computed == request.known - 1 and request.emitted and request.remote is None:
            self._start_decoding(request)
        else:
            request.state = State.PREFILL
            self.prefilling.append(request)

    def copy(self, request: Request, source: int, tokens: int) -> None:
        """The first `tokens` tokens of `source` are copied into the last block of a request that has just entered.

        Ownership: `source` has a reference of its own until the step that copies is done.
        """
        self.pool.retain((source,))
        self._copies[request.key] = CopyBlock(source, request.blocks[-1], tokens)

    def _start_decoding(self, request: Request) -> None:
        request.state = State.RUNNING
        self._running[request.key] = request
        if request.left > 0:
            self._active.append(request)
            self._rows = None

    def leave(self, request: Request) -> None:
        """The request leaves the runner and gives up its blocks; what it computed stays in the prefix cache."""
        self.forget(request)
        self.give_blocks(request)

    def forget(self, request: Request) -> None:
        """The request leaves the runner: late results are dropped. Its blocks stay with it (a push may read them)."""
        self._drop_rows(request)
        request.epoch += 1

    def _drop_rows(self, request: Request) -> None:
        known_here = self._running.pop(request.key, None) is not None
        if known_here:
            if request in self._active:
                self._active.remove(request)
                self._rows = None
        elif request in self.prefilling:
            self.prefilling.remove(request)
            known_here = True
        elif self._forking.pop(request.key, None) is not None:
            self.count -= request.slots  # the runner is told already
        if known_here:
            self.count -= request.slots
            before = len(self._admit)
            self._admit = [a for a in self._admit if a.key != request.key]
            if len(self._admit) == before:  # the runner has heard of it
                self._release.append(request.key)
            copy = self._copies.pop(request.key, None)
            if copy is not None:
                self._let_go([copy.src])

    def give_blocks(self, request: Request) -> None:
        """Enter what is computed and accepted into the prefix cache, then let go of every block.

        They become reusable when every step ordered so far is done, since a surplus row may still write to them.
        """
        self.cache(request, request.done if request.remote is not None else min(request.done, request.known - 1))
        blocks: list[int] = []
        for page, block in enumerate(request.blocks):
            blocks.append(block)
            if page in request.extras:
                blocks.append(request.extras[page])
        request.extras, request.blocks = {}, []
        request.inserted = request.capacity = 0
        self._let_go(blocks)

    def _let_go(self, blocks: list[int]) -> None:
        if self.inflight:
            self.pool.release_after(self.step, blocks)
        else:
            self.pool.release(blocks)

    def cache(self, request: Request, tokens: int) -> None:
        """Enter the full pages of the first `tokens` tokens, whose writing steps are done."""
        full = tokens // self.limits.page_size
        if full > request.inserted:
            end = 4 * full * self.limits.page_size
            path = bytes(memoryview(request.tokens)[:end])
            request.extras |= self.prefix.insert(path, request.blocks[:full], request.inserted, request.salt)
            request.inserted = full

    # --- ordering ---

    def order(self, now: float) -> StepOrder | None:
        """The next step, or None when there is nothing to compute or `DEPTH` steps are in flight."""
        if len(self.inflight) >= DEPTH:
            return None
        grow = self._grow() if self._active else []
        rows, epochs, keys, counts, samples = self._decode_rows()
        chunks: list[Chunk] = []
        pushes: list[Push] = []
        admit, release = self._admit, self._release
        self._release = []  # what this step makes superfluous leaves with the next order, not before it runs
        if self.prefilling:
            chunks, pushes = self._chunks(len(rows))
        if not rows and not chunks:
            self._release = release
            return None
        self.step += 1
        order = StepOrder(self.step, keys, counts, samples, admit=admit, release=release, pushes=pushes)
        self._admit = []
        if grow:
            order.grow_keys_i64 = np.array([r.key for r, _ in grow], dtype="<i8").tobytes()
            order.grow_blocks_i32 = to_i32([block for _, block in grow])
        if chunks:
            self._add_chunks(order, chunks)
        if self._copies:
            order.copies = list(self._copies.values())
            self._copies = {}
            self.pool.release_after(self.step, [copy.src for copy in order.copies])
        self.inflight.append(InFlight(self.step, now, rows, epochs, chunks))
        return order

    def _decode_rows(self) -> tuple[list[Request], list[int], bytes, bytes, bytes]:
        """Advance every active request by one token. The raw arrays are made anew only when the batch changed."""
        if not self._active:
            return [], [], b"", b"", b""
        stalled = False
        for request in self._active:
            if request.ordered >= request.capacity:
                stalled = True
                break
        if stalled:
            batch = [r for r in self._active if r.ordered < r.capacity]
            cache = _make_rows(batch)
        else:
            if self._rows is None:
                self._rows = _make_rows(list(self._active))
            cache = self._rows
        ended = False
        for request in cache.requests:
            request.ordered += 1
            request.left -= 1
            if not request.left:
                ended = True
        if ended:
            self._active = [r for r in self._active if r.left > 0]
            self._rows = None
        return cache.requests, cache.epochs, cache.keys, cache.counts, cache.samples

    def _grow(self) -> list[tuple[Request, int]]:
        """A block for every active request whose blocks are full; the youngest are retracted when memory runs out."""
        needy = [r for r in self._active if r.ordered >= r.capacity]
        if not needy:
            return []
        needy.sort(key=lambda r: r.age)
        grown: list[tuple[Request, int]] = []
        for request in needy:
            if request.state is not State.RUNNING:  # retracted for an older one
                continue
            got = self.pool.allocate(1)
            while got is None and not self.pool.returning:
                # A prompt that is being computed here, too: two that take each other's blocks in turn would never end.
                here = [r for r in self.prefilling if r.remote is None]
                victim = max([*self._running.values(), *here], key=lambda r: r.age)
                self.retract(victim)
                grown = [g for g in grown if g[0] is not victim]
                if victim is request:
                    break
                got = self.pool.allocate(1)
            if got is not None:
                request.blocks += got
                request.capacity += self.limits.page_size
                grown.append((request, got[0]))
        return grown

    def retract(self, request: Request) -> None:
        """Take a request out of the batch; it will be replayed from prompt + emitted tokens and keeps its age."""
        self.retractions += 1
        self.leave(request)
        self.retracted(request)

    def _chunks(self, decoding: int) -> tuple[list[Chunk], list[Push]]:
        """Prompt rows within the step's token budget, oldest first."""
        limits = self.limits
        budget = max(limits.prefill_tokens - decoding, min(limits.chunk, limits.page_size))
        chunks, pushes, row = [], [], decoding
        for request in list(self.prefilling):
            size = min(request.known - request.ordered, limits.chunk, budget)
            if size <= 0:
                break
            begin, request.ordered = request.ordered, request.ordered + size
            last = request.ordered == request.known
            chunk = Chunk(
                request, request.epoch, row, size, request.ordered, last, self._completed(request, begin, last)
            )
            chunks.append(chunk)
            if request.remote is not None and chunk.pages:
                first = chunk.pages[0][0]
                push = self.pusher(request, first, request.blocks[first : first + len(chunk.pages)])
                if push is not None:
                    pushes.append(push)
            if last:
                self._prompt_ordered(request)
            budget -= size
            row += 1
        return chunks, pushes

    def _completed(self, request: Request, begin: int, last: bool) -> list[tuple[int, int]]:
        """Pages, as (index, valid tokens), that are complete when the request is computed up to `ordered`."""
        size = self.limits.page_size
        pages = [(page, size) for page in range(begin // size, request.ordered // size)]
        if last and request.ordered % size:
            pages.append((request.ordered // size, request.ordered % size))
        return pages

    def _prompt_ordered(self, request: Request) -> None:
        """The last chunk is ordered; the next order may already decode from its token, which stays in the runner."""
        self.prefilling.remove(request)
        if request.remote is not None:
            self._release.append(request.key)  # applied by the next order, after this step
            request.state = State.PUSHING
            self.count -= 1
        elif request.choices > 1:
            self._release.append(request.key)  # its choices enter as requests of their own
            self._forking[request.key] = request
        else:
            request.left = request.max_tokens - request.emitted - 1
            self._start_decoding(request)

    def _add_chunks(self, order: StepOrder, chunks: list[Chunk]) -> None:
        order.rows_i64 += np.array([c.request.key for c in chunks], dtype="<i8").tobytes()
        order.counts_i32 += to_i32([c.size for c in chunks])
        order.sample_u8 += bytes(int(c.last) for c in chunks)
        if self.limits.digests:
            done = [(c.request.blocks[page], valid) for c in chunks for page, valid in c.pages]
            order.complete_i32 = to_i32([block for block, _ in done])
            order.complete_tokens_i32 = to_i32([valid for _, valid in done])

    # --- results ---

    def finished(self, now: float, done: StepDone) -> InFlight:
        """The oldest step in flight is done: its blocks may be reused. Raises ProtocolError when out of order."""
        if not self.inflight or self.inflight[0].step != done.step:
            expected = self.inflight[0].step if self.inflight else None
            raise ProtocolError("step", f"runner finished step {done.step}, expected {expected}")
        flight = self.inflight.popleft()
        if self.inflight:
            self.inflight[0].at = now  # the runner turns to it only now
        if len(done.counts_u8) != len(flight.decode) + len(flight.chunks):
            raise ProtocolError("counts_u8", f"step {done.step} has {len(done.counts_u8)} rows")
        self.pool.step_done(done.step)
        return flight


def _make_rows(requests: list[Request]) -> _Rows:
    n = len(requests)
    keys = np.array([r.key for r in requests], dtype="<i8").tobytes()
    return _Rows(requests, [r.epoch for r in requests], keys, b"\x01\x00\x00\x00" * n, b"\x01" * n)
