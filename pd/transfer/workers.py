"""Threads of the transfer core: each runs tasks in order and drives some push queues in between."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence

from pd.transfer.cadence import Cadence
from pd.transfer.queues import PushQueue

#: Between polls of a transfer under way: from the first to the last, growing while nothing moves.
POLL_FIRST, POLL_LAST = 50e-6, 1e-3

Task = Callable[[], None]


class Worker:
    """One thread. It sleeps without a timeout while nothing is under way and there is no backend to drive.

    `cadence`: drives the backend, where this worker has to. `begin` is called on the thread before anything else.
    """

    def __init__(
        self,
        name: str,
        failed: Callable[[BaseException], None],
        queues: Sequence[PushQueue] = (),
        cadence: Cadence | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.queues = queues
        self._failed, self._cadence, self._begin = failed, cadence, begin
        self._tasks: collections.deque[Task] = collections.deque()
        self._condition = threading.Condition()
        self._stopping = False
        self._pause = POLL_FIRST
        self.thread = threading.Thread(target=self._run, name=f"pd-transfer-{name}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, task: Task) -> None:
        """From any thread: run `task` on this one, after those submitted before."""
        with self._condition:
            self._tasks.append(task)
            self._condition.notify()

    def stop(self) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify()

    def join(self, timeout: float) -> bool:
        """Whether the thread has ended (or never began)."""
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(timeout)
        return not self.thread.is_alive()

    def _run(self) -> None:
        try:
            self._begin()
            while not self._stopping:
                self._turn()
        except BaseException as error:  # not swallowed: the owner ends the process
            self._failed(error)

    def _turn(self) -> None:
        moved = False
        while self._tasks and not self._stopping:
            self._tasks.popleft()()
            moved = True
        now = time.monotonic()
        for queue in self.queues:
            moved |= queue.step(now)
        timeout = None if self._cadence is None else self._cadence.turn(now)
        if moved:
            self._pause = POLL_FIRST
            return
        if any(queue.busy for queue in self.queues):
            timeout = self._pause if timeout is None else min(timeout, self._pause)
            self._pause = min(self._pause * 1.5, POLL_LAST)
        with self._condition:
            if not self._tasks and not self._stopping:
                self._condition.wait(timeout)
