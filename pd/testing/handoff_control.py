"""The simulated world's control plane: Hellos that take their time, sessions that break, duplicates that come late.

A session has a queue per direction. When it breaks, each side gets some prefix of what was on its way and then hears of
the end, at its own time; until then it goes on sending into the void.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pd import messages as m
from pd.scheduler import actions as act
from pd.testing.handoff_data import Violation
from pd.testing.handoff_sides import DecodeHost, Host, PrefillHost

if TYPE_CHECKING:
    from pd.testing.handoff_world import World

_DOWN = object()  # in a session's queue: the other side's end


@dataclass(eq=False)
class Dial:
    """A Hello on its way, or waiting for its answer."""

    conn: int
    decode: DecodeHost
    endpoint: str
    hello: m.Hello
    expires: float
    arrived: bool = False
    over: bool = False  # answered, or given up by its decode instance


@dataclass(eq=False)
class Wire:
    """One session: a queue per direction. `up` waits in front of the decode side's queue as a Welcome."""

    id: int
    dial: Dial
    decode: DecodeHost
    prefill: PrefillHost
    to_decode: deque[Any] = field(default_factory=deque)
    to_prefill: deque[Any] = field(default_factory=deque)
    decode_open: bool = False
    prefill_open: bool = True
    stalled_until: float = 0.0
    echoes: list[tuple[bool, Any]] = field(default_factory=list)  # (to decode, message): duplicates still on their way


