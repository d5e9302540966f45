"""Push queues: what waits for a peer, what is under way, and how each push ends. One queue is driven by one thread.

Source memory of a push belongs to it until it is reported `TransferPushed`, or failed with `quiet`, or its peer's
`TransferReset` was reported. A failed push that is not quiet stays here, unreported further, until that reset.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pd.abc import Peer, Spans, Ticket, TransferBackend
from pd.errors import PeerLost, ProtocolError, TransferError
from pd.messages import Push, TransferFailed, TransferPeerLost, TransferPushed
from pd.transfer.spans import Pool, block_ids, check_blocks, posts, push_spans
from pd.transfer.staging import Staging

#: Posts to one peer that may be under way; more would only make cancelling slower.
POSTS_IN_FLIGHT = 8

#: Cancelled hand-offs that a queue remembers: a push on a step order may arrive after its cancel.
CANCELS = 4096

Emit = Callable[[TransferFailed | TransferPeerLost | TransferPushed], None]


@dataclass
class Connection:
    """A connected peer. `broken` says why nothing more is posted to it before a reset."""

    peer: Peer
    kv_heads: tuple[int, int]
    broken: str = ""
    in_flight: int = 0  # tickets of jobs that are not given up


@dataclass
class Job:
    """One push under way. `settled`: nothing of it is in flight and its memory was let go."""

    push: Push
    arrived: float
    deadline: float
    spans: Spans
    pieces: Iterator[Spans]
    connection: Connection
    tickets: list[Ticket] = field(default_factory=list)
    started: bool = False
    posted_all: bool = False
    cancelled: bool = False
    error: str = ""
    reported: bool = False
    settled: bool = False

    @property
    def nbytes(self) -> int:
        return int(self.spans[:, 4].sum())


@dataclass(frozen=True)
class Waiting:
    arrival: int
    push: Push
    arrived: float
    deadline: float


class PushQueue:
    """The pushes of some peers: begun in the order they came, except that a peer whose window is full is passed over.

    Used by one thread.
    """

    def __init__(
        self,
        backend: TransferBackend,
        pools: list[Pool],
        staging: Staging,
        emit: Emit,
        timeout: float,
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend, self._pools, self._staging, self._emit = backend, pools, staging, emit
        self._timeout, self._rank, self._clock = timeout, rank, clock
        self._capabilities = backend.capabilities
        self.connections: dict[str, Connection] = {}
        self._waiting: dict[str, collections.deque[Waiting]] = {}
        self._arrivals = itertools.count()
        self._jobs: list[Job] = []
        self._cancelled: collections.OrderedDict[tuple[str, int], None] = collections.OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do, now or when a ticket completes. Any thread may ask."""
        return bool(self._waiting) or any(not job.reported for job in self._jobs)

    def add(self, push: Push, now: float) -> None:
        waiting = Waiting(next(self._arrivals), push, now, now + self._timeout)
        self._waiting.setdefault(push.peer, collections.deque()).append(waiting)

    def cancel(self, peer: str, tag: int) -> None:
        """Post nothing more for this hand-off. What waits fails; what is under way ends by itself."""
        self._cancelled[peer, tag] = None
        if len(self._cancelled) > CANCELS:
            self._cancelled.popitem(last=False)
        for one in self._waiting.pop(peer, ()):
            if one.push.tag == tag:
                self._fail(one.push, "cancelled", quiet=True)
            else:
                self._waiting.setdefault(peer, collections.deque()).append(one)
        for job in self._jobs:
            if job.push.peer == peer and job.push.tag == tag and not job.posted_all:
                job.cancelled = job.posted_all = True

    def connect(self, peer: str, descriptor: bytes, kv_heads: tuple[int, int]) -> None:
        """Raises PeerLost, TransferError."""
        if peer in self.connections:
            self.reset(peer)
        made = self._backend.connect(descriptor)
        if made.identity != peer:
            self._backend.reset_peer(made)
            raise PeerLost(peer, f"the descriptor is of {made.identity}")
        self.connections[peer] = Connection(made, kv_heads)

    def reset(self, peer: str) -> None:
        """Afterwards no local byte is read for this peer; its pushes have ended and been reported."""
        connection = self.connections.pop(peer, None)
        if connection is not None:
            self._backend.reset_peer(connection.peer)
        for one in self._waiting.pop(peer, ()):
            self._fail(one.push, "the peer was reset", quiet=True)
        for job in self._jobs:
            if job.push.peer == peer:
                if not job.reported:
                    self._fail(job.push, job.error or "the peer was reset", quiet=not job.started)
                self._settle(job)
        self._jobs = [job for job in self._jobs if not job.settled]
        for key in [key for key in self._cancelled if key[0] == peer]:
            del self._cancelled[key]

    def step(self, now: float) -> bool:
        """Begin and post what may be, poll what is under way. Whether anything moved."""
        moved = False
        while (line := self._next()) is not None:
            self._begin(line[0], now)
            begun = line.popleft()  # not before: it is busy all the time
            if not line:
                del self._waiting[begun.push.peer]
            moved = True
        for job in self._jobs:
            if not job.reported:
                moved |= self._advance(job, now)
        if moved:
            self._jobs = [job for job in self._jobs if not job.settled]
        return moved

    def _next(self) -> collections.deque[Waiting] | None:
        """The line whose first is the first that came of those whose peer's window has room."""
        ready = [line for peer, line in self._waiting.items() if self._has_room(peer)]
        return min(ready, key=lambda line: line[0].arrival, default=None)

    def _has_room(self, peer: str) -> bool:
        connection = self.connections.get(peer)
        return connection is None or bool(connection.broken) or connection.in_flight < POSTS_IN_FLIGHT

    def _begin(self, waiting: Waiting, now: float) -> None:
        push = waiting.push
        connection = self.connections.get(push.peer)
        if (push.peer, push.tag) in self._cancelled:
            self._fail(push, "cancelled", quiet=True)
        elif connection is None or connection.broken:
            self._fail(push, connection.broken if connection else "the peer is not connected", quiet=True)
        elif now >= waiting.deadline:
            self._fail(push, f"not started within {self._timeout:g} s", quiet=True)
        else:
            try:
                spans = self._spans(push, connection)
            except ProtocolError as error:
                self._fail(push, str(error), quiet=True)
                return
            pieces = posts(spans, self._capabilities.max_spans_per_post)
            job = Job(push, waiting.arrived, waiting.deadline, spans, pieces, connection)
            self._staging.hold(spans)
            self._jobs.append(job)
            self._post(job)

    def _spans(self, push: Push, connection: Connection) -> Spans:
        if not 0 <= push.group < len(self._pools):
            raise ProtocolError("group", f"{push.group} of {len(self._pools)}")
        pool = self._pools[push.group]
        source, target = block_ids(push.src_i32, "src_i32"), block_ids(push.dst_i32, "dst_i32")
        check_blocks(source, pool.num_blocks, "src_i32")
        if len(source) != len(target) or (len(target) and target.min() < 0):
            raise ProtocolError("dst_i32", f"{len(target)} for {len(source)} blocks, or negative")
        return push_spans(pool, push.group, source, target, connection.kv_heads)

    def _post(self, job: Job) -> bool:
        """Post pieces of one job while its peer's window has room. Whether one was posted."""
        posted = False
        connection = job.connection
        while not job.posted_all and connection.in_flight < POSTS_IN_FLIGHT:
            piece = next(job.pieces, None)
            if piece is None:
                job.posted_all = True
                break
            posted = job.started = True
            try:
                self._staging.load(piece)
                job.tickets.append(self._backend.post(connection.peer, piece, job.push.tag))
                connection.in_flight += 1
            except TransferError as error:
                self._error(job, error)
        return posted

    def _advance(self, job: Job, now: float) -> bool:
        moved = self._post(job)
        left = []
        for ticket in job.tickets:
            try:
                done = self._backend.poll(ticket)
            except TransferError as error:
                self._error(job, error)
                done = self._capabilities.quiet_errors and not isinstance(error, PeerLost)
            if not done:
                left.append(ticket)
        moved |= len(left) != len(job.tickets)
        job.connection.in_flight -= len(job.tickets) - len(left)
        job.tickets = left
        broken = job.connection.broken
        if now >= job.deadline and not broken:
            broken = job.connection.broken = f"a push took longer than {self._timeout:g} s"
        if job.posted_all and not left:
            self._finish(job)
        elif broken or (job.error and not self._capabilities.quiet_errors):
            self._give_up(job, job.error or broken)
        else:
            return moved
        return True

    def _error(self, job: Job, error: TransferError) -> None:
        job.error, job.posted_all = job.error or error.reason, True
        if isinstance(error, PeerLost) and not job.connection.broken:
            job.connection.broken = error.reason
            self._emit(TransferPeerLost(job.push.peer, error.reason, self._rank))

    def _finish(self, job: Job) -> None:
        """Every ticket of the job is over."""
        if not job.error and not job.cancelled:
            self._settle(job)
            job.reported = True
            micros = max(0, int(1e6 * (self._clock() - job.arrived)))  # `step`'s now is from before a post that blocks
            push = job.push
            self._emit(TransferPushed(push.tag, push.index, job.nbytes, push.peer, self._rank, micros))
        elif not job.error or (self._capabilities.quiet_errors and not job.connection.broken):
            self._settle(job)
            job.reported = True
            self._fail(job.push, job.error or "cancelled", quiet=True)
        else:  # a post that raised may have begun before it did
            self._give_up(job, job.error)

    def _give_up(self, job: Job, reason: str) -> None:
        """Report a job whose posts may still be under way; it keeps its memory until the peer is reset."""
        job.reported = job.posted_all = True
        job.connection.in_flight -= len(job.tickets)
        if not job.started:
            self._settle(job)
        self._fail(job.push, reason, quiet=not job.started)

    def _settle(self, job: Job) -> None:
        job.settled = True
        self._staging.release(job.spans)

    def _fail(self, push: Push, reason: str, quiet: bool) -> None:
        self._emit(TransferFailed(push.tag, push.index, reason, push.peer, quiet, self._rank))
