"""The engine's line to the scheduler: commands in, events out, and a way for other threads to interrupt the wait."""

from __future__ import annotations

import os
from typing import Protocol

import zmq

from pd.ipc.channel import SyncChannel
from pd.messages import TransferCommand, TransferEvent


class CommandPort(Protocol):
    """Used by the engine's own thread, except `wake`."""

    def wait(self, timeout: float | None) -> None:
        """Until a command may be there, `wake` was called, or `timeout` seconds went by."""

    def recv(self) -> TransferCommand | None:
        """A command that is there, or None. Raises ChannelClosed, ProtocolError."""

    def send(self, event: TransferEvent) -> None: ...

    def wake(self) -> None:
        """From any thread: end the wait that is under way, or the next one."""

    def close(self) -> None: ...


class ChannelPort:
    """A `SyncChannel` and an eventfd. Owns both."""

    #: Longest wait for room in the scheduler's queue: it always reads, so a full queue means that it hangs.
    SEND_TIMEOUT = 10.0

    def __init__(self, channel: SyncChannel[TransferEvent, TransferCommand]) -> None:
        self._channel = channel
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(channel.link.socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def wait(self, timeout: float | None) -> None:
        ready = dict(self._poller.poll(None if timeout is None else int(timeout * 1000)))
        if self._wake in ready:
            os.eventfd_read(self._wake)

    def recv(self) -> TransferCommand | None:
        return self._channel.recv(0)

    def send(self, event: TransferEvent) -> None:
        self._channel.send(event, self.SEND_TIMEOUT)

    def wake(self) -> None:
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """When no other thread uses the port any more."""
        self._channel.close()
        os.close(self._wake)