class ControlPlane:
    """Every dial and session of the world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sessions: dict[int, Wire] = {}
        self._dials: list[Dial] = []
        self._by_conn: dict[int, Dial] = {}

    def deliveries(self) -> Iterator[tuple[Callable[..., None], Any]]:
        """What may arrive now."""
        now = self.world.now
        for wire in self.sessions.values():
            thawed = max(wire.decode.frozen_until, wire.prefill.frozen_until)
            if wire.echoes and now >= thawed and self.world.chance(0.2):
                yield self.echo, wire
            if now >= wire.stalled_until:
                if wire.to_decode and now >= wire.decode.frozen_until:
                    yield self.to_decode, wire
                if wire.to_prefill and now >= wire.prefill.frozen_until:
                    yield self.to_prefill, wire
        for dial in self._dials:
            if not dial.arrived:
                yield self.hello, dial

    def expire(self) -> None:
        """Dials that were not answered in time. Their Hello may still arrive."""
        for dial in self._dials:
            if not dial.over and self.world.now >= dial.expires:
                self._answer_refused(dial, "no answer", False)
        self._dials = [d for d in self._dials if not (d.over and (d.arrived or self.world.chance(0.5)))]

    def host_died(self, host: Host) -> None:
        for wire in list(self.sessions.values()):
            if wire.decode is host or wire.prefill is host:
                self.sever(wire)
        for dial in self._dials:
            dial.over = dial.over or dial.decode is host

    def carry_out(self, host: Any, order: Any) -> None:
        if isinstance(order, act.SendPeer):
            self._send(host, order)
        elif isinstance(order, act.OpenSession):
            dial = Dial(len(self._by_conn) + 1, host, order.endpoint, order.hello, self.world.now + order.timeout)
            self._by_conn[dial.conn] = dial
            self._dials.append(dial)
        elif isinstance(order, act.CloseSession):
            self.world.note(f"{host.name} closes session {order.session & 0xFF}: {order.reason}")
            wire = self.sessions.get(order.session)
            if wire is not None:
                self.sever(wire)
                self._shut(wire, host)
        elif isinstance(order, act.WelcomePeer):
            dial = self._by_conn[order.conn]
            wire = Wire(order.welcome.session, dial, dial.decode, host)
            self.sessions[wire.id] = wire
            wire.to_decode.append(order.welcome)
        elif isinstance(order, act.RefusePeer):
            dial = self._by_conn[order.conn]
            self.world.note(f"{host.name} refuses {dial.decode.name}: {order.unwelcome.problem}")
            self._answer_refused(dial, order.unwelcome.field, True)
        else:
            raise Violation(f"an order that the hand-off does not give: {order}")

    def _send(self, host: Any, order: act.SendPeer) -> None:
        wire = self.sessions.get(order.session)
        if wire is None:
            raise Violation(f"{host.name} sends on session {order.session}, which never was")
        mine = wire.decode_open if host is wire.decode else wire.prefill_open
        if not mine:
            return  # it broke, and this side has not heard of it
        queue = wire.to_prefill if host is wire.decode else wire.to_decode
        if queue and queue[-1] is _DOWN:
            return
        queue.append(order.message)
        if self.world.faulty(0.04):
            wire.echoes.append((host is wire.prefill, order.message))

    def _shut(self, wire: Wire, host: Any) -> None:
        """This side hears nothing more of the session."""
        if host is wire.decode:
            wire.decode_open = False
            wire.to_decode.clear()
        else:
            wire.prefill_open = False
            wire.to_prefill.clear()
        if not (wire.to_decode or wire.to_prefill or wire.echoes):
            self.sessions.pop(wire.id, None)

    def sever(self, wire: Wire) -> None:
        """The connection breaks: each side gets some of what was on its way, then hears of the end."""
        for queue in (wire.to_decode, wire.to_prefill):
            if queue and queue[-1] is _DOWN:
                continue
            keep = self.world.random.randint(0, len(queue))
            while len(queue) > keep:
                queue.pop()
            queue.append(_DOWN)

    def _answer_refused(self, dial: Dial, reason: str, permanent: bool) -> None:
        if dial.over:
            return
        dial.over = True
        if dial.decode.alive:
            dial.decode.machine.session_refused(self.world.now, dial.endpoint, reason, permanent)
            dial.decode.flush()

    def hello(self, dial: Dial) -> None:
        """A Hello arrives; one that its sender gave up may arrive as well."""
        dial.arrived = True
        host = self.world.prefills[dial.endpoint.removeprefix("tcp://")]
        if not host.runs:
            if not host.alive:
                self._answer_refused(dial, "connection refused", False)
            return
        self.world.note(f"{host.name} gets Hello of {dial.decode.name}")
        host.machine.hello(self.world.now, dial.conn, dial.hello)
        host.flush()

    def to_decode(self, wire: Wire) -> None:
        host, item = wire.decode, wire.to_decode.popleft()
        if item is _DOWN:
            if wire.decode_open and host.alive:
                self.world.note(f"{host.name} hears that session {wire.id & 0xFF} is down")
                host.machine.session_down(self.world.now, wire.id, "closed")
                host.flush()
            elif not wire.dial.over:
                self._answer_refused(wire.dial, "closed before it was up", False)
            self._shut(wire, host)
        elif isinstance(item, m.Welcome):
            if wire.dial.over:
                self.sever(wire)
                self._shut(wire, host)
                return
            wire.dial.over = wire.decode_open = True
            self.world.note(
                f"{host.name}: session {wire.id & 0xFF} with {wire.prefill.name}.{wire.prefill.incarnation} is up"
            )
            host.machine.session_up(self.world.now, wire.dial.endpoint, item)
            host.flush()
        elif host.alive:
            self.world.note(f"{host.name} <- {wire.prefill.name}: {item}")
            host.machine.peer_said(self.world.now, wire.id, item)
            host.flush()

    def to_prefill(self, wire: Wire) -> None:
        host, item = wire.prefill, wire.to_prefill.popleft()
        if item is _DOWN:
            if wire.prefill_open and host.alive:
                self.world.note(f"{host.name} hears that session {wire.id & 0xFF} is down")
                host.machine.session_down(self.world.now, wire.id, "closed")
                host.flush()
            self._shut(wire, host)
        elif host.alive:
            self.world.note(f"{host.name} <- {wire.decode.name}: {item}")
            host.machine.peer_said(self.world.now, wire.id, item)
            host.flush()

    def echo(self, wire: Wire) -> None:
        """A duplicate arrives, perhaps after the end of its session."""
        to_decode, message = wire.echoes.pop()
        host: Any = wire.decode if to_decode else wire.prefill
        if host.alive:
            self.world.note(f"{host.name} <- again: {message}")
            host.machine.peer_said(self.world.now, wire.id, message)
            host.flush()
