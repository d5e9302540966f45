"""The decode instances that a prefill instance serves: sessions, and the data connections behind them.

A `Receiver` is the data connection to one rank of one decode incarnation. It outlives its session: writes that are in
flight when a session ends go on, and only their own reports or a reset end them.

    CONNECTING ──every local rank connected──► CONNECTED ──reset──► RESETTING ──► CONNECTING (still wanted) or gone
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from pd import messages as m
from pd.scheduler.actions import Action, CloseSession, Log, RefusePeer, SendPeer, Transfer, WelcomePeer
from pd.scheduler.handoff_base import HandoffConfig, LocalIdentity, first_counter, source_ranks
from pd.types import HandoffId, InstanceState, Load


class Wire(enum.Enum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RESETTING = "resetting"
    IDLE = "idle"  # reset; kept only while writes of a running step may still be handed to it


@dataclass(eq=False)
class Receiver:
    """`awaited`: local ranks that have not answered the command under way. `covered`: pushes that the reset ends."""

    info: m.RankInfo
    instance: str
    incarnation: int
    sources: tuple[int, ...]
    wire: Wire = Wire.IDLE
    awaited: set[int] = field(default_factory=set)
    covered: frozenset[int] = frozenset()
    pushes: set[int] = field(default_factory=set)  # indices of pushes that have not ended
    idle_since: float | None = None  # when the last session that wanted it ended
    reset_at: float = 0.0


@dataclass(eq=False)
class Session:
    """One decode instance's session, from its Hello on. It is `up` when it has been welcomed."""

    id: int
    conn: int
    hello: m.Hello
    opened_at: float
    receivers: list[Receiver]
    up: bool = False
    heard_at: float = 0.0
    sent_at: float = 0.0
    queued: int = 0  # tokens accepted from it and not yet computed
    stale: bool = False  # its view of our status is out of date
    leaving: bool = False  # it said Goodbye
    rooms: bool = False  # it has spoken of a room

    @property
    def owner(self) -> tuple[str, int]:
        return self.hello.instance, self.hello.incarnation

    @property
    def interval(self) -> float:
        return self.hello.heartbeat_ms / 1000


