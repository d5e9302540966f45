"""The control plane's sockets: dialling, Hello, and one monitored socket pair per session.

The listening socket answers only `Hello`. Every session has a PAIR socket of its own; every message on it carries
(session, sequence). A gap, a lost connection or a full pipe ends the session, once, as `SessionDown`; nothing
is resent.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from pd import messages as m
from pd.address import url_of
from pd.config import ControlConfig
from pd.errors import ChannelClosed, ChannelFull, ProtocolError
from pd.ipc.channel import Channel, Router
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkEventKind, LinkOptions, Monitor, Sockets
from pd.scheduler import events as ev

#: How long a decode instance may take from Welcome to its connection, seconds.
ATTACH_TIMEOUT = 10.0

WILDCARDS = ("0.0.0.0", "*", "::")

_OPENING: Codec[m.Opening] = Codec(m.Opening)
_ENVELOPE: Codec[m.Envelope] = Codec(m.Envelope)
_MESSAGE: Codec[m.PeerMessage] = Codec(m.PeerMessage)

Emit = Callable[[ev.Event], None]
#: Starts a named coroutine that the process owns.
Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """("host", port) of "tcp://host:port"."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def is_local(host: str) -> bool:
    """Whether `host` is an address of this machine: a socket can be bound to it."""
    with suppress(OSError):
        for family, kind, proto, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, proto) as probe:
                probe.bind(address)
                return True
    return False


def dial_addresses(endpoint: str) -> list[str]:
    """Where to dial, in order. A wildcard is dialled as loopback, and so is an address of this host that refuses:

    control planes listen on loopback only, unless they have a secret.
    """
    host, port = split_endpoint(endpoint)
    loopback = url_of("tcp", "127.0.0.1", port)
    if host in (*WILDCARDS, "localhost"):
        return [loopback]
    return [endpoint, loopback] if is_local(host) and endpoint != loopback else [endpoint]


@dataclass
class _Session:
    """One session's socket and counters; `number` is what the peer's envelopes must carry."""

    number: int
    channel: Channel[m.Envelope, m.Envelope]
    task: asyncio.Task[None] | None = None
    sent: int = 0
    received: int = 0


