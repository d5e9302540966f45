"""The prefill instances that a decode instance knows: dialling, credit, liveness, and shutting dead ones out.

A `Peer` is what stands behind an endpoint. A `Sender` is one incarnation of a prefill instance: it outlives its
session, because blocks granted to it come back only when it is known to be quiet.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pd import messages as m
from pd.scheduler.actions import Action, CloseSession, Log, OpenSession, SendPeer, Transfer
from pd.scheduler.handoff_base import Choice, ChoiceKind, HandoffConfig, LocalIdentity, sending_ranks
from pd.types import HandoffId, InstanceState, Load

NEVER = float("inf")


class Link(enum.Enum):
    DOWN = "down"
    DIALLING = "dialling"
    UP = "up"


@dataclass(eq=False)
class Sender:
    """One incarnation of a prefill instance. `ranks`: those that send to us, rank -> transfer identity.

    `shut`: expel was sent, which is final. `to_expel`: identity -> local ranks that have not confirmed; `expel_at` is
    the time of the next try, NEVER while an answer is awaited.
    """

    instance: str
    incarnation: int
    endpoint: str
    ranks: dict[int, str]
    http: str = ""
    session: int | None = None
    lost_at: float = 0.0
    superseded: bool = False
    shut: bool = False
    to_expel: dict[str, set[int]] = field(default_factory=dict)
    expel_at: dict[str, float] = field(default_factory=dict)
    grants: int = 0  # attempts that are not quiet


@dataclass(eq=False)
class Peer:
    """`asked`: prompt tokens asked and not yet computed; `credit` is how many of those the peer allows us."""

    endpoint: str
    link: Link = Link.DOWN
    sender: Sender | None = None
    state: InstanceState = InstanceState.STARTING
    load: Load = field(default_factory=Load)
    credit: int = 0
    asked: int = 0
    busy_until: float = 0.0
    heard_at: float = 0.0
    sent_at: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    reason: str = "not dialled yet"


class DecodePeers:
    """`outstanding(endpoint)` lists the hand-offs that a Hello to that endpoint must name."""

    def __init__(
        self,
        out: list[Action],
        identity: LocalIdentity,
        config: HandoffConfig,
        outstanding: Callable[[str], list[HandoffId]],
    ) -> None:
        self.out, self.identity, self.config, self._outstanding = out, identity, config, outstanding
        self.state, self.load = InstanceState.READY, Load()
        self._peers: dict[str, Peer] = {}  # several endpoints may lead to one peer
        self._sessions: dict[int, Peer] = {}
        self._senders: dict[tuple[str, int], Sender] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter({id(p): p for p in self._peers.values()}.values())

    def at(self, endpoint: str) -> Peer:
        peer = self._peers.get(endpoint)
        if peer is None:
            peer = self._peers[endpoint] = Peer(endpoint)
        return peer

    def of_session(self, session: int) -> Peer | None:
        return self._sessions.get(session)

    def senders(self) -> Iterable[Sender]:
        return self._senders.values()

    def send(self, now: float, peer: Peer, message: m.PeerMessage) -> None:
        assert peer.sender is not None and peer.sender.session is not None
        peer.sent_at = now
        self.out.append(SendPeer(peer.sender.session, message))

    # --- choosing ---

    def choose(self, now: float, candidates: Sequence[str], tokens: int) -> Choice:
        """The first candidate that can be asked; a candidate that is being dialled is waited for."""
        wait, reasons = "", []
        for endpoint in candidates:
            peer = self.at(endpoint)
            self.reach(now, endpoint)
            if peer.link is Link.DIALLING:
                return Choice(ChoiceKind.WAIT, endpoint, f"{endpoint}: dialling")
            if peer.link is Link.DOWN:
                reasons.append(f"{endpoint}: {peer.reason}")
            elif peer.state is InstanceState.DRAINING:
                reasons.append(f"{endpoint}: draining")
            elif peer.state is InstanceState.STARTING:
                wait = wait or f"{endpoint}: starting"
            elif now < peer.busy_until or (peer.asked and peer.asked + tokens > peer.credit):
                wait = wait or f"{endpoint}: no credit"
            else:
                return Choice(ChoiceKind.READY, endpoint)
        if wait:
            return Choice(ChoiceKind.WAIT, reason=wait)
        return Choice(ChoiceKind.NONE, reason="; ".join(reasons) or "no prefill instance was named")

    def reach(self, now: float, endpoint: str) -> bool:
        """Whether there is a session, or one is under way: the peer is dialled unless it has just been out of reach."""
        peer = self.at(endpoint)
        if peer.link is Link.DOWN and now >= peer.retry_at:
            self.dial(now, peer)
        return peer.link is not Link.DOWN

    def dial(self, now: float, peer: Peer) -> None:
        me = self.identity
        hello = m.Hello(
            protocol=m.PROTOCOL_VERSION,
            instance=me.instance,
            incarnation=me.incarnation,
            fingerprint=me.fingerprint,
            block_tokens=me.block_tokens,
            layout=me.layout,
            digest=me.digest,
            transfer=me.transfer,
            lanes=me.lanes,
            ranks=list(me.ranks),
            groups=list(me.groups),
            outstanding=self._outstanding(peer.endpoint),
            heartbeat_ms=max(1, int(self.config.heartbeat_interval * 1000)),
        )
        peer.link = Link.DIALLING
        self.out.append(OpenSession(peer.endpoint, hello, self.config.connect_timeout))

    # --- sessions ---

    def up(self, now: float, endpoint: str, welcome: m.Welcome) -> Sender | None:
        """The sender behind the new session, or None when the session is of no use (it has been closed)."""
        peer = self.at(endpoint)
        if peer.link is not Link.DIALLING or welcome.session in self._sessions:
            self.out.append(CloseSession(welcome.session, "not asked for"))
            return None
        ranks = sending_ranks(welcome.ranks, self.identity.ranks)
        known = self._senders.get((welcome.instance, welcome.incarnation))
        if ranks is None or (known is not None and (known.shut or known.superseded)):
            problem = "ranks: a kv head has no source" if ranks is None else "this incarnation was shut out: restart it"
            self.out.append(CloseSession(welcome.session, problem))
            self.refused(now, endpoint, problem, permanent=True)
            return None
        if known is None:
            sender = Sender(welcome.instance, welcome.incarnation, endpoint, ranks, welcome.http)
            self._senders[welcome.instance, welcome.incarnation] = sender
        else:
            sender = known
        for other in self._senders.values():
            if other.instance == sender.instance and other is not sender:
                other.superseded = True
        peer.link, peer.sender, peer.state, peer.credit = Link.UP, sender, welcome.state, welcome.credit_tokens
        peer.heard_at = peer.sent_at = now
        peer.asked, peer.failures, peer.busy_until, peer.reason = 0, 0, 0.0, ""
        sender.session, sender.endpoint = welcome.session, peer.endpoint
        self._sessions[welcome.session] = peer
        self.out.append(
            Log("prefill_up", (("endpoint", endpoint), ("peer", sender.instance), ("session", welcome.session)))
        )
        return sender

    def ended_by(self, welcome: m.Welcome) -> int | None:
        """The session that this Welcome ends: an instance has one session with us, under whatever endpoint."""
        for session, peer in self._sessions.items():
            if peer.sender is not None and peer.sender.instance == welcome.instance and session != welcome.session:
                return session
        return None

    def alias(self, endpoint: str, other: Peer) -> None:
        """One instance under two names is one peer: the sessions of two would end each other for ever."""
        mine = self.at(endpoint)
        if mine is not other:
            other.link = mine.link
            for name, peer in list(self._peers.items()):
                if peer is mine:
                    self._peers[name] = other

    def refused(self, now: float, endpoint: str, reason: str, permanent: bool) -> None:
        peer = self.at(endpoint)
        if peer.link is Link.UP:
            return
        config = self.config
        wait = min(config.reconnect_most, config.reconnect_first * 2 ** min(peer.failures, 16))
        peer.failures += 1
        peer.link, peer.reason = Link.DOWN, reason
        peer.retry_at = now + (config.mismatch_backoff if permanent else wait)
        self.out.append(Log("prefill_refused", (("endpoint", endpoint), ("reason", reason)), "warning"))

    def down(self, now: float, session: int, reason: str) -> Sender | None:
        peer = self._sessions.pop(session, None)
        if peer is None:
            return None
        sender = peer.sender
        assert sender is not None
        peer.link, peer.sender, peer.reason, peer.retry_at, peer.asked = Link.DOWN, None, reason, now, 0
        sender.session, sender.lost_at = None, now
        fields = (("endpoint", peer.endpoint), ("peer", sender.instance), ("reason", reason))
        orderly = InstanceState.DRAINING in (peer.state, self.state)
        self.out.append(Log("prefill_down", fields, "info" if orderly else "warning"))
        return sender

    def heartbeat(self, peer: Peer, message: m.Heartbeat) -> None:
        peer.state, peer.load, peer.credit = message.state, message.load, message.credit_tokens
        peer.busy_until = 0.0

    # --- time ---

    def silent(self, now: float) -> list[int]:
        """Sends due heartbeats; returns the sessions on which too many of the peer's were missed."""
        interval, lost = self.config.heartbeat_interval, []
        for session, peer in self._sessions.items():
            if now - peer.heard_at > self.config.longest_silence(interval):
                lost.append(session)
            elif now - peer.sent_at >= interval:
                self.send(now, peer, m.Heartbeat(self.state, self.load))
        return lost

    def pursue(self, now: float) -> None:
        """Blocks wait for lost senders: dial them, and shut out those that are dead or gone for too long."""
        for sender in list(self._senders.values()):
            if sender.session is not None:
                continue
            if not sender.grants:
                # A shut incarnation is remembered as long as it might come back: until a newer one was seen.
                if sender.superseded or not sender.shut:
                    del self._senders[sender.instance, sender.incarnation]
                continue
            if sender.shut or sender.superseded or now - sender.lost_at >= self.config.expel_after:
                self._expel(now, sender)
            peer = self.at(sender.endpoint)
            if peer.link is Link.DOWN and now >= peer.retry_at and not sender.shut:
                self.dial(now, peer)

    def _expel(self, now: float, sender: Sender) -> None:
        if not sender.shut:
            sender.shut = True
            fields = (("peer", sender.instance), ("incarnation", sender.incarnation), ("handoffs", sender.grants))
            self.out.append(Log("prefill_expelled", fields, "warning"))
            for identity in sender.ranks.values():
                sender.to_expel[identity] = set(self.identity.local_ranks)
                sender.expel_at[identity] = now
        for identity, at in sender.expel_at.items():
            if now >= at and sender.to_expel[identity]:
                sender.expel_at[identity] = NEVER
                self.out.append(Transfer(m.TransferExpel(identity)))

    def expelled(self, now: float, event: m.TransferExpelled) -> Sender | None:
        """The sender of which one more rank is proven quiet here, if the answer says so."""
        for sender in self._senders.values():
            waiting = sender.to_expel.get(event.sender)
            if waiting is None or event.rank not in waiting:
                continue
            if event.quiet:
                waiting.discard(event.rank)
                return None if waiting else sender
            sender.expel_at[event.sender] = now + self.config.expel_retry
        return None

    def is_expelled(self, sender: Sender, identity: str) -> bool:
        return sender.shut and not sender.to_expel[identity]