class PrefillPeers:
    """Sessions and receivers. What their ends mean for hand-offs, its owner decides (`PrefillHandoffs`)."""

    def __init__(
        self, out: list[Action], identity: LocalIdentity, config: HandoffConfig, posted: Callable[[int], bool]
    ) -> None:
        """`posted(index)`: this push is known to be with the runner, so that a reset from now on ends it."""
        self.out, self.identity, self.config, self._posted = out, identity, config, posted
        self.state, self.load, self.credit = InstanceState.READY, Load(), 0
        self._sessions: dict[int, Session] = {}
        self._by_instance: dict[str, Session] = {}
        self._receivers: dict[str, Receiver] = {}
        # A decode instance tells its peers' sessions apart by number: those of two prefill instances must differ.
        self._next_session = first_counter(f"{identity.instance}/{identity.incarnation}")

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def get(self, session: int) -> Session | None:
        return self._sessions.get(session)

    def of_owner(self, owner: tuple[str, int]) -> Session | None:
        """The welcomed session of a decode incarnation."""
        session = self._by_instance.get(owner[0])
        return session if session is not None and session.up and session.owner == owner else None

    def of_instance(self, instance: str) -> Session | None:
        return self._by_instance.get(instance)

    def receiver(self, identity: str) -> Receiver | None:
        return self._receivers.get(identity)

    def receivers(self) -> Iterable[Receiver]:
        return list(self._receivers.values())

    def send(self, now: float, session: Session, message: m.PeerMessage) -> None:
        session.sent_at = now
        self.out.append(SendPeer(session.id, message))

    # --- opening ---

    def misfit(self, hello: m.Hello) -> tuple[str, str] | None:
        """(field, problem) when the two instances do not fit."""
        me = self.identity
        for name, theirs, ours in (
            ("protocol", hello.protocol, m.PROTOCOL_VERSION),
            ("fingerprint", hello.fingerprint, me.fingerprint),
            ("block_tokens", hello.block_tokens, me.block_tokens),
            ("layout", hello.layout, me.layout),
            ("digest", hello.digest, me.digest),
            ("transfer", hello.transfer, me.transfer),
            ("lanes", hello.lanes, me.lanes),
            ("groups", _shapes(hello.groups), _shapes(me.groups)),
            ("kv_cache_dtype", [group.dtype for group in hello.groups], [group.dtype for group in me.groups]),
            ("kv_scales", [group.scales for group in hello.groups], [group.scales for group in me.groups]),
        ):
            if theirs != ours:
                return name, f"decode has {theirs!r}, prefill has {ours!r}"
        if not hello.instance:
            return "instance", "empty"
        if hello.heartbeat_ms <= 0:
            return "heartbeat_ms", f"{hello.heartbeat_ms} is not positive"
        if not hello.ranks or len({r.identity for r in hello.ranks}) != len(hello.ranks):
            return "ranks", "none, or two of the same identity"
        for rank in hello.ranks:
            if not source_ranks(me.ranks, rank):
                return "ranks", f"rank {rank.rank} holds layers {rank.layers} and kv heads {rank.kv_heads}: no source"
            owner = self._receivers.get(rank.identity)
            if owner is not None and owner.instance != hello.instance:
                return "ranks", f"identity {rank.identity} belongs to instance {owner.instance}"
        return None

    def refuse(self, conn: int, field: str, problem: str) -> None:
        self.out.append(RefusePeer(conn, m.Unwelcome(field, problem)))
        self.out.append(Log("decode_refused", (("field", field), ("problem", problem)), "warning"))

    def open(self, now: float, conn: int, hello: m.Hello) -> Session:
        """A new session, to be welcomed when its receivers are connected (`welcome_if_connected`)."""
        self._next_session += 1
        receivers = []
        for info in hello.ranks:
            receiver = self._receivers.get(info.identity)
            if receiver is None:
                sources = source_ranks(self.identity.ranks, info)
                assert sources
                receiver = Receiver(info, hello.instance, hello.incarnation, sources)
                self._receivers[info.identity] = receiver
            receiver.idle_since = None
            changed = receiver.info.descriptor != info.descriptor
            receiver.info = info
            if receiver.wire is Wire.IDLE:
                self._connect(receiver)
            elif changed and receiver.wire is not Wire.RESETTING:
                self.reset(now, receiver, "its descriptor changed")
            receivers.append(receiver)
        session = Session(self._next_session, conn, hello, now, receivers, heard_at=now)
        self._sessions[session.id] = session
        self._by_instance[hello.instance] = session
        return session

    def ready(self, session: Session) -> bool:
        return all(r.wire is Wire.CONNECTED for r in session.receivers)

    def welcome(self, now: float, session: Session, writing: list[HandoffId]) -> None:
        me = self.identity
        session.up, session.heard_at, session.sent_at = True, now, now
        welcome = m.Welcome(
            session=session.id,
            endpoint="",
            instance=me.instance,
            incarnation=me.incarnation,
            ranks=list(me.ranks),
            state=self.state,
            credit_tokens=self.credit + session.queued,
            writing=writing,
            http=me.http,
        )
        self.out.append(WelcomePeer(session.conn, welcome))
        self.out.append(Log("decode_up", (("peer", session.hello.instance), ("session", session.id))))

    # --- ends ---

    def forget(self, now: float, session: Session, reason: str) -> None:
        """The session is over; its receivers stay until their writes have ended."""
        del self._sessions[session.id]
        if self._by_instance.get(session.hello.instance) is session:
            del self._by_instance[session.hello.instance]
        wanted = {id(r) for s in self._sessions.values() for r in s.receivers}
        for receiver in session.receivers:
            if id(receiver) not in wanted:
                receiver.idle_since = now
        fields = (("peer", session.hello.instance), ("session", session.id), ("reason", reason))
        orderly = session.leaving or self.state is InstanceState.DRAINING
        self.out.append(Log("decode_down", fields, "info" if orderly else "warning"))

    def dismiss(self, session: Session, field: str, reason: str) -> None:
        """Tell the other side that its session ends here: by an answer to its Hello, or by closing."""
        if session.up:
            self.out.append(CloseSession(session.id, reason))
        else:
            self.refuse(session.conn, field, reason)

    # --- receivers ---

    def _connect(self, receiver: Receiver) -> None:
        receiver.wire, receiver.awaited = Wire.CONNECTING, set(self.identity.local_ranks)
        info = receiver.info
        self.out.append(Transfer(m.TransferConnect(info.identity, info.descriptor, info.kv_heads)))

    def connected(self, event: m.TransferConnected) -> Receiver | None:
        receiver = self._receivers.get(event.peer)
        if receiver is None or receiver.wire is not Wire.CONNECTING:
            return None
        receiver.awaited.discard(event.rank)
        if receiver.awaited:
            return None
        receiver.wire = Wire.CONNECTED
        return receiver

    def reset(self, now: float, receiver: Receiver, reason: str) -> None:
        """End every push to this receiver that is with the runner: a push that still rides on a step is not."""
        receiver.wire, receiver.awaited = Wire.RESETTING, set(self.identity.local_ranks)
        receiver.covered = frozenset(index for index in receiver.pushes if self._posted(index))
        receiver.reset_at = now
        self.out.append(Transfer(m.TransferResetPeer(receiver.info.identity)))
        fields = (("peer", receiver.instance), ("pushes", len(receiver.covered)), ("reason", reason))
        self.out.append(Log("decode_reset", fields, "warning" if receiver.pushes else "info"))

    def was_reset(self, event: m.TransferReset) -> Receiver | None:
        """The receiver whose reset is complete on every local rank. `finish_reset` follows."""
        receiver = self._receivers.get(event.peer)
        if receiver is None or receiver.wire is not Wire.RESETTING:
            return None
        receiver.awaited.discard(event.rank)
        return None if receiver.awaited else receiver

    def finish_reset(self, receiver: Receiver) -> None:
        receiver.wire, receiver.covered = Wire.IDLE, frozenset()
        if receiver.idle_since is None:
            self._connect(receiver)
        else:
            self.drop_if_idle(receiver)

    def drop_if_idle(self, receiver: Receiver) -> None:
        if receiver.wire is Wire.IDLE and receiver.idle_since is not None and not receiver.pushes:
            del self._receivers[receiver.info.identity]

    # --- status ---

    def set_status(self, now: float, state: InstanceState, load: Load, credit: int) -> None:
        news = state is not self.state or credit != self.credit
        self.state, self.load, self.credit = state, load, credit
        if news:
            self.announce(now)

    def announce(self, now: float) -> None:
        """Tell every session the news, at a bounded rate."""
        for session in self:
            if session.up:
                session.stale = True
                self._beat_if_stale(now, session)

    def _beat_if_stale(self, now: float, session: Session) -> None:
        if session.stale and now - session.sent_at >= self.config.status_interval:
            self.beat(now, session)

    def beat(self, now: float, session: Session) -> None:
        session.stale = False
        self.send(now, session, m.Heartbeat(self.state, self.load, self.credit + session.queued))

    def tick(self, now: float) -> list[tuple[Session, str]]:
        """Sends due heartbeats; returns the sessions that are over, with the reason."""
        over: list[tuple[Session, str]] = []
        for session in self:
            if not session.up:
                if now - session.opened_at > self.config.connect_timeout:
                    over.append((session, "no data connection in time"))
            elif now - session.heard_at > self.config.longest_silence(session.interval):
                over.append((session, "heartbeats missed"))
            elif now - session.sent_at >= session.interval:
                self.beat(now, session)
            else:
                self._beat_if_stale(now, session)
        return over


def _shapes(groups: Sequence[m.KvGroup]) -> list[m.KvGroup]:
    """Without what has a name of its own among the fields that are compared."""
    return [msgspec.structs.replace(group, dtype="", scales="") for group in groups]
