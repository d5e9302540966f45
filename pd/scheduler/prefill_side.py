"""A prefill instance's half: prompts that decode instances ask for, from `Prefill` to the release of their blocks."""

from __future__ import annotations

import numpy as np

from pd.messages import Push, StepDone, TokenLogprobs
from pd.scheduler.batch import Chunk
from pd.scheduler.core import REMOTE_KEYS, Core
from pd.scheduler.handoff import Accepted, PrefillHandoffs, SourceFree, Stop
from pd.scheduler.handoff_base import MAX_RID, handoff_log
from pd.scheduler.request import Request, State, first_choices
from pd.types import HandoffId


class PrefillSide:
    """Glue between the hand-off machine and the batch. Owns the map from hand-off to request."""

    def __init__(self, core: Core, handoffs: PrefillHandoffs) -> None:
        self.core, self.handoffs = core, handoffs
        self._requests: dict[HandoffId, Request] = {}
        self._next = 0
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
        elif isinstance(notice, SourceFree):
            request = self._requests.pop(notice.id, None)
            if request is not None:
                self.core.batcher.leave(request)
                self.core.remove(request)

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

    def _stop(self, id: HandoffId) -> None:
        """Stop computing; the blocks stay until `SourceFree`."""
        request = self._requests.get(id)
        if request is not None:
            self.core.waiting.discard(request)
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
            choices = first_choices(request, tokens, logprobs)
            self.handoffs.first_token(now, id, choices, request.cached, request.merged_prompt_logprobs())
            pages = self.core.batcher.pages(request.known)
            self.handoffs.computed(now, id, [request.tail_digests[p] for p in range(request.first_block, pages)])


def split_digests(done: StepDone, chunks: list[Chunk]) -> list[list[int]]:
    """`digests_u64` of a step by chunk, in order."""
    values = np.frombuffer(done.digests_u64, dtype="<u8").tolist()
    result, at = [], 0
    for chunk in chunks:
        result.append(values[at : at + len(chunk.pages)] if values else [])
        at += len(chunk.pages)
    return result
