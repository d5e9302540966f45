"""The ZMQ sockets of a process: one context, bounded queues, heartbeats, encryption, connection events.

Everything that opens a ZMQ socket goes through `Sockets`, so that no socket lingers, queues without bound, misses
a frozen peer, or speaks TCP in the clear where a cluster secret is set.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from dataclasses import dataclass

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from pd.errors import ChannelClosed
from pd.ipc.keys import ClusterKeys, derive_keys

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"pd"


@dataclass(frozen=True)
class LinkOptions:
    """`high_water` bounds each direction's queue, in messages. `heartbeat` is the interval of ZMTP pings in seconds
    (0: none); a connection that is silent for `heartbeat_misses` of them is cut. `reconnect` False: a dialled
    connection that ends stays ended. `linger` is how long close may spend on messages not yet sent, in seconds.
    """

    high_water: int = 8192
    heartbeat: float = 0.5
    heartbeat_misses: int = 3
    reconnect: bool = True
    linger: float = 0.0
    handshake: float = 10.0  # a peer that connects and does not complete ZMTP's handshake is cut after this, seconds
    max_message: int = 256 << 20
    identity: bytes = b""  # of a DEALER, by which a ROUTER knows it; b"": chosen by the ROUTER


class LinkEventKind(enum.Enum):
    CONNECTED = "connected"  # the handshake is done: messages can flow
    DISCONNECTED = "disconnected"
    HANDSHAKE_FAILED = "handshake_failed"  # wrong key, wrong protocol
    UNREACHABLE = "unreachable"  # a dialled connection was refused or lost; tried again where `reconnect`


@dataclass(frozen=True)
class LinkEvent:
    kind: LinkEventKind
    endpoint: str


_EVENT_KINDS = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: LinkEventKind.CONNECTED,
    zmq.EVENT_DISCONNECTED: LinkEventKind.DISCONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: LinkEventKind.HANDSHAKE_FAILED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: LinkEventKind.HANDSHAKE_FAILED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: LinkEventKind.HANDSHAKE_FAILED,
    zmq.EVENT_CLOSED: LinkEventKind.UNREACHABLE,
}


class Monitor:
    """Connection events of one socket, in order. Made before the socket binds or connects, so that none is missed.

    One consumer: `async for event in monitor`, or `await monitor.next()`. Cancelling a wait loses no event.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._watched = socket
        mask = 0
        for code in _EVENT_KINDS:
            mask |= code
        self._socket: zmq.Socket[bytes] = socket.get_monitor_socket(mask)
        self._events: deque[LinkEvent] = deque()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._fd = self._socket.fileno()
        self._closed = False
        self._loop.add_reader(self._fd, self._drain)
        self._drain()

    async def next(self) -> LinkEvent:
        """Raises ChannelClosed once the monitor is closed and its events are consumed."""
        while not self._events:
            if self._closed:
                raise ChannelClosed("monitor")
            self._wake.clear()
            await self._wake.wait()
        return self._events.popleft()

    def __aiter__(self) -> Monitor:
        return self

    async def __anext__(self) -> LinkEvent:
        try:
            return await self.next()
        except ChannelClosed:
            raise StopAsyncIteration from None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        if not self._watched.closed:
            self._watched.disable_monitor()
        self._socket.close(0)
        self._wake.set()

    def _drain(self) -> None:
        # To EAGAIN: the descriptor signals new work only after everything before it was taken.
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            raw = parse_monitor_message(frames)
            kind = _EVENT_KINDS.get(zmq.Event(raw["event"]))
            if kind is not None:
                self._events.append(LinkEvent(kind, raw["endpoint"].decode()))
        if self._events:
            self._wake.set()


@dataclass
class Link:
    """One socket, the endpoint that its peers dial (or that it dialled), and its monitor if one was asked for."""

    socket: zmq.Socket[bytes]
    endpoint: str
    monitor: Monitor | None = None

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
        if not self.socket.closed:
            self.socket.close()