class Links:
    """All sessions of one scheduler. Events go to `emit`; sends never block and never raise."""

    def __init__(self, sockets: Sockets, emit: Emit, spawn: Spawn, control: ControlConfig, host: str) -> None:
        self.sockets, self.emit, self.spawn, self.host = sockets, emit, spawn, host
        self.options = LinkOptions(heartbeat=control.link_heartbeat, reconnect=False, linger=0.5)
        self._clock = time.monotonic
        self._sessions: dict[int, _Session] = {}
        self._conns: dict[int, bytes] = {}
        self._next_conn = 0
        self._hello: Router[m.Opening, m.Opening] | None = None

    # --- prefill side ---

    def listen(self, port: int) -> str:
        """Bind the listening socket; returns its endpoint. Raises zmq.ZMQError when the port is taken."""
        options = LinkOptions(heartbeat=self.options.heartbeat, high_water=1024, max_message=16 << 20)
        link = self.sockets.listen(zmq.ROUTER, url_of("tcp", self.host, port), options)
        self._hello = Router(link, _OPENING, _OPENING, "hello")
        self.spawn(self._serve_hello(self._hello), "hello")
        return link.endpoint

    async def _serve_hello(self, router: Router[m.Opening, m.Opening]) -> None:
        while True:
            try:
                identity, message = await router.recv()
            except ProtocolError:
                continue  # a stranger; the ZMTP layer bounds what it costs
            except ChannelClosed:
                return
            if isinstance(message, m.Hello):
                self._next_conn += 1
                self._conns[self._next_conn] = identity
                if len(self._conns) > 4096:  # strangers that were never answered
                    self._conns.pop(next(iter(self._conns)))
                self.emit(ev.HelloReceived(self._clock(), self._next_conn, message))

    def welcome(self, conn: int, welcome: m.Welcome) -> None:
        link = self.sockets.listen(zmq.PAIR, url_of("tcp", self.host, 0), self.options, monitored=True)
        session = self._add(welcome.session, Channel(link, _ENVELOPE, _ENVELOPE, f"session {welcome.session}"))
        welcome.endpoint = link.endpoint
        self._answer(conn, welcome)
        session.task = self.spawn(self._run(session, ATTACH_TIMEOUT), session.channel.name)

    def refuse(self, conn: int, unwelcome: m.Unwelcome) -> None:
        self._answer(conn, unwelcome)

    def _answer(self, conn: int, message: m.Opening) -> None:
        identity = self._conns.pop(conn, None)
        if identity is not None and self._hello is not None:
            with suppress(ChannelClosed, ChannelFull):  # it is gone: it will ask again
                self._hello.send_nowait(identity, message)

    # --- decode side ---

    def open(self, endpoint: str, hello: m.Hello, timeout: float) -> None:
        self.spawn(self._open(endpoint, hello, timeout), f"dial {endpoint}")

    async def _open(self, endpoint: str, hello: m.Hello, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                event = await self._introduce(endpoint, hello)
        except TimeoutError:
            event = ev.SessionRefused(self._clock(), endpoint, f"no answer within {timeout:g} s")
        except (ProtocolError, ChannelClosed, ChannelFull, zmq.ZMQError, ValueError, OSError) as error:
            event = ev.SessionRefused(self._clock(), endpoint, str(error))
        self.emit(event)

    async def _introduce(self, endpoint: str, hello: m.Hello) -> ev.SessionUp | ev.SessionRefused:
        lost = ""
        for address in dial_addresses(endpoint):
            reply = await self._say_hello(address, hello)
            if not isinstance(reply, str):
                break
            lost = lost or reply
        else:
            return ev.SessionRefused(self._clock(), endpoint, lost)
        if isinstance(reply, m.Unwelcome):
            permanent = reply.field != "state"
            return ev.SessionRefused(self._clock(), endpoint, f"{reply.field}: {reply.problem}", permanent)
        if not isinstance(reply, m.Welcome):
            return ev.SessionRefused(self._clock(), endpoint, "answered a Hello with a Hello")
        return await self._attach(endpoint, address, reply)

    async def _say_hello(self, address: str, hello: m.Hello) -> m.Opening | str:
        """The answer, or why there is no connection."""
        link = self.sockets.dial(zmq.DEALER, address, self.options, monitored=True)
        channel: Channel[m.Opening, m.Opening] = Channel(link, _OPENING, _OPENING, f"hello to {address}")
        assert link.monitor is not None
        try:
            channel.send_nowait(hello)
            answer = asyncio.ensure_future(channel.recv())
            lost = asyncio.ensure_future(_lost(link.monitor))
            try:
                await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
                return answer.result() if answer.done() else lost.result()
            finally:
                answer.cancel()
                lost.cancel()
        finally:
            channel.close()

    async def _attach(self, endpoint: str, address: str, welcome: m.Welcome) -> ev.SessionUp | ev.SessionRefused:
        """Connect to the session's own socket; only then is the session up."""
        host, port = split_endpoint(welcome.endpoint)
        if host in WILDCARDS:
            host = split_endpoint(address)[0]
        link = self.sockets.dial(zmq.PAIR, url_of("tcp", host, port), self.options, monitored=True)
        assert link.monitor is not None
        try:
            event = await link.monitor.next()
        except BaseException:
            link.close()
            raise
        if event.kind is not LinkEventKind.CONNECTED:
            link.close()
            return ev.SessionRefused(self._clock(), endpoint, f"session socket: {event.kind.value}")
        session = self._add(welcome.session, Channel(link, _ENVELOPE, _ENVELOPE, f"session with {endpoint}"))
        session.task = self.spawn(self._run(session, None), session.channel.name)
        return ev.SessionUp(self._clock(), endpoint, welcome)

    # --- both ---

    def _add(self, number: int, channel: Channel[m.Envelope, m.Envelope]) -> _Session:
        session = self._sessions[number] = _Session(number, channel)
        return session

    def send(self, number: int, message: m.PeerMessage) -> None:
        session = self._sessions.get(number)
        if session is None:
            return  # it ended in the same breath; SessionDown is on its way
        try:
            session.channel.send_nowait(m.Envelope(number, session.sent, _MESSAGE.encode(message)))
            session.sent += 1
        except (ChannelFull, ChannelClosed) as error:
            self._down(session, f"cannot send: {error}")

    def close(self, number: int) -> None:
        """The machine has forgotten the session: no SessionDown follows. What was sent before still goes out."""
        session = self._sessions.pop(number, None)
        if session is not None:
            self._stop(session)

    def close_all(self) -> None:
        for number in list(self._sessions):
            self.close(number)
        if self._hello is not None:
            self._hello.close()

    async def _run(self, session: _Session, attach: float | None) -> None:
        """Receive until the connection ends or the peer breaks the rules."""
        reader = asyncio.ensure_future(self._receive(session))
        watcher = asyncio.ensure_future(self._watch(session, attach))
        try:
            done, _ = await asyncio.wait((reader, watcher), return_when=asyncio.FIRST_COMPLETED)
            reason = next(iter(done)).result()
        finally:
            reader.cancel()
            watcher.cancel()
        self._down(session, reason)

    async def _receive(self, session: _Session) -> str:
        while True:
            try:
                envelope = await session.channel.recv()
                if envelope.session != session.number or envelope.seq != session.received:
                    return (
                        f"gap: ({envelope.session}, {envelope.seq}) instead of ({session.number}, {session.received})"
                    )
                message = _MESSAGE.decode(envelope.body)
            except ChannelClosed:
                return "closed"
            except ProtocolError as error:
                return str(error)
            session.received += 1
            self.emit(ev.PeerSaid(self._clock(), session.number, message))

    async def _watch(self, session: _Session, attach: float | None) -> str:
        """The end of the connection, whichever way it comes; without a connection within `attach` s, that."""
        monitor = session.channel.link.monitor
        assert monitor is not None
        try:
            if attach is not None:
                async with asyncio.timeout(attach):
                    while (await monitor.next()).kind is not LinkEventKind.CONNECTED:
                        pass
            return await _lost(monitor)
        except TimeoutError:
            return f"the decode instance did not attach within {attach:g} s"
        except ChannelClosed:
            return "closed"

    def _down(self, session: _Session, reason: str) -> None:
        if self._sessions.pop(session.number, None) is not None:
            self._stop(session)
            self.emit(ev.SessionDown(self._clock(), session.number, reason))

    def _stop(self, session: _Session) -> None:
        session.channel.close()
        if session.task is not None and session.task is not asyncio.current_task():
            session.task.cancel()


async def _lost(monitor: Monitor) -> str:
    """Why the connection that this socket has, or waits for, is gone."""
    while True:
        kind = (await monitor.next()).kind
        if kind is LinkEventKind.DISCONNECTED:
            return "the connection was lost"
        if kind is LinkEventKind.UNREACHABLE:
            return "the connection was refused"
        # CONNECTED is good news; HANDSHAKE_FAILED may be a stranger at the door.
