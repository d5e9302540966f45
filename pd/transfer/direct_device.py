"""Device memory of `direct` between processes of one host: the receiver maps the sender's memory and pulls.

As over shared memory the sender shares a page with its epoch word beside it, and the receiver looks at that before and
after each pull. A frozen sender is no obstacle; a killed one's memory lives on until the receiver has unmapped it.

Each connection has two threads: its reading thread checks posts and prepares their pulls, this module's runs them. So
the device need not wait for what the host has to do between two posts.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pd.abc import Pull, SharedDeviceMemory
from pd.errors import ProtocolError
from pd.transfer.direct_ledger import Chunks, Grant
from pd.transfer.direct_shm import PAGE, Target, map_memory
from pd.transfer.direct_wire import LinkClosed

U64 = npt.NDArray[np.uint64]

#: Bytes of one pull, during which a revoke has to wait: a few milliseconds between GPUs.
PULL_BYTES = 1 << 30


class PeerDevice:
    """A sender's device memory and its epoch page, mapped here."""

    def __init__(self, memory: SharedDeviceMemory, handle: bytes, fds: Sequence[int], sizes: Sequence[int]) -> None:
        """Takes no ownership of `fds` (the epoch page). Raises ProtocolError; TransferError if it cannot be mapped."""
        if len(fds) != 1:
            raise ProtocolError("handshake", f"{len(fds)} descriptors instead of the epoch page's")
        self._epoch = memoryview(map_memory(fds[0], PAGE)).cast("Q")
        self.mapped = memory.open(handle, sizes)

    def ended(self) -> bool:
        return self._epoch[0] != 0

    def close(self) -> None:
        self.mapped.close()


def batches(chunks: Chunks, spans: int, nbytes: int = PULL_BYTES) -> Iterator[slice]:
    """Chunks that one pull takes: of one region here and there, at most so many, and so many bytes if not only one."""
    source, _, region, _, length, _ = chunks.table.T
    count = len(length)
    changes = np.flatnonzero((source[1:] != source[:-1]) | (region[1:] != region[:-1])) + 1
    if not len(changes) and count <= spans and length.sum() <= nbytes:
        yield slice(0, count)
        return
    ends = np.cumsum(length)
    start = 0
    for bound in [*changes.tolist(), count]:
        while start < bound:
            done = int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, done + nbytes, side="right"))
            end = min(bound, start + spans, max(full, start + 1))
            yield slice(start, end)
            start = end


@dataclass(eq=False)
class DevicePost:
    """One post that is being pulled."""

    ticket: int
    tag: int
    grant: Grant
    chunks: Chunks
    landed: bool = True  # so far
    sums: list[U64] = field(default_factory=list)  # of each pull, in order


@dataclass(eq=False)
class _Part:
    """One pull of a post."""

    post: DevicePost
    pull: Pull
    last: bool
    started: bool = False


class Puller:
    """Runs the pulls of one connection in order, with a thread of its own.

    `ended` is told of each post when it landed or was cut short by a revoke or by the sender's end; it may raise
    LinkClosed. `failed` is told of a defect.
    """

    def __init__(
        self,
        source: PeerDevice,
        target: Target,
        memory: SharedDeviceMemory,
        ended: Callable[[DevicePost], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._source, self._target, self._memory = source, target, memory
        self._ended, self._failed = ended, failed
        self._changed = threading.Condition()
        self._parts: collections.deque[_Part] = collections.deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="pd-direct-pull", daemon=True)
        self._thread.start()

    def add(self, post: DevicePost) -> None:
        """Prepare a checked post. Waits while too many are prepared. Raises LinkClosed when nothing more is pulled."""
        columns, regions = post.chunks.table.T, self._target.regions
        count = columns.shape[1]
        for some in batches(post.chunks, self._memory.pull_spans):
            words = columns[5, some].view(np.uint64) if post.chunks.digested else None
            source, region = int(columns[0, some.start]), regions[int(columns[2, some.start])]
            pull = self._memory.prepare(self._source.mapped, source, region, columns[[1, 3, 4], some].T, words)
            with self._changed:
                if self._closed:
                    pull.release()
                    raise LinkClosed("closed")
                self._parts.append(_Part(post, pull, some.stop == count))
                self._changed.notify()

    def close(self) -> None:
        """Forget what is not started and wait for what is; then unmap. By the thread that calls `add`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._source.close()

    def _run(self) -> None:
        try:
            self._memory.enter()
            while (grant := self._wait()) is not None:
                with grant.lock:
                    self._pull(grant)
        except LinkClosed:
            pass  # the reading thread sees it too
        except BaseException as error:
            self._failed(error)
        finally:
            with self._changed:
                self._closed = True
                for part in self._parts:
                    part.pull.release()
                self._parts.clear()

    def _wait(self) -> Grant | None:
        """The grant of the first part; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._closed)
            return None if self._closed else self._parts[0].post.grant

    def _take(self, grant: Grant) -> list[_Part]:
        """All that is prepared for this grant, if nothing else comes before it."""
        with self._changed:
            parts: list[_Part] = []
            while not self._closed and self._parts and self._parts[0].post.grant is grant:
                parts.append(self._parts.popleft())
            return parts

    def _pull(self, grant: Grant) -> None:
        """Pull under the grant's lock while there is something for it. What was read after the sender's end counts not.

        The device has the next pulls already while one is reported; how many, and so how long a revoke waits, `prepare`
        bounds. Nothing is written any more when this returns or raises.
        """
        waiting: collections.deque[_Part] = collections.deque()
        try:
            while True:
                waiting.extend(parts := self._take(grant))
                for part in parts:
                    if grant.live and not self._source.ended():
                        part.pull.start()
                        part.started = True
                if not waiting:
                    return
                self._finish(waiting.popleft())
        finally:
            for part in waiting:
                if part.started:
                    part.pull.finish()
                part.pull.release()

    def _finish(self, part: _Part) -> None:
        post = part.post
        try:
            if part.started:
                post.sums.append(part.pull.finish())
        finally:
            part.pull.release()
        post.landed &= part.started and not self._source.ended()
        if part.last:
            self._ended(post)
