"""A decode instance's half: asking prefill instances, and what their answers mean for a request."""

from __future__ import annotations

from pd.messages import FirstToken
from pd.scheduler import choices
from pd.scheduler.core import Core
from pd.scheduler.handoff import (
    AskSpec,
    AttemptFailed,
    ChoiceKind,
    DecodeHandoffs,
    FirstTokenCame,
    GrantReturned,
    Ready,
)
from pd.scheduler.handoff_base import handoff_log
from pd.scheduler.request import ALL_BUT_LAST, Request, State


class DecodeSide:
    """Glue between the hand-off machine and the queue. `asked` counts the running slots of attempts under way."""

    def __init__(self, core: Core, handoffs: DecodeHandoffs) -> None:
        self.core, self.handoffs = core, handoffs
        self.asked = 0

    def choose(self, now: float, candidates: list[str], tokens: int) -> tuple[str | None, str]:
        """(endpoint, ""), (None, "") to wait, or (None, reason) when no candidate can be asked."""
        choice = self.handoffs.choose(now, candidates, tokens)
        if choice.kind is ChoiceKind.READY:
            return choice.endpoint, ""
        return None, choice.reason if choice.kind is ChoiceKind.NONE else ""

    def ask(self, now: float, request: Request, endpoint: str, lacks: int) -> bool:
        """Grant blocks for what this instance lacks and ask. False when the blocks cannot be had."""
        core = self.core
        grant = core.pool.grant(lacks)
        if grant is None:
            return False
        candidates = tuple(p for p in request.prefills if p not in request.tried)
        tail = request.known % core.page_size or core.page_size
        spec = AskSpec(
            tokens_i32=bytes(request.tokens),
            prompt_len=request.prompt_len,
            sampling=request.sampling,
            first_block=len(request.blocks),
            deadline=request.expires,
            candidates=candidates[candidates.index(endpoint) + 1 :],
            tail_tokens=tail,
            choices=request.choices,
            logprob_start=-1 if request.started else request.logprob_start,
            prompt_top_logprobs=request.prompt_top_logprobs,
            priority=request.priority,
            salt=request.salt,
            room=request.room,
            rid=request.rid,
        )
        request.handoff = self.handoffs.ask(now, request.key, endpoint, spec, grant)
        request.state = State.ASKED
        self.asked += request.slots
        return True

    def heard(self, request: Request) -> None:
        """The first token came: what the default deadline bounds, the time without a new one, begins anew."""
        if request.handoff is not None:
            self.handoffs.prolong(request.key, request.expires)

    def drop(self, now: float, request: Request, reason: str) -> None:
        """The request ends for another reason: its attempt drains on its own."""
        if request.handoff is not None:
            self.handoffs.cancel(now, request.key, reason)
            self._detach(request)

    def _detach(self, request: Request) -> None:
        request.handoff = None
        self.asked -= request.slots

    def notice(self, now: float, notice: object) -> tuple[Request, FirstToken] | None:
        """Apply a notice. A first token is returned to the caller, which knows what tokens mean."""
        key: int = notice.key  # type: ignore[attr-defined]
        request = self.core.requests.get(key)
        if request is None or request.handoff is None:
            return None  # it ended in the same event
        if isinstance(notice, FirstTokenCame):
            request.prefill_name = self.handoffs.name_of(notice.id)
            return request, notice.message
        if isinstance(notice, Ready):
            self._ready(request, notice)
        elif isinstance(notice, AttemptFailed):
            self._failed(request, notice)
        elif isinstance(notice, GrantReturned):
            self._returned(request, notice)
        return None

    def _ready(self, request: Request, notice: Ready) -> None:
        """Its KV is here and verified; the blocks are the request's now."""
        core = self.core
        self._detach(request)
        pages_before = len(request.blocks)
        request.blocks += notice.blocks
        core.stats.cached += pages_before * core.page_size
        computed = request.known - 1 if request.choices == 1 else request.known
        core.stats.landed += computed - pages_before * core.page_size
        if request.choices > 1:
            choices.share_out(core, request)
        else:
            core.batcher.enter(request, computed)
            request.done = ALL_BUT_LAST
            core.batcher.cache(request, computed)
        core.out.append(
            handoff_log("handoff_landed", request.rid, notice.id, blocks=len(notice.blocks), bytes=notice.nbytes)
        )

    def _failed(self, request: Request, notice: AttemptFailed) -> None:
        """Retry at once with a new grant: the pin on the prefix survives, the old grant drains by itself."""
        self._detach(request)
        request.tried[notice.endpoint] = notice.reason
        fields = {"prefill": notice.endpoint, "reason": notice.reason, "retry": notice.retryable}
        self.core.out.append(handoff_log("handoff_failed", request.rid, notice.id, "warning", **fields))
        if not notice.retryable:
            status = 504 if "deadline" in notice.reason else 500
            choices.fail(self.core, request, f"prefill failed: {notice.reason}", status)
        elif request.choices > 1 and request.started:
            choices.scatter(self.core, request)
        else:
            self._again(request)

    def _returned(self, request: Request, notice: GrantReturned) -> None:
        """Refused everywhere for now. Only a prefill that can never take the request is not asked again; busy and

        draining ones the hand-off machine knows by itself.
        """
        self._detach(request)
        if notice.reason.startswith("mismatch"):
            request.tried[notice.tried[-1]] = notice.reason
        self.core.log("handoff_refused", rid=request.rid, reason=notice.reason)
        self._again(request)

    def _again(self, request: Request) -> None:
        request.replay = True
        request.state = State.WAITING
        self.core.waiting.push(request)
