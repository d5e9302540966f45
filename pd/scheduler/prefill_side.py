"""A prefill instance's half: prompts that decode instances ask for, from `Prefill` to the release of their blocks."""

from __future__ import annotations

import numpy as np

from pd.messages import Answered, Finish, Push, StepDone, TokenLogprobs
from pd.scheduler.batch import Chunk
from pd.scheduler.core import REMOTE_KEYS, Core
from pd.scheduler.first_token import strange_result
from pd.scheduler.handoff import (
    Accepted,
    PrefillHandoffs,
    RoomAnswered,
    RoomExpected,
    RoomsLost,
    SourceFree,
    Stop,
)
from pd.scheduler.handoff_base import LEG_DROPPED, MAX_RID, handoff_log
from pd.scheduler.request import Request, State, first_choices
from pd.scheduler.rooms import Leg, Outcome, Problem, Result, Rooms, label_of
from pd.types import FinishReason, HandoffId


class PrefillSide:
    """Glue between the hand-off machine, the batch and the rooms. Owns the map from hand-off to request."""

    def __init__(self, core: Core, handoffs: PrefillHandoffs) -> None:
        self.core, self.handoffs = core, handoffs
        self.rooms = Rooms(core.settings.control.bootstrap_timeout)
        self._requests: dict[HandoffId, Request] = {}
        self._next = 0
        self._left: list[tuple[int, bool]] = []  # keys of legs that ended in this event; whether their client did it
        core.ended = self._ended
        core.batcher.pusher = self._push

    def __len__(self) -> int:
        return len(self._requests)

    def digested(self, blocks: list[int]) -> list[int]:
        """The leading blocks whose digest is kept: only those can be pushed without computing them anew."""
        digest = self.core.pool.digest
        for index, block in enumerate(blocks):
            if digest[block] is None:
                return blocks[:index]
        return blocks

    # --- notices of the hand-off machine ---

    def notice(self, now: float, notice: object) -> None:
        if isinstance(notice, Accepted):
            self._accepted(now, notice)
        elif isinstance(notice, Stop):
            self._stop(notice.id)
            self.rooms.stopped(now, notice.id)
        elif isinstance(notice, SourceFree):
            request = self._requests.pop(notice.id, None)
            if request is not None:
                self.core.batcher.leave(request)
                self.core.remove(request)
        elif isinstance(notice, RoomExpected):
            self.rooms.expected(now, notice.room, notice.session)
        elif isinstance(notice, RoomAnswered):
            message = notice.message
            self.rooms.answered(now, message.room, notice.session, message.prompt, self._outcome(message))
        elif isinstance(notice, RoomsLost):
            self.rooms.lost(now, notice.session, notice.reason)
        self.settle()

    def _accepted(self, now: float, notice: Accepted) -> None:
        message = notice.message
        pages = self.core.batcher.pages(len(message.tokens_i32) // 4)
        if pages > self.core.pool.total:
            reason = f"the prompt needs {pages} blocks, the pool has {self.core.pool.total}"
            self.handoffs.fail(now, notice.id, reason, retryable=True)
            return
        strange = self.core.strange_token(message.tokens_i32)
        if strange is not None:
            self.handoffs.fail(now, notice.id, f"token id {strange} is outside the vocabulary", retryable=False)
            return
        self._next += 1
        request = Request(
            REMOTE_KEYS + self._next, message.rid[:MAX_RID], message.tokens_i32, message.prompt_len, message.sampling
        )
        request.remote = notice.id
        request.choices = message.choices
        request.logprob_start = message.logprob_start
        request.prompt_top_logprobs = message.prompt_top_logprobs
        request.priority, request.salt, request.room = message.priority, message.salt, message.room
        self._requests[notice.id] = request
        request.first_block = message.first_block
        self.core.add(request, now)
        if message.room >= 0:
            prompt = message.tokens_i32[: 4 * message.prompt_len]
            self.rooms.asked(now, message.room, notice.id, notice.session, label_of(prompt))

    def _stop(self, id: HandoffId) -> None:
        """Stop computing; the blocks stay until `SourceFree`."""
        request = self._requests.get(id)
        if request is not None:
            self.core.unqueue(request)
            self.core.batcher.forget(request)
            request.state = State.PUSHING

    # --- the batch's side ---

    def started(self, request: Request, cached_pages: int) -> None:
        """The cached prefix is pushed at once; its digests are known."""
        assert request.remote is not None
        self.handoffs.started(request.remote)
        self.core.out.append(handoff_log("handoff_started", request.rid, request.remote, cached=request.cached))
        first = request.first_block
        for page in range(first, cached_pages):
            digest = self.core.pool.digest[request.blocks[page]]
            assert digest is not None
            request.tail_digests[page] = digest
        if cached_pages > first:
            self.handoffs.push(request.remote, request.blocks[first:cached_pages], 0, after_step=False)

    def _push(self, request: Request, page: int, blocks: list[int]) -> Push | None:
        assert request.remote is not None
        skip = max(0, request.first_block - page)
        if skip >= len(blocks):
            return None
        first = page + skip - request.first_block
        return self.handoffs.push(request.remote, blocks[skip:], first, after_step=True)

    def chunk_done(
        self, now: float, chunk: Chunk, digests: list[int], tokens: list[int], logprobs: list[TokenLogprobs | None]
    ) -> None:
        """A chunk's step is done: keep its digests, share its pages; with the last one the first token goes out."""
        request = chunk.request
        size = self.core.page_size
        for (page, valid), digest in zip(chunk.pages, digests, strict=True):
            if valid == size:
                self.core.pool.digest[request.blocks[page]] = digest
            request.tail_digests[page] = digest
        request.done = chunk.end
        self.core.batcher.cache(request, chunk.end)
        if chunk.last:
            id = request.remote
            assert id is not None
            choices, of_prompt = first_choices(request, tokens, logprobs), request.merged_prompt_logprobs()
            self.handoffs.first_token(now, id, choices, request.cached, of_prompt)
            self.rooms.first_token(now, id, Result(tuple(choices), request.cached, of_prompt))
            self.settle()
            pages = self.core.batcher.pages(request.known)
            self.handoffs.computed(now, id, [request.tail_digests[p] for p in range(request.first_block, pages)])

    # --- legs: requests of clients, which are computed for the decode instance that asks for the same room ---

    def leg_came(self, now: float, request: Request) -> None:
        request.state = State.LEG
        self.core.adopt(request, now)
        self.core.log("leg_came", rid=request.rid, room=request.room)
        self.rooms.came(now, Leg(request.key, request.room, label_of(request.tokens)))
        self.settle()

    def _ended(self, request: Request, finish: Finish) -> None:
        if request.state is State.LEG:
            self._left.append((request.key, finish.reason is FinishReason.ABORT))

    def let_go(self, now: float) -> None:
        """Of legs whose end has another reason than the rooms'. One that its client dropped cancels the hand-off."""
        for key, dropped in self._left:
            id = self.rooms.left(now, key)
            if id is not None and dropped:
                self.handoffs.fail(now, id, LEG_DROPPED, retryable=False)
        self._left.clear()

    def tick(self, now: float) -> None:
        self.rooms.tick(now)
        self.settle()

    def drain(self) -> None:
        self.rooms.drain()
        self.settle()

    def settle(self) -> None:
        for settled in self.rooms.take():
            request, outcome = self.core.requests.get(settled.key), settled.outcome
            if request is None:
                continue  # it ended for another reason in the same event
            if isinstance(outcome, Problem):
                self.core.fail(request, outcome.message, outcome.status)
            else:
                self._answer_leg(request, outcome)

    def _answer_leg(self, request: Request, result: Result) -> None:
        """First tokens are all that a leg gets. Their finish is that of the request, else length, as SGLang's is."""
        core = self.core
        problem = strange_result(result, request, core.vocab_size)
        if problem:
            core.fail(request, f"the first token of its bootstrap_room does not fit the request: {problem}", 502)
            return
        request.cached = result.cached_tokens
        request.prompt_logprobs = [result.prompt_logprobs] if result.prompt_logprobs is not None else []
        core.outputs.started(request)
        request.choices = 1  # from here on it stands for one choice after the other
        for request.choice, first in enumerate(result.choices):
            core.outputs.row(request, first.token.to_bytes(4, "little", signed=True), first.logprobs)
            stopped = first.finish is not None and first.finish.reason is FinishReason.STOP
            finish = first.finish if stopped and first.finish else Finish(FinishReason.LENGTH)
            if first is not result.choices[-1]:
                core.outputs.finished(request, finish)
        core.finish(request, finish)

    @staticmethod
    def _outcome(message: Answered) -> Outcome:
        """What a decode instance says of a leg."""
        if not message.choices:
            status = message.status if 400 <= message.status < 600 else 503
            return Problem(status, f"the decode instance could not answer: {message.reason}")
        return Result(tuple(message.choices), message.cached_tokens, message.prompt_logprobs)


def split_digests(done: StepDone, chunks: list[Chunk]) -> list[list[int]]:
    """`digests_u64` of a step by chunk, in order."""
    values = np.frombuffer(done.digests_u64, dtype="<u8").tolist()
    result, at = [], 0
    for chunk in chunks:
        result.append(values[at : at + len(chunk.pages)] if values else [])
        at += len(chunk.pages)
    return result
