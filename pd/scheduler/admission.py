"""From the queue into the runner or to a prefill instance: when, and where."""

from __future__ import annotations

import enum

from pd.scheduler.core import Core
from pd.scheduler.decode_side import DecodeSide
from pd.scheduler.prefill_side import PrefillSide
from pd.scheduler.request import Request, State
from pd.types import Role

#: How many requests that wait for a peer may be passed by younger ones in one go.
LOOK_PAST = 16


class Verdict(enum.Enum):
    STARTED = enum.auto()
    NO_MEMORY = enum.auto()
    NO_PEER = enum.auto()
    GONE = enum.auto()


class Admission:
    """Takes requests from the queue, in its order, while blocks, running slots and peers allow.

    A request that lacks memory blocks those behind it (or it would starve); one that waits for a peer does not.
    """

    def __init__(self, core: Core, decode: DecodeSide | None, prefill: PrefillSide | None) -> None:
        self.core, self.decode, self.prefill = core, decode, prefill
        # Of the last look: blocks that the first to lack memory needed (0: none did), who was first in the queue, and
        # how many requests had a claim on the reserve.
        self._need = 0
        self._head: Request | None = None
        self._claims = 0
        self._peers_changed = True
        self._some_wait_for_peers = False

    def peers_changed(self) -> None:
        self._peers_changed = True

    def look_again(self) -> None:
        """Time has passed: what a waiting request needs may have fallen unseen (a running one computed its prefix)."""
        self._need, self._peers_changed = 0, True

    def _futile(self, head: Request, asked: int) -> bool:
        """Whether another look would find what the last one found. Looking costs a walk through the prefix cache."""
        core = self.core
        if self._some_wait_for_peers and self._peers_changed:
            return False
        if not self._need:
            return self._some_wait_for_peers
        if head is not self._head or core.batcher.count + asked < self._claims:
            return False  # another may need less; with fewer requests the growth reserve is smaller
        return core.pool.available < self._need

    def run(self, now: float) -> None:
        core = self.core
        asked = self.decode.asked if self.decode is not None else 0
        head = core.waiting.peek()
        if head is None or self._futile(head, asked):
            return
        passed: list[Request] = []
        slots = core.settings.scheduler.max_running_requests
        self._peers_changed, self._need = False, 0
        while len(passed) < LOOK_PAST:
            request = core.waiting.peek()
            if request is None or core.batcher.count + asked + request.slots > slots:
                break
            core.waiting.pop()
            verdict = self._start(request, now, asked)
            if verdict is Verdict.NO_MEMORY:
                passed.append(request)
                break
            if verdict is Verdict.NO_PEER:
                passed.append(request)
            asked = self.decode.asked if self.decode is not None else 0
        for request in passed:
            core.waiting.push(request)
        self._head = core.waiting.peek()
        self._claims = core.batcher.count + asked
        self._some_wait_for_peers = len(passed) > (self._need > 0)
        if self._need and not core.batcher.count and not asked:
            self._unpin_waiting()

    def _unpin_waiting(self) -> None:
        """Nothing runs, and yet the head lacks memory: what retries keep pinned behind it would never come back."""
        for request in list(self.core.waiting):
            if request.blocks:
                self.core.batcher.give_blocks(request)
                self._need = 0

    def _start(self, request: Request, now: float, asked: int) -> Verdict:
        core = self.core
        if request.remote is not None:
            return self._start_remote(request)
        fresh = not request.blocks  # a retry still holds the pin on its prefix
        if fresh:
            # Whatever prompt logprobs are wanted, what is here need not be sent; only computing has to begin earlier.
            matched = core.prefix.match(request.tokens, request.known - 1, request.salt)
            core.pool.retain(matched)
            request.blocks = matched
            request.inserted = len(matched)
        usable = min(len(request.blocks), request.match_limit() // core.page_size)  # for computing here
        endpoint = self._where(request, request.known - usable * core.page_size, now)
        if endpoint == "" and usable < len(request.blocks):
            core.pool.release(request.blocks[usable:])
            del request.blocks[usable:]
            request.inserted = min(request.inserted, usable)
        cached = len(request.blocks) * core.page_size
        lacks = core.batcher.pages(request.known) - len(request.blocks)
        if endpoint is None or request.state is State.GONE:
            verdict = Verdict.GONE if request.state is State.GONE else Verdict.NO_PEER
        elif core.pool.available < (need := core.batcher.needs(request, lacks, asked)):
            self._need = need
            verdict = Verdict.NO_MEMORY
        elif endpoint == "":
            verdict = self._start_local(request, lacks, cached)
        else:
            assert self.decode is not None
            verdict = Verdict.STARTED if self.decode.ask(now, request, endpoint, lacks) else Verdict.NO_MEMORY
        if verdict in (Verdict.NO_MEMORY, Verdict.NO_PEER) and fresh:
            core.pool.release(request.blocks)
            request.blocks, request.inserted = [], 0
        return verdict

    def _here(self, request: Request, lacks: int) -> str | None:
        """A decode instance computes a prompt itself, unless too much of that is pending: 503 then."""
        core, limit = self.core, self.core.settings.scheduler.local_prefill_queue
        pending = sum(r.known - r.ordered for r in core.batcher.prefilling)
        if pending and pending + lacks > limit:
            message = f"no prefill instance, and {pending} prompt tokens wait for local prefill already"
            core.fail(request, message, 503)
            return None
        return ""

    def _where(self, request: Request, lacks: int, now: float) -> str | None:
        """ "" for here, a prefill's endpoint, or None to wait. Ends the request when nobody may compute it."""
        settings = self.core.settings
        if self.decode is None or settings.role is Role.UNIFIED or request.probe:
            return ""
        if request.room < 0 and lacks <= settings.short_prefill:
            return self._here(request, lacks)
        candidates = [p for p in request.prefills if p not in request.tried]
        endpoint, reason = self.decode.choose(now, candidates, request.known)
        if endpoint is None and reason:
            if settings.fallback:
                if candidates:
                    self.core.log("local_prefill", rid=request.rid, reason=reason)
                return self._here(request, lacks)
            if not request.prefills:
                reason = "the request names none, and local prefill is off"
            elif not candidates:
                reason = "; ".join(f"{endpoint}: {why}" for endpoint, why in request.tried.items())
            self.core.fail(request, f"no prefill instance can take the request: {reason}", 503)
        return endpoint

    def _start_local(self, request: Request, lacks: int, cached: int) -> Verdict:
        core = self.core
        blocks = core.pool.allocate(lacks)
        if blocks is None:
            return Verdict.NO_MEMORY
        if not request.started:
            request.cached = cached
        core.stats.cached += cached
        core.stats.computed += request.known - cached
        request.blocks += blocks
        if request.emitted:
            core.log("request_replayed", rid=request.rid, emitted=request.emitted, cached=cached)
        core.batcher.enter(request, cached)
        return Verdict.STARTED

    def _start_remote(self, request: Request) -> Verdict:
        """A prompt that a decode instance asked for: no growth, no reserve."""
        core = self.core
        assert self.prefill is not None and request.remote is not None
        matched = core.prefix.match(request.tokens, request.match_limit(), request.salt)
        matched = self.prefill.digested(matched)
        core.pool.retain(matched)
        lacks = core.batcher.pages(request.known) - len(matched)
        blocks = core.pool.allocate(lacks)
        if blocks is None:
            core.pool.release(matched)
            self._need = lacks
            return Verdict.NO_MEMORY
        request.blocks = matched + blocks
        request.inserted = len(matched)
        request.cached = len(matched) * core.page_size
        core.stats.cached += request.cached
        core.stats.computed += request.known - request.cached
        core.batcher.enter(request, request.cached)
        self.prefill.started(request, len(matched))
        return Verdict.STARTED
