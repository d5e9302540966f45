"""Typed messages over one ZMQ socket: on an event loop (`Channel`, `Router`) or in a thread (`SyncChannel`).

A ZMQ socket offers one descriptor that signals like an edge: it becomes readable when something about the socket has
changed, and *any* call on the socket, a send included, may consume that signal. Two rules follow, and they are all
that the asyncio variants add to a plain socket: a receiver tries to receive before it waits, and after a send somebody
who waits is woken if a message is there. `zmq.asyncio` follows the same rules through a future and two more loop
passes per message, which costs about as much again as the message itself.

Ownership: a channel owns its link's socket. It is used by one thread, and received from by one task.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

import zmq

from pd.errors import ChannelClosed, ChannelFull, ProtocolError
from pd.ipc.codec import Codec
from pd.ipc.zmq import Link

SendT = TypeVar("SendT")
RecvT = TypeVar("RecvT")

# After so many messages without a wait, let the loop's other work run: a fast sender must not starve it.
_FAIR_SHARE = 64


class _Receiver:
    """Waits on the event loop until a ZMQ socket has something to read."""

    def __init__(self, link: Link, name: str) -> None:
        self.link, self.name = link, name
        self.socket = link.socket
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._fd = self.socket.fileno()
        self._waiter: asyncio.Future[None] | None = None
        self._burst = 0
        self._loop.add_reader(self._fd, self._signalled)

    async def readable(self) -> None:
        """Returns when it is worth trying to receive; consumes nothing, so it can be cancelled at any time."""
        self._burst = 0
        if self._waiter is not None:
            raise RuntimeError(f"channel {self.name} is already being received from")
        self._waiter = self._loop.create_future()
        try:
            if _has_input(self.socket):
                return
            await self._waiter
        finally:
            self._waiter = None

    async def share(self) -> None:
        self._burst += 1
        if self._burst >= _FAIR_SHARE:
            self._burst = 0
            await asyncio.sleep(0)

    def check_waiter(self) -> None:
        """After anything that may have consumed the descriptor's signal."""
        if self._waiter is not None and not self._waiter.done() and _has_input(self.socket):
            self._waiter.set_result(None)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ChannelClosed(self.name))
        self.link.close()

    def _signalled(self) -> None:
        # Reading EVENTS consumes the signal also when nobody waits; a later receive looks for itself.
        if _has_input(self.socket) and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Channel(Generic[SendT, RecvT]):
    """Both directions of a PAIR or DEALER link.

    `name` is for errors. A listening PAIR or DEALER has no queue before its peer has connected: sending then raises
    ChannelFull. A dialling one queues up to its high-water mark from the start.
    """

    def __init__(self, link: Link, send: Codec[SendT], recv: Codec[RecvT], name: str = "") -> None:
        self.link = link
        self.name = name or link.endpoint
        self._socket = link.socket
        self._send_codec, self._recv_codec = send, recv
        self._receiver = _Receiver(link, self.name)

    async def recv(self) -> RecvT:
        """The next message. Cancelling loses none. Raises ProtocolError for one that does not decode (it is consumed),
        ChannelClosed after or during close.
        """
        await self._receiver.share()
        while True:
            frame = self._take()
            if frame is not None:
                return self._recv_codec.decode(frame)
            await self._receiver.readable()

    def recv_nowait(self) -> RecvT | None:
        """A message that is already here, or None."""
        frame = self._take()
        return None if frame is None else self._recv_codec.decode(frame)

    def send_nowait(self, message: SendT) -> None:
        """Queue a message. Never blocks, never drops: raises ChannelFull when the queue is full or has no peer yet,
        ChannelClosed after close.
        """
        _send(self._socket, self.name, (self._send_codec.encode(message),))
        self._receiver.check_waiter()

    @property
    def closed(self) -> bool:
        return self._receiver.closed

    def close(self) -> None:
        """Closes the socket and its monitor; a pending `recv` raises ChannelClosed."""
        self._receiver.close()

    def _take(self) -> bytes | None:
        return _take_single(self._socket, self.name)


