"""The hand-off, decode side: it asks, its blocks are written, and it alone says when they are anybody's again.

    ASKED ──FirstToken, Landed──► LANDING ──every sending rank landed──► VERIFYING ──► Ready (adopted by the request)
      │ Refused: same grant to the next peer, or returned                   │ digest differs: released
      └── failed, left, expired, lost ──► DRAINING ──► released, or QUARANTINED ──► released

Who owns a granted block: the hand-off, from `ask` until it is adopted (Ready) or released. It is released only when,
for every sending rank, something proved that no write can land any more: `Landed`, `Cancelled`, `Refused`, a revoke
or an expel that answered quiet on every local rank, or a Welcome of the same incarnation that does not list it. A
failed, left or expired attempt is taken from its request at once and drains here by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pd import messages as m
from pd.scheduler.actions import Action, CloseSession, Transfer
from pd.scheduler.blocks import BlockPool
from pd.scheduler.decode_peers import NEVER, DecodePeers, Peer, Sender
from pd.scheduler.decode_table import (
    DECODE_TABLE,
    PEER_EVENTS,
    Attempt,
    Counters,
    DecodeAudit,
    DecodeEvent,
    DecodeState,
    audit_attempts,
)
from pd.scheduler.first_token import strange_first_token
from pd.scheduler.handoff_base import (
    AskSpec,
    AttemptFailed,
    Choice,
    ChoiceKind,
    Counts,
    DecodeNotice,
    FirstTokenCame,
    GrantReturned,
    HandoffConfig,
    LocalIdentity,
    Ready,
    first_counter,
    to_i32,
)
from pd.types import HandoffId, InstanceState, Load


class DecodeHandoffs:
    """All hand-offs that this instance asked for."""

    def __init__(self, out: list[Action], pool: BlockPool, identity: LocalIdentity, config: HandoffConfig) -> None:
        self.out, self.pool, self.identity, self.config = out, pool, identity, config
        self.peers = DecodePeers(out, identity, config, self._outstanding_at)
        self.counts = Counts()
        self._handler = DECODE_TABLE.bind(self)
        self._open: dict[HandoffId, Attempt] = {}
        self._tags: dict[int, Attempt] = {}
        self._current: dict[int, Attempt] = {}  # request key -> its attempt
        self._counters = Counters(first_counter(f"{identity.instance}/{identity.incarnation}"))
        self._notices: list[DecodeNotice] = []

    # --- the scheduler's side ---

    def take_notices(self) -> list[DecodeNotice]:
        notices, self._notices = self._notices, []
        return notices

    @property
    def quiet(self) -> bool:
        """No hand-off is open: no block is incoming or quarantined."""
        return not self._open

    @property
    def outcomes(self) -> dict[str, int]:
        return self.counts.outcomes

    @property
    def landed_bytes(self) -> int:
        return self.counts.nbytes

    def set_status(self, now: float, state: InstanceState, load: Load, credit: int = 0) -> None:
        """What the next heartbeats say of this instance."""
        self.peers.state, self.peers.load = state, load

    def choose(self, now: float, candidates: Sequence[str], tokens: int) -> Choice:
        return self.peers.choose(now, candidates, tokens)

    def sender_of(self, id: HandoffId) -> Sender | None:
        """The prefill instance that an open attempt was asked of."""
        attempt = self._open.get(id)
        return attempt.sender if attempt is not None else None

    def ask(
        self, now: float, key: int, endpoint: str, spec: AskSpec, grant: list[int], counter: int | None = None
    ) -> HandoffId:
        """Ask a READY endpoint. The machine owns `grant` (incoming in the pool) from here on.

        Attempts of one key share a counter; `counter` overrides which.
        """
        return self._ask(now, key, endpoint, spec, grant, (), counter)

    def _ask(
        self,
        now: float,
        key: int,
        endpoint: str,
        spec: AskSpec,
        grant: list[int],
        tried: tuple[str, ...],
        counter: int | None = None,
    ) -> HandoffId:
        assert key not in self._current, f"request {key} has an attempt already"
        peer = self.peers.at(endpoint)
        sender = peer.sender
        assert sender is not None, f"{endpoint} has no session"
        id = HandoffId(self.identity.incarnation, *self._counters.next(key, counter))
        generations = [self.pool.generation[b] for b in grant]
        attempt = Attempt(id, key, spec, grant, generations, sender, endpoint, now, tried=tried)
        attempt.unquiet = {identity: set(self.identity.local_ranks) for identity in sender.ranks.values()}
        self._open[id] = self._tags[id.tag] = self._current[key] = attempt
        sender.grants += 1
        peer.asked += spec.tokens
        blocks_i32 = to_i32(grant)
        for identity in sender.ranks.values():
            self.out.append(Transfer(m.TransferGrant(identity, id.tag, blocks_i32)))
        self.peers.send(now, peer, spec.prefill(now, id, m.Dest(0, 0, blocks_i32, to_i32(generations))))
        self.out.append(attempt.log("handoff_asked", tokens=spec.tokens, emitted=spec.emitted, blocks=len(grant)))
        return id

    def cancel(self, now: float, key: int, reason: str) -> None:
        """The request left. Its attempt, if it has one, drains."""
        attempt = self._current.get(key)
        if attempt is not None:
            self.out.append(attempt.log("handoff_cancelled", reason=reason))
            self._event(now, attempt, DecodeEvent.LEFT, reason)

    def prolong(self, key: int, deadline: float) -> None:
        """A token came: the request's deadline, and with it that of its attempt, may be another one from now on."""
        attempt = self._current.get(key)
        if attempt is not None:
            attempt.deadline = deadline

    def tell(self, now: float, endpoint: str, message: m.PeerMessage) -> bool:
        """Send a message that belongs to no hand-off (Answered). False when there is no session."""
        peer = self.peers.at(endpoint)
        if peer.sender is None:
            return False
        self.peers.send(now, peer, message)
        return True

    def goodbye(self, reason: str) -> None:
        """The instance exits: end every session in an orderly way."""
        for peer in list(self.peers):
            if peer.sender is not None and peer.sender.session is not None:
                session = peer.sender.session
                self.peers.send(peer.heard_at, peer, m.Goodbye(reason))
                self._end(peer.heard_at, session, reason)

    # --- events ---

    def session_up(self, now: float, endpoint: str, welcome: m.Welcome) -> None:
        ended = self.peers.ended_by(welcome)
        if ended is not None:
            other = self.peers.of_session(ended)
            assert other is not None and other.sender is not None
            same = other.sender.incarnation == welcome.incarnation
            self._end(now, ended, "the instance opened another session")
            if same:
                self.peers.alias(endpoint, other)
        sender = self.peers.up(now, endpoint, welcome)
        if sender is None:
            return
        writing = set(welcome.writing)
        for attempt in self._of(sender):
            if attempt.id not in writing:
                self._event(now, attempt, DecodeEvent.OVER, None)
            elif attempt.state is DecodeState.QUARANTINED or attempt.state is DecodeState.DRAINING:
                attempt.cancel_at = now + self.config.expel_retry

    def session_refused(self, now: float, endpoint: str, reason: str, permanent: bool = False) -> None:
        self.peers.refused(now, endpoint, reason, permanent)

    def session_down(self, now: float, session: int, reason: str) -> None:
        sender = self.peers.down(now, session, reason)
        if sender is not None:
            for attempt in self._of(sender):
                attempt.counted = False
                self._event(now, attempt, DecodeEvent.LOST, reason)

    def _end(self, now: float, session: int, reason: str) -> None:
        self.out.append(CloseSession(session, reason))
        self.session_down(now, session, reason)

    def peer_said(self, now: float, session: int, message: m.PeerMessage) -> None:
        peer = self.peers.of_session(session)
        if peer is None:
            self.counts.late(message)  # said before the session ended
            return
        peer.heard_at = now
        event = PEER_EVENTS.get(type(message))
        if event is not None:
            self._about(now, peer, event, message)
        elif isinstance(message, m.Heartbeat):
            self.peers.heartbeat(peer, message)
        elif isinstance(message, m.Goodbye):
            self._end(now, session, message.reason)
        else:
            self.counts.late(message)

    def _about(self, now: float, peer: Peer, event: DecodeEvent, message: Any) -> None:
        attempt = self._find(message.id, peer)
        if attempt is not None:
            self._event(now, attempt, event, message)
        else:
            self._handler(DecodeState.CLOSED, event)(now, None, (peer, message))

    def _find(self, id: HandoffId, peer: Peer) -> Attempt | None:
        """The open attempt that a message of `peer` is about: only the incarnation that was asked may speak of it."""
        attempt = self._open.get(id)
        if attempt is None or attempt.sender is not peer.sender:
            return None
        return attempt

    def transfer_said(self, now: float, event: m.TransferEvent) -> None:
        if isinstance(event, m.TransferRevoked):
            self._tagged(now, event.tag, DecodeEvent.REVOKED, event)
        elif isinstance(event, m.TransferVerified):
            self._tagged(now, event.tag, DecodeEvent.VERIFIED, event)
        elif isinstance(event, m.TransferExpelled):
            sender = self.peers.expelled(now, event)
            if sender is not None:
                for attempt in self._of(sender):
                    self._event(now, attempt, DecodeEvent.EXPELLED, event)

    def _tagged(self, now: float, tag: int, event: DecodeEvent, message: Any) -> None:
        attempt = self._tags.get(tag)
        if attempt is not None:
            self._event(now, attempt, event, message)
        else:
            self._handler(DecodeState.CLOSED, event)(now, None, (None, message))

    def tick(self, now: float) -> None:
        for session in self.peers.silent(now):
            self._end(now, session, "heartbeats missed")
        for attempt in list(self._open.values()):
            if attempt.state in (DecodeState.DRAINING, DecodeState.QUARANTINED):
                self._remind(now, attempt)
            elif now >= attempt.deadline or now - attempt.asked_at >= self.config.waiting_timeout:
                self._event(now, attempt, DecodeEvent.EXPIRED, None)
        self.peers.pursue(now)

    def _event(self, now: float, attempt: Attempt, event: DecodeEvent, detail: Any) -> None:
        self._handler(attempt.state, event)(now, attempt, detail)

    # --- transitions: on the way to Ready ---

    def _first_token(self, now: float, a: Attempt, message: m.FirstToken) -> None:
        if a.first_token:
            self.counts.late(message)
            return
        problem = strange_first_token(message, a.spec, self.identity.vocab_size)
        if problem:
            self._detach(now, a, "failed", problem, True)
            return
        a.first_token, a.state = True, DecodeState.LANDING
        self._uncount(a)
        self._notices.append(FirstTokenCame(a.key, a.id, message))
        self._verify_if_landed(now, a)

    def _landed(self, now: float, a: Attempt, message: m.Landed) -> None:
        if message.rank not in a.sender.ranks or len(message.digests_u64) not in (0, 8 * len(a.blocks)):
            self._detach(now, a, "failed", "a Landed that does not fit what was asked", True)
            return
        a.state = DecodeState.LANDING
        a.rank_landed(message)
        self._verify_if_landed(now, a)

    def _verify_if_landed(self, now: float, a: Attempt) -> None:
        """All ranks have landed and the first token is known: fence every sender, compare digests."""
        if a.unquiet or not a.first_token:
            return
        a.state = DecodeState.VERIFYING
        self._acknowledge(now, a)
        for command in a.verify(self.identity.block_tokens, len(self.identity.ranks)):
            self.out.append(Transfer(command))

    def _verified(self, now: float, a: Attempt, event: m.TransferVerified) -> None:
        if not a.verified(event, len(self.identity.ranks)):
            return
        if [self.pool.generation[b] for b in a.blocks] != a.generations:
            a.problem = a.problem or "a block changed its owner"
        if a.problem:
            self._notices.append(AttemptFailed(a.key, a.id, a.endpoint, a.problem, True))
            self._close(a, "digest_mismatch" if a.problem == "digest mismatch" else "failed")
            self.pool.quiet(a.blocks)
            return
        self._close(a, "landed")
        self.counts.nbytes += a.nbytes
        self.pool.adopt(a.blocks)
        for block, digest in zip(a.blocks, a.block_digests(), strict=True):
            self.pool.digest[block] = digest
        self._notices.append(Ready(a.key, a.id, a.blocks, a.nbytes))

    # --- transitions: refused ---

    def _refused(self, now: float, a: Attempt, message: m.Refused) -> None:
        """Nothing was ever written: the grant goes to the next peer that can be asked, or back to the pool."""
        peer = self.peers.at(a.endpoint)
        if message.why == "busy":
            peer.busy_until = now + self.config.busy_backoff
        elif message.why == "draining":
            peer.state = InstanceState.DRAINING
        self._close(a, "refused")
        tried = (*a.tried, a.endpoint)
        rest = [c for c in a.spec.candidates if c not in tried]
        choice = self.choose(now, rest, a.spec.tokens)
        if choice.kind is ChoiceKind.READY and now < a.deadline:
            self._ask(now, a.key, choice.endpoint, a.spec, a.blocks, tried)
            return
        self.pool.quiet(a.blocks)
        reason = f"{message.why}: {message.detail}" if message.detail else message.why
        self._notices.append(GrantReturned(a.key, reason, a.blocks, tried))

    def _contradicted(self, now: float, a: Attempt, message: m.Refused) -> None:
        self._detach(now, a, "failed", "refused after it had begun", True)

    # --- transitions: leaving the request ---

    def _failed(self, now: float, a: Attempt, message: m.Failed) -> None:
        self._detach(now, a, "failed", message.reason, message.retryable, cancel=False)

    def _left(self, now: float, a: Attempt, reason: str) -> None:
        self._detach(now, a, "cancelled", None, False)

    def _expired(self, now: float, a: Attempt, _: None) -> None:
        dead = now >= a.deadline
        reason = "the request's deadline passed" if dead else f"no KV cache within {self.config.waiting_timeout:g} s"
        self._detach(now, a, "expired", reason, not dead)

    def _lost(self, now: float, a: Attempt, reason: str) -> None:
        self._detach(now, a, "lost", f"prefill instance lost: {reason}", True, cancel=False)
        self._lost_draining(now, a, reason)

    def _detach(
        self, now: float, a: Attempt, outcome: str, reason: str | None, retryable: bool, *, cancel: bool = True
    ) -> None:
        """Take the attempt from its request; `reason` None: the request knows. It drains from here on."""
        self._uncount(a)
        del self._current[a.key]
        self.counts.outcome(outcome)
        if reason is not None:
            self._notices.append(AttemptFailed(a.key, a.id, a.endpoint, reason, retryable))
        a.state = DecodeState.DRAINING
        a.revoke_at = now + self.config.revoke_grace
        a.cancel_at = now + self.config.expel_retry
        if cancel:
            self._cancel(now, a)
        self._release_if_quiet(a)

    def _given_up(self, now: float, a: Attempt, message: m.Cancelled) -> None:
        self._notices.append(AttemptFailed(a.key, a.id, a.endpoint, "cancelled by the prefill instance", True))
        self._close(a, "failed")
        self.pool.quiet(a.blocks)

    def _left_verifying(self, now: float, a: Attempt, reason: str) -> None:
        self._close(a, "cancelled")
        self.pool.quiet(a.blocks)

    def _expired_verifying(self, now: float, a: Attempt, _: None) -> None:
        retry = now < a.deadline
        self._notices.append(AttemptFailed(a.key, a.id, a.endpoint, "it was not verified in time", retry))
        self._close(a, "expired")
        self.pool.quiet(a.blocks)

    # --- transitions: draining ---

    def _landed_draining(self, now: float, a: Attempt, message: m.Landed) -> None:
        a.rank_landed(message)
        if not a.unquiet:
            self._acknowledge(now, a)
        self._release_if_quiet(a)

    def _quiet(self, now: float, a: Attempt, _: Any) -> None:
        a.unquiet.clear()
        self._release_if_quiet(a)

    def _rank_quiet(self, now: float, a: Attempt, event: m.TransferRevoked | m.TransferExpelled) -> None:
        """One local rank answered about one sender (revoke), or all did about a dead one (expel)."""
        identity = event.sender or next(iter(a.sender.ranks.values()))
        waiting = a.unquiet.get(identity, set())
        if isinstance(event, m.TransferExpelled):
            waiting.clear()
        elif event.quiet:
            waiting.discard(event.rank)
        if identity in a.unquiet and not waiting:
            del a.unquiet[identity]
            a.revoked.add(identity)
        if (
            isinstance(event, m.TransferRevoked)
            and not event.quiet
            and a.state is DecodeState.DRAINING
            and a.sender.session is None
        ):
            self._quarantine(a)
        self._release_if_quiet(a)

    def _lost_draining(self, now: float, a: Attempt, reason: str) -> None:
        """The sender cannot say any more when it is quiet: ask the data plane."""
        if a.state is DecodeState.CLOSED:
            return
        for identity in list(a.unquiet):
            if self.peers.is_expelled(a.sender, identity):
                del a.unquiet[identity]
        self._revoke(a)
        self._release_if_quiet(a)

    def _quarantine(self, a: Attempt) -> None:
        a.state = DecodeState.QUARANTINED
        self.out.append(a.log("handoff_quarantined", "warning", blocks=len(a.blocks)))
        self.pool.quarantine(a.blocks)

    def _release_if_quiet(self, a: Attempt) -> None:
        if not a.unquiet and a.state is not DecodeState.CLOSED:
            if a.state is DecodeState.QUARANTINED:
                self.out.append(a.log("handoff_released", blocks=len(a.blocks)))
            self._close(a, None)
            self.pool.quiet(a.blocks)

    def _remind(self, now: float, a: Attempt) -> None:
        if now >= a.revoke_at:
            self._revoke(a)
        if a.sender.session is not None and now >= a.cancel_at:
            a.cancel_at = now + self.config.expel_retry
            self._cancel(now, a)

    def _revoke(self, a: Attempt) -> None:
        a.revoke_at = NEVER
        for identity in a.unquiet:
            self.out.append(Transfer(m.TransferRevoke(identity, a.id.tag)))

    def _cancel(self, now: float, a: Attempt) -> None:
        if a.sender.session is not None:
            self.peers.send(now, self.peers.at(a.sender.endpoint), m.Cancel(a.id))

    # --- ends ---

    def _close(self, a: Attempt, outcome: str | None) -> None:
        """Forget the attempt and drop its grants at the runner. What becomes of its blocks the caller says."""
        self._uncount(a)
        if outcome is not None:
            self.counts.outcome(outcome)
        for identity in a.sender.ranks.values():
            if identity not in a.revoked:
                self.out.append(Transfer(m.TransferRevoke(identity, a.id.tag, True)))
        a.state = DecodeState.CLOSED
        a.sender.grants -= 1
        del self._open[a.id]
        del self._tags[a.id.tag]
        if self._current.get(a.key) is a:
            del self._current[a.key]

    def _uncount(self, a: Attempt) -> None:
        if a.counted:
            a.counted = False
            self.peers.at(a.endpoint).asked -= a.spec.tokens

    def _acknowledge(self, now: float, a: Attempt) -> None:
        if a.sender.session is not None:
            self.peers.send(now, self.peers.at(a.sender.endpoint), m.LandedAck(a.id))

    def _landed_again(self, now: float, a: Attempt | None, detail: Any) -> None:
        """A duplicate is acknowledged again, on the session that it came by."""
        if a is not None:
            self._acknowledge(now, a)
            self.counts.late(detail)
            return
        peer, message = detail
        self.counts.late(message)
        if message.id.incarnation == self.identity.incarnation and message.id not in self._open:
            self.peers.send(now, peer, m.LandedAck(message.id))

    def _stale(self, now: float, a: Attempt | None, detail: Any) -> None:
        self.counts.late(detail[1] if a is None else detail)

    def _ignore(self, now: float, a: Attempt | None, detail: Any) -> None:
        pass

    # --- introspection ---

    def _of(self, sender: Sender) -> list[Attempt]:
        return [a for a in self._open.values() if a.sender is sender]

    def _outstanding_at(self, endpoint: str) -> list[HandoffId]:
        peer = self.peers.at(endpoint)
        return [a.id for a in self._open.values() if a.unquiet and self.peers.at(a.sender.endpoint) is peer]

    def audit(self) -> DecodeAudit:
        """Open hand-offs by state and the blocks they hold. Raises AssertionError when the pool disagrees."""
        return audit_attempts(self._open.values(), self.pool)
