"""Tells the runner's main loop that steps have ended on the device."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    def synchronize(self) -> None:
        """Returns when the device has come to it; lets other threads run meanwhile."""


class StepEnds:
    """`fd` is readable while `take` would return True: once for each step that has ended, in their order.

    A thread waits for the device, so that the main loop can wait for it and for its sockets at once. `failed` is told,
    on that thread, when the device fails; nothing ends after that.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._failed = failed
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def launched(self, event: Event | None) -> None:
        """A step's last event, or None for a step that has ended."""
        if event is None:
            os.eventfd_write(self.fd, 1)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name="step ends", daemon=True)
            self._thread.start()
        self._events.put(event)

    def take(self) -> bool:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """The thread ends with the step that it waits for, if there is one."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join(timeout=10)
            if self._thread.is_alive():  # the device hangs; the process ends all the same, and the fd with it
                return
        os.close(self.fd)

    def _wait(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                event.synchronize()
            except RuntimeError as error:
                self._failed(error)
                return
            os.eventfd_write(self.fd, 1)