class Router(Generic[SendT, RecvT]):
    """One ROUTER link to several peers, each known by its identity (bytes)."""

    def __init__(self, link: Link, send: Codec[SendT], recv: Codec[RecvT], name: str = "") -> None:
        self.link = link
        self.name = name or link.endpoint
        self._socket = link.socket
        self._send_codec, self._recv_codec = send, recv
        self._receiver = _Receiver(link, self.name)

    async def recv(self) -> tuple[bytes, RecvT]:
        """The next message and its sender. Raises as `Channel.recv`; after a ProtocolError the router stays usable."""
        await self._receiver.share()
        while True:
            received = self.recv_nowait()
            if received is not None:
                return received
            await self._receiver.readable()

    def recv_nowait(self) -> tuple[bytes, RecvT] | None:
        frames = _take(self._socket, self.name)
        if frames is None:
            return None
        if len(frames) != 2:
            raise ProtocolError("frames", f"{len(frames)} from {frames[0].hex()} on {self.name} instead of 2")
        try:
            return frames[0], self._recv_codec.decode(frames[1])
        except ProtocolError as error:
            raise ProtocolError(error.field, f"from {frames[0].hex()} on {self.name}: {error.problem}") from error

    def send_nowait(self, identity: bytes, message: SendT) -> None:
        """Raises ChannelFull when this peer's queue is full, ChannelClosed when no such peer is connected."""
        frames = (identity, self._send_codec.encode(message))
        _send(self._socket, f"{self.name} to {identity.hex()}", frames)
        self._receiver.check_waiter()

    @property
    def closed(self) -> bool:
        return self._receiver.closed

    def close(self) -> None:
        self._receiver.close()


class SyncChannel(Generic[SendT, RecvT]):
    """A PAIR or DEALER link for a thread without an event loop. Used by one thread only."""

    def __init__(self, link: Link, send: Codec[SendT], recv: Codec[RecvT], name: str = "") -> None:
        self.link = link
        self.name = name or link.endpoint
        self._socket = link.socket
        self._send_codec, self._recv_codec = send, recv
        self._rcvtimeo = -1

    def recv(self, timeout: float | None = None) -> RecvT | None:
        """The next message, or None after `timeout` seconds (0: do not wait; None: wait for ever)."""
        if self._socket.closed:
            raise ChannelClosed(self.name)
        if timeout == 0:
            frame = _take_single(self._socket, self.name)
        else:
            milliseconds = -1 if timeout is None else max(1, int(timeout * 1000))
            if milliseconds != self._rcvtimeo:  # blocking in recv is cheaper than a poll before it
                self._socket.rcvtimeo = self._rcvtimeo = milliseconds
            frame = _take_single(self._socket, self.name, 0)
        return None if frame is None else self._recv_codec.decode(frame)

    def send(self, message: SendT, timeout: float = 0.0) -> None:
        """Queue a message, waiting up to `timeout` seconds for room. Raises ChannelFull, ChannelClosed."""
        frames = (self._send_codec.encode(message),)
        try:
            _send(self._socket, self.name, frames)
        except ChannelFull:
            if timeout <= 0 or not self._socket.poll(int(timeout * 1000), zmq.POLLOUT):
                raise
            _send(self._socket, self.name, frames)

    @property
    def closed(self) -> bool:
        return self._socket.closed

    def close(self) -> None:
        self.link.close()


def _has_input(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


def _take(socket: zmq.Socket[bytes], name: str, flags: int = zmq.NOBLOCK) -> list[bytes] | None:
    """The frames of a message that is here (without NOBLOCK: that comes before the socket's timeout), or None."""
    try:
        return socket.recv_multipart(flags)
    except zmq.Again:
        return None
    except zmq.ZMQError as error:
        raise ChannelClosed(name, str(error)) from error


def _take_single(socket: zmq.Socket[bytes], name: str, flags: int = zmq.NOBLOCK) -> bytes | None:
    frames = _take(socket, name, flags)
    if frames is None:
        return None
    if len(frames) != 1:
        raise ProtocolError("frames", f"{len(frames)} on {name} instead of 1")
    return frames[0]


def _send(socket: zmq.Socket[bytes], name: str, frames: tuple[bytes, ...]) -> None:
    try:
        for frame in frames[:-1]:
            socket.send(frame, zmq.NOBLOCK | zmq.SNDMORE)
        socket.send(frames[-1], zmq.NOBLOCK)
    except zmq.Again:
        raise ChannelFull(name) from None
    except zmq.ZMQError as error:
        raise ChannelClosed(name, str(error)) from error