class Sockets:
    """A process's ZMQ context and the factory of its sockets. Make one per process and close it last.

    With a `secret` every TCP link is encrypted with CURVE and each end proves that it knows the secret. CURVE alone
    authenticates only the listening end; what keeps strangers out is the ZAP handler: it admits the one client key
    that is derived from the secret. The handler lives on the event loop, so listening on TCP with a secret needs a
    running one. `ipc://` links rely on file permissions: `ipc://*` is in a directory that only this user can enter.
    """

    def __init__(self, secret: str = "", *, io_threads: int = 1) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=io_threads)
        self.keys: ClusterKeys | None = derive_keys(secret) if secret else None
        self._authenticator: _Authenticator | None = None

    def listen(self, kind: int, endpoint: str, options: LinkOptions | None = None, *, monitored: bool = False) -> Link:
        """Bind. Port 0 (`tcp://127.0.0.1:0`) and `ipc://*` choose a free address; it is read back into the link."""
        options = options or LinkOptions()
        if endpoint.startswith("tcp://") and endpoint.endswith(":0"):
            endpoint = endpoint[:-1] + "*"
        socket = self._socket(kind, endpoint, options)
        link = Link(socket, endpoint, Monitor(socket) if monitored else None)
        try:
            if self.keys is not None and endpoint.startswith("tcp://"):
                if self._authenticator is None:
                    self._authenticator = _Authenticator(self.context, self.keys.client.public)
                socket.curve_server = True
                socket.curve_secretkey = self.keys.server.secret
                socket.curve_publickey = self.keys.server.public
                socket.zap_domain = _ZAP_DOMAIN
                socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a handler nobody gets in, rather than everybody
            socket.bind(endpoint)
            link.endpoint = socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        except BaseException:
            link.close()
            raise
        return link

    def dial(self, kind: int, endpoint: str, options: LinkOptions | None = None, *, monitored: bool = False) -> Link:
        """Connect. Returns at once; the connection is made in the background and shows in the monitor."""
        options = options or LinkOptions()
        socket = self._socket(kind, endpoint, options)
        link = Link(socket, endpoint, Monitor(socket) if monitored else None)
        try:
            if self.keys is not None and endpoint.startswith("tcp://"):
                socket.curve_serverkey = self.keys.server.public
                socket.curve_secretkey = self.keys.client.secret
                socket.curve_publickey = self.keys.client.public
            socket.connect(endpoint)
        except BaseException:
            link.close()
            raise
        return link

    def close(self) -> None:
        """Closes every socket that is still open, without waiting for unsent messages of theirs."""
        if self._authenticator is not None:
            self._authenticator.close()
        self.context.destroy(linger=0)

    def _socket(self, kind: int, endpoint: str, options: LinkOptions) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.ipv6 = endpoint.startswith("tcp://[")
        socket.linger = int(options.linger * 1000)
        socket.sndhwm = socket.rcvhwm = options.high_water
        socket.maxmsgsize = options.max_message
        socket.handshake_ivl = int(options.handshake * 1000)
        if options.heartbeat > 0:
            silence = int(options.heartbeat * options.heartbeat_misses * 1000)
            socket.heartbeat_ivl = max(1, int(options.heartbeat * 1000))
            socket.heartbeat_timeout = socket.heartbeat_ttl = max(1, silence)
        if not options.reconnect:
            socket.reconnect_ivl = -1
        if options.identity:
            socket.routing_id = options.identity
        if kind == zmq.ROUTER:
            socket.router_mandatory = True  # a vanished peer is an error, not a silent drop
            socket.router_handover = True  # a peer that comes back under its identity replaces its old connection
        return socket


class _Authenticator:
    """The ZAP handler (ZMQ RFC 27) of one context: admits clients with exactly one public key.

    libzmq asks on an inproc socket and goes on with other work until the answer comes, so a busy event loop delays
    handshakes and blocks nothing.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], client_public: bytes) -> None:
        self._admitted = z85.decode(client_public)
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP_ENDPOINT)
        self._loop = asyncio.get_running_loop()
        self._fd = self._socket.fileno()
        self._loop.add_reader(self._fd, self._serve)
        self._serve()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close(0)

    def _serve(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(frames), zmq.NOBLOCK)

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        """Frames: version, request id, domain, address, identity, mechanism, credentials (the client's key)."""
        admitted = (
            len(frames) == 7
            and frames[0] == b"1.0"
            and frames[2] == _ZAP_DOMAIN
            and frames[5] == b"CURVE"
            and frames[6] == self._admitted
        )
        request = frames[1] if len(frames) > 1 else b""
        if admitted:
            return [b"1.0", request, b"200", b"OK", b"pd", b""]
        return [b"1.0", request, b"400", b"not a member of this cluster", b"", b""]
