"""The hand-off, prefill side: it computes what decode instances ask for and pushes the blocks.

    QUEUED ──started──► RUNNING ──computed──► COMPUTED ──all writes done, Landed──► LANDED ──LandedAck──► closed
       └── cancelled, failed, expired, session lost ──► STOPPING ──no write in flight, Cancelled──► closed

Who may read a source block: its pushes, from `push` until `SourceFree`. A push has ended when every sending rank
reported it applied (or never started), or when a reset of its receiver that was ordered after the push was with the
runner has been answered: failed or cancelled never means quiet. `Landed` and `Cancelled` are sent only when no push is
left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pd import messages as m
from pd.scheduler.actions import Action, Transfer
from pd.scheduler.handoff_base import (
    Accepted,
    Counts,
    HandoffConfig,
    LocalIdentity,
    PrefillNotice,
    RoomAnswered,
    RoomExpected,
    RoomsLost,
    SourceFree,
    Stop,
    to_i32,
    to_u64,
)
from pd.scheduler.prefill_peers import PrefillPeers, Receiver, Session, Wire
from pd.scheduler.prefill_table import (
    COMPUTING,
    EXPIRED,
    LIVE,
    PREFILL_TABLE,
    ClosedIds,
    Handoff,
    PrefillEvent,
    PrefillState,
    Pushes,
    audit_handoffs,
    new_handoff,
    refusal_log,
    refusal_of,
)
from pd.types import HandoffId, InstanceState, Load


class PrefillHandoffs:
    """All hand-offs that decode instances asked of this one. `accepting` False refuses new ones as draining."""

    def __init__(self, out: list[Action], identity: LocalIdentity, config: HandoffConfig) -> None:
        self.out, self.identity, self.config = out, identity, config
        self.peers = PrefillPeers(out, identity, config, self._posted)
        self.counts = Counts()
        self.accepting = True
        self._handler = PREFILL_TABLE.bind(self)
        self._open: dict[HandoffId, Handoff] = {}
        self._closed = ClosedIds(config.remember)
        self._pushes = Pushes(config.step_timeout)
        self._now = 0.0
        self._notices: list[PrefillNotice] = []

    # --- the scheduler's side ---

    def take_notices(self) -> list[PrefillNotice]:
        notices, self._notices = self._notices, []
        return notices

    @property
    def quiet(self) -> bool:
        """No hand-off is open: nothing computes, no write is in flight, every Landed was acknowledged.

        A draining instance waits for this: its Landed would be lost with it.
        """
        return not self._open

    @property
    def outcomes(self) -> dict[str, int]:
        return self.counts.outcomes

    @property
    def pushed_bytes(self) -> int:
        return self.counts.nbytes

    def set_status(self, now: float, state: InstanceState, load: Load, credit: int) -> None:
        """`credit`: prompt tokens that may still be queued here now. A change is told at once, at a bounded rate.

        A decode instance is told that plus what it has queued here itself: the window of its own unfinished tokens.
        """
        self._now = now
        self.accepting = state is not InstanceState.DRAINING
        self.peers.set_status(now, state, load, credit)

    def started(self, id: HandoffId) -> None:
        self._by_id(self._now, id, PrefillEvent.STARTED, None)

    def push(self, id: HandoffId, src: Sequence[int], first: int, *, after_step: bool) -> m.Push | None:
        """Blocks `src` go to destinations `first`.. of the hand-off; None when it is stopped: push nothing.

        With `after_step` the caller puts the push on the step order that it is building; otherwise it starts at once.
        For a decode instance of one rank; see `push_all`.
        """
        pushes = self.push_all(id, src, first, after_step=after_step)
        assert len(pushes) <= 1, "a decode instance of several ranks needs push_all"
        return pushes[0] if pushes else None

    def push_all(self, id: HandoffId, src: Sequence[int], first: int, *, after_step: bool) -> list[m.Push]:
        """As `push`, one per rank of the decode instance."""
        h = self._open.get(id)
        if h is None or h.state not in LIVE or not src:
            return []
        assert 0 <= first and first + len(src) <= len(h.dests), f"push beyond what {id} has asked for"
        h.missing.difference_update(range(first, first + len(src)))
        src_i32, dst_i32 = to_i32(src), to_i32(h.dests[first : first + len(src)])
        pushes, now = [], self._now
        for receiver in h.session.receivers:
            index = self._pushes.add(now, h, receiver, riding=after_step)
            push = m.Push(receiver.info.identity, id.tag, index, src_i32, dst_i32)
            pushes.append(push)
            if not after_step:
                self.out.append(Transfer(m.TransferPush(push)))
        return pushes

    def ordered(self, step: int) -> None:
        """Every push made with `after_step` since the last call rides on this step's order."""
        self._pushes.ordered(step)

    def step_done(self, step: int) -> None:
        """Pushes that rode on steps up to this one are with the runner: a reset from now on ends them."""
        self._pushes.step_done(step)

    def first_token(
        self,
        now: float,
        id: HandoffId,
        choices: list[m.FirstChoice],
        cached_tokens: int,
        prompt_logprobs: m.PromptLogprobs | None = None,
    ) -> None:
        message = m.FirstToken(id, choices, cached_tokens, prompt_logprobs)
        self._by_id(now, id, PrefillEvent.FIRST_TOKEN, message)

    def computed(self, now: float, id: HandoffId, digests: Sequence[int] | Mapping[int, Sequence[int]]) -> None:
        """Nothing is left to compute; `digests` of the destination blocks, of the only rank or per sending rank."""
        self._by_id(now, id, PrefillEvent.COMPUTED, digests)

    def fail(self, now: float, id: HandoffId, reason: str, retryable: bool) -> None:
        """This hand-off will not complete. A Stop notice follows if it was still computing."""
        self._by_id(now, id, PrefillEvent.FAIL, (reason, retryable))

    def goodbye(self, reason: str) -> None:
        """The instance exits: end every session in an orderly way."""
        now = self._now
        for session in self.peers:
            if session.up:
                self.peers.send(now, session, m.Goodbye(reason))
            self._end(now, session, "instance", reason)

    # --- sessions ---

    def hello(self, now: float, conn: int, hello: m.Hello) -> None:
        self._now = now
        misfit = self.peers.misfit(hello)
        if misfit is not None:
            self.peers.refuse(conn, *misfit)
            return
        older = self.peers.of_instance(hello.instance)
        if older is not None:
            self._end(now, older, "session", "the instance opened another session")
        current = {rank.identity for rank in hello.ranks}
        for receiver in self.peers.receivers():
            if receiver.instance == hello.instance and receiver.info.identity not in current:
                self._reset(now, receiver, "its instance restarted")
        self._welcome_if_ready(now, self.peers.open(now, conn, hello))

    def _welcome_if_ready(self, now: float, session: Session) -> None:
        """`writing` lists more than was asked: everything of this incarnation that may still land."""
        if not session.up and self.peers.ready(session):
            stopping = (h for h in self._open.values() if h.state is PrefillState.STOPPING)
            writing = [h.id for h in stopping if h.session.owner == session.owner]
            self.peers.welcome(now, session, writing)

    def session_down(self, now: float, session: int, reason: str) -> None:
        self._now = now
        found = self.peers.get(session)
        if found is not None:
            self._over(now, found, reason)

    def _end(self, now: float, session: Session, field: str, reason: str) -> None:
        self.peers.dismiss(session, field, reason)
        self._over(now, session, reason)

    def _over(self, now: float, session: Session, reason: str) -> None:
        self.peers.forget(now, session, reason)
        for h in self._of(session):
            self._event(now, h, PrefillEvent.LOST, reason)
        if session.rooms:
            self._notices.append(RoomsLost(session.id, reason))

    # --- events ---

    def peer_said(self, now: float, session: int, message: m.PeerMessage) -> None:
        self._now = now
        found = self.peers.get(session)
        if found is None or not found.up:
            self.counts.late(message)
            return
        found.heard_at = now
        if isinstance(message, m.Prefill):
            self._asked(now, found, message)
        elif isinstance(message, m.Cancel):
            self._about(now, found, PrefillEvent.CANCEL, message)
        elif isinstance(message, m.LandedAck):
            self._about(now, found, PrefillEvent.ACK, message)
        elif isinstance(message, m.Answered):
            self._notices.append(RoomAnswered(session, message))
        elif isinstance(message, m.Expect):
            found.rooms = True
            self._notices.append(RoomExpected(session, message.room))
        elif isinstance(message, m.Goodbye):
            found.leaving = True
            self._end(now, found, "session", message.reason)
        elif not isinstance(message, m.Heartbeat):
            self.counts.late(message)

    def _about(self, now: float, session: Session, event: PrefillEvent, message: Any) -> None:
        if message.id.incarnation != session.hello.incarnation:
            self.counts.late(f"{type(message).__name__} of another incarnation")
            return
        h = self._open.get(message.id)
        if h is None or h.session.owner != session.owner:
            self._handler(PrefillState.CLOSED, event)(now, None, (session, message))
        else:
            self._event(now, h, event, (session, message))

    def _asked(self, now: float, session: Session, message: m.Prefill) -> None:
        id = message.id
        if id in self._open or id in self._closed:
            self._about(now, session, PrefillEvent.PREFILL, message)
            return
        refused = refusal_of(self.peers, self.accepting, session, message)
        if refused is not None:
            self.counts.outcome(f"refused_{refused.why}")
            if refused.why != "mismatch":  # that one is found again
                self._closed.remember(id, refused)
            self.peers.send(now, session, refused)
            self.out.append(refusal_log(session, message, refused))
            return
        h = self._open[id] = new_handoff(now, session, message)
        session.queued += h.tokens
        session.rooms = session.rooms or message.room >= 0
        self.peers.credit = max(0, self.peers.credit - h.tokens)
        self._notices.append(Accepted(id, session.id, message, h.deadline))
        label = {"room": message.room} if message.room >= 0 else {}
        self.out.append(h.log("handoff_accepted", tokens=h.tokens, **label))

    def transfer_said(self, now: float, event: m.TransferEvent) -> None:
        self._now = now
        if isinstance(event, m.TransferPushed):
            self._reported(now, event, PrefillEvent.PUSHED)
        elif isinstance(event, m.TransferFailed):
            self._reported(now, event, PrefillEvent.DROPPED if event.quiet else PrefillEvent.BROKEN)
        elif isinstance(event, m.TransferConnected):
            if self.peers.connected(event) is not None:
                for session in self.peers:
                    self._welcome_if_ready(now, session)
        elif isinstance(event, m.TransferReset):
            self._was_reset(now, event)
        elif isinstance(event, m.TransferPeerLost):
            self._peer_lost(now, event)

    def _reported(self, now: float, event: m.TransferPushed | m.TransferFailed, kind: PrefillEvent) -> None:
        """One sending rank reports about one push. A broken one stays: only a reset ends it."""
        push = self._pushes.find(event)
        if push is None:
            self.counts.late(event)
            return
        h = push.handoff
        if isinstance(event, m.TransferPushed):
            h.nbytes[event.rank] = h.nbytes.get(event.rank, 0) + event.nbytes
            self.counts.nbytes += event.nbytes
            h.pushed.append((now - event.micros / 1e6, now))
        if kind is not PrefillEvent.BROKEN:
            push.awaited.discard(event.rank)
            if not push.awaited:
                self._ended(event.index)
        detail = event.reason if isinstance(event, m.TransferFailed) else ""
        if kind is PrefillEvent.BROKEN and h.state in LIVE:
            self._reset(now, push.receiver, f"a push failed: {detail}")
        self._event(now, h, kind, detail)

    def _ended(self, index: int) -> Handoff:
        push = self._pushes.end(index)
        self.peers.drop_if_idle(push.receiver)
        return push.handoff

    def _was_reset(self, now: float, event: m.TransferReset) -> None:
        receiver = self.peers.was_reset(event)
        if receiver is None:
            return
        touched = {id(h): h for h in [self._ended(i) for i in sorted(receiver.covered & receiver.pushes)]}
        self.peers.finish_reset(receiver)
        for h in touched.values():
            self._event(now, h, PrefillEvent.RESET, "")

    def _peer_lost(self, now: float, event: m.TransferPeerLost) -> None:
        receiver = self.peers.receiver(event.peer)
        if receiver is None or receiver.wire in (Wire.RESETTING, Wire.IDLE):
            return
        for session in self.peers:
            if receiver in session.receivers:
                self._end(now, session, "transfer", f"data connection lost: {event.reason}")
        self._reset(now, receiver, event.reason)

    def _reset(self, now: float, receiver: Receiver, reason: str) -> None:
        """End all pushes to this receiver: no hand-off to it can complete."""
        if receiver.wire is Wire.RESETTING:
            return
        for h in list(self._open.values()):
            if receiver in h.session.receivers:
                self._event(now, h, PrefillEvent.FAIL, (reason, True))
        self.peers.reset(now, receiver, reason)

    def _posted(self, index: int) -> bool:
        return self._pushes.posted(self._now, index)

    def tick(self, now: float) -> None:
        self._now = now
        for session, reason in self.peers.tick(now):
            self._end(now, session, "transfer", reason)
        for h in list(self._open.values()):
            if h.overdue(now):
                self._event(now, h, PrefillEvent.FAIL, (EXPIRED, False))
            elif h.state is PrefillState.STOPPING:
                self._close_if_quiet(now, h, None)
        for receiver in self.peers.receivers():
            if receiver.wire is not Wire.RESETTING and (reason := self._due(now, receiver)):
                self._reset(now, receiver, reason)

    def _due(self, now: float, receiver: Receiver) -> str:
        """Why only a reset ends what this receiver has: a stuck push, or a connection that nobody wants; else ""."""
        limit = now - self.config.reset_after
        if receiver.idle_since is not None and receiver.idle_since <= limit and receiver.wire is not Wire.IDLE:
            return "its session is over"
        if receiver.reset_at > limit:
            return ""
        pushes = ((self._pushes[i].handoff, i) for i in receiver.pushes)
        stuck = any(h.state is PrefillState.STOPPING and h.stopped_at <= limit and self._posted(i) for h, i in pushes)
        return "stopped writes did not end" if stuck else ""

    def _by_id(self, now: float, id: HandoffId, event: PrefillEvent, detail: Any) -> None:
        self._now = now
        h = self._open.get(id)
        if h is None:
            self._handler(PrefillState.CLOSED, event)(now, None, detail)
        else:
            self._event(now, h, event, detail)

    def _event(self, now: float, h: Handoff, event: PrefillEvent, detail: Any) -> None:
        self._handler(h.state, event)(now, h, detail)

    # --- transitions ---

    def _started(self, now: float, h: Handoff, _: Any) -> None:
        h.state = PrefillState.RUNNING

    def _first_token(self, now: float, h: Handoff, message: m.FirstToken) -> None:
        if h.first_sent:
            self.counts.late(message)
            return
        h.first_sent = True
        self._unqueue(h)
        self.peers.send(now, h.session, message)
        self._land_if_done(now, h, None)

    def _computed(self, now: float, h: Handoff, digests: Sequence[int] | Mapping[int, Sequence[int]]) -> None:
        h.state, h.computed_at = PrefillState.COMPUTED, now
        self._unqueue(h)
        ranks = self._sending(h)
        if isinstance(digests, Mapping):
            h.digests = digests
        else:  # a sum over ranks: the first one speaks for all
            h.digests = {rank: digests if rank == ranks[0] else [0] * len(digests) for rank in ranks}
        self._land_if_done(now, h, None)

    def _writes_left(self, h: Handoff) -> bool:
        return bool(h.pushes or h.missing)

    def _land_if_done(self, now: float, h: Handoff, _: Any) -> None:
        if h.state is not PrefillState.COMPUTED or not h.first_sent or self._writes_left(h):
            return
        h.state = PrefillState.LANDED
        self.counts.outcome("landed")
        for rank in self._sending(h):
            digests = to_u64(h.digests.get(rank, ()))
            self.peers.send(now, h.session, m.Landed(h.id, rank, digests, h.nbytes.get(rank, 0)))
        self._notices.append(SourceFree(h.id))
        self.out.append(h.log("handoff_landed", blocks=len(h.dests), bytes=sum(h.nbytes.values()), **h.took(now)))

    def _cancelled(self, now: float, h: Handoff, _: Any) -> None:
        self._stop(now, h, "cancelled", "cancelled by the decode instance")

    def _lost(self, now: float, h: Handoff, reason: str) -> None:
        self._stop(now, h, "lost", f"decode instance lost: {reason}")

    def _fail(self, now: float, h: Handoff, detail: tuple[str, bool]) -> None:
        reason, retryable = detail
        if self.peers.get(h.session.id) is h.session:
            self.peers.send(now, h.session, m.Failed(h.id, reason, retryable))
        self._stop(now, h, "expired" if reason == EXPIRED else "failed", reason)

    def _broken(self, now: float, h: Handoff, reason: str) -> None:
        self._fail(now, h, (f"a push failed: {reason}", True))

    def _dropped(self, now: float, h: Handoff, reason: str) -> None:
        self._fail(now, h, (f"a push was dropped: {reason}", True))

    def _stop(self, now: float, h: Handoff, outcome: str, reason: str) -> None:
        """Compute and push nothing more; it is closed when the last push has ended."""
        self.counts.outcome(outcome)
        self.out.append(h.log(f"handoff_{outcome}", "info" if outcome == "cancelled" else "warning", reason=reason))
        self._unqueue(h)
        if h.state in COMPUTING:
            self._notices.append(Stop(h.id, reason))
        h.state, h.stopped_at = PrefillState.STOPPING, now
        for identity in sorted({self._pushes[i].receiver.info.identity for i in h.pushes}):
            self.out.append(Transfer(m.TransferCancel(identity, h.id.tag)))
        self._close_if_quiet(now, h, None)

    def _settle(self, now: float, h: Handoff, _: Any) -> None:
        """A reset ended a push: nothing is read here any more, but what was sent may still be on its way."""
        h.quiet_at = now + self.config.reset_linger
        self._close_if_quiet(now, h, None)

    def _close_if_quiet(self, now: float, h: Handoff, _: Any) -> None:
        if h.pushes:
            return
        if not h.source_free:
            h.source_free = True
            self._notices.append(SourceFree(h.id))
        if now < h.quiet_at:
            return
        self._close(now, h, None)
        session = self.peers.of_owner(h.session.owner)
        if session is not None:
            self.peers.send(now, session, m.Cancelled(h.id))

    def _close(self, now: float, h: Handoff, _: Any) -> None:
        h.state = PrefillState.CLOSED
        del self._open[h.id]
        self._closed.remember(h.id)

    # --- closed ids ---

    def _prefill_closed(self, now: float, h: None, detail: tuple[Session, m.Prefill]) -> None:
        """A duplicate is refused again; one that was cancelled before it came, or is over, does nothing."""
        session, message = detail
        self.counts.late(message)
        answer = self._closed.answer(message.id)
        if answer is not None:
            self.peers.send(now, session, answer)

    def _cancel_closed(self, now: float, h: Handoff | None, detail: tuple[Session, m.Cancel]) -> None:
        """Answered, and remembered: a Prefill that comes after its Cancel must not start."""
        session, message = detail
        if h is not None:
            self._close(now, h, None)
        elif self._closed.answer(message.id) is None:
            self._closed.remember(message.id)
        self.peers.send(now, session, m.Cancelled(message.id))

    def _stale(self, now: float, h: Handoff | None, detail: Any) -> None:
        what = detail[1] if isinstance(detail, tuple) else detail
        self.counts.late(what if isinstance(what, m.Message) else "report")

    def _ignore(self, now: float, h: Handoff | None, detail: Any) -> None:
        pass

    # --- helpers ---

    def _of(self, session: Session) -> list[Handoff]:
        return [h for h in self._open.values() if h.session is session]

    def _sending(self, h: Handoff) -> list[int]:
        return sorted({rank for receiver in h.session.receivers for rank in receiver.sources})

    def _unqueue(self, h: Handoff) -> None:
        if h.queued:
            h.queued = False
            h.session.queued -= h.tokens

    def audit(self) -> dict[str, list[HandoffId]]:
        """Open hand-offs by state. Raises AssertionError when pushes and hand-offs disagree."""
        return audit_handoffs(self._open.values(), self._pushes, self.peers)
