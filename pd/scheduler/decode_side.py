"""A decode instance's half: asking prefill instances, and what their answers mean for a request."""

from __future__ import annotations

from pd.messages import Answered, Expect, Finish, FirstChoice, FirstToken, Submit
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
from pd.scheduler.handoff_base import LEG_DROPPED, UNCONSTRAINABLE, handoff_log, millis
from pd.scheduler.request import ALL_BUT_LAST, Request, State
from pd.scheduler.rooms import label_of


class DecodeSide:
    """Glue between the hand-off machine and the queue. `asked` counts the running slots of attempts under way."""

    def __init__(self, core: Core, handoffs: DecodeHandoffs) -> None:
        self.core, self.handoffs = core, handoffs
        self.asked = 0
        self._fresh: list[Request] = []  # with a leg, of this event
        self._owed: list[tuple[str, Answered]] = []  # to the instances whose legs wait
        self._undelivered: list[tuple[str, Answered]] = []  # of those, to instances that are being dialled
        core.ended = self._ended

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
            room=-1 if request.started else request.room,  # its leg has been answered
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
            sender = self.handoffs.sender_of(notice.id)
            request.prefill_name = sender.http if sender is not None else ""
            if request.leg and self.handoffs.peers.at(request.leg).sender is sender:
                request.leg = ""  # that instance answers it by itself
            return request, notice.message
        if isinstance(notice, Ready):
            self._ready(now, request, notice)
        elif isinstance(notice, AttemptFailed):
            self._failed(request, notice)
        elif isinstance(notice, GrantReturned):
            self._returned(request, notice)
        return None

    def _ready(self, now: float, request: Request, notice: Ready) -> None:
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
        fields = {
            "blocks": len(notice.blocks),
            "bytes": notice.nbytes,
            "after_first_ms": millis(now - request.heard_at),
        }
        core.out.append(handoff_log("handoff_landed", request.rid, notice.id, "info", **fields))

    def _failed(self, request: Request, notice: AttemptFailed) -> None:
        """Retry at once with a new grant: the pin on the prefix survives, the old grant drains by itself."""
        self._detach(request)
        request.tried[notice.endpoint] = notice.reason
        fields = {"prefill": notice.endpoint, "reason": notice.reason, "retry": notice.retryable}
        self.core.out.append(handoff_log("handoff_failed", request.rid, notice.id, "warning", **fields))
        if not notice.retryable:
            choices.fail(self.core, request, f"prefill failed: {notice.reason}", _status_of(notice.reason))
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

    # --- legs: a foreign router sends the request to the prefill instance, too, where it waits for the first token ---

    def has_leg(self, request: Request) -> None:
        """A request with a room came. Its leg is with the prefill instance that it names last."""
        if request.room >= 0 and request.prefills:
            request.leg = request.prefills[-1]
            self._fresh.append(request)

    def refused(self, submit: Submit, status: int, message: str) -> None:
        """A request was not even queued."""
        if submit.room >= 0 and submit.prefills:
            answer = Answered(submit.room, 0, [], message, status, label_of(submit.tokens_i32))
            self._owed.append((submit.prefills[-1], answer))

    def answer_leg(self, request: Request, choices: list[FirstChoice]) -> None:
        """The first token came from elsewhere than the instance where the leg is."""
        label, of_prompt = label_of(request.tokens[: 4 * request.prompt_len]), request.merged_prompt_logprobs()
        answer = Answered(request.room, 0, choices, "", 200, label, request.cached, of_prompt)
        self._owed.append((request.leg, answer))
        request.leg = ""

    def _ended(self, request: Request, finish: Finish) -> None:
        """Without a token, if its leg still waits."""
        if request.leg:
            # An operator's abort has no status. It must not be one that makes a router try again.
            status, reason = finish.status if finish.status >= 400 else 409, finish.message or finish.reason.value
            answer = Answered(request.room, 0, [], reason, status, label_of(request.tokens[: 4 * request.prompt_len]))
            self._owed.append((request.leg, answer))
            request.leg = ""

    def session_up(self, now: float, endpoint: str) -> None:
        """What waits is made known to the peer: if this instance dies first, its legs need not wait any longer."""
        peers = self.handoffs.peers
        for request in self.core.requests.values():
            if request.leg and request.state is State.WAITING and peers.at(request.leg) is peers.at(endpoint):
                self.handoffs.tell(now, request.leg, Expect(request.room))
        self.session_decided()

    def session_decided(self) -> None:
        """A peer that was dialled can be told now, or cannot."""
        self._owed += self._undelivered
        self._undelivered.clear()

    def tell_legs(self, now: float) -> None:
        """At the end of an event. Whoever is out of reach is not told: a prefill instance bounds its legs itself."""
        peers = self.handoffs.peers
        for request in self._fresh:
            if (
                request.leg
                and request.state is State.WAITING
                and not self.handoffs.tell(now, request.leg, Expect(request.room))
            ):
                peers.reach(now, request.leg)
        for endpoint, answer in self._owed:
            if not self.handoffs.tell(now, endpoint, answer) and peers.reach(now, endpoint):
                self._undelivered.append((endpoint, answer))
        self._fresh.clear()
        self._owed.clear()


def _status_of(reason: str) -> int:
    """Of a request whose hand-off failed for good."""
    if reason.startswith(UNCONSTRAINABLE):
        return 400
    return 504 if "deadline" in reason else 499 if reason == LEG_DROPPED else 500
