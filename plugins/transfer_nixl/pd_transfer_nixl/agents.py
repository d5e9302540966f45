"""NIXL's agents: one per direction of a pair of peers, so that either end can cut.

To drop an agent is the only thing that stops NIXL: a request that was released, or a peer that was removed, is written
to the end. An agent is used by one thread at a time.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pd.abc import Call, Receiver, Region, Spans
from pd.errors import PeerLost, TransferError

I64 = npt.NDArray[np.int64]

#: (first, length, stride): rows of `length` bytes, of which row i begins at `first + i * stride`.
Grid = tuple[int, int, int]

#: Bytes per request, where NIXL copies inside the call the longest that other peers wait; requests under way per post.
REQUEST_BYTES, REQUESTS = 64 << 20, 4

#: A poll drives its post for so many seconds: at a call per millisecond sockets would run dry.
DRIVE_SECONDS = 200e-6

#: Prepared lists per peer; posts that would need more of them use descriptors of their own.
MAX_LISTS = 16


class Memory(msgspec.Struct, frozen=True, array_like=True):
    """A registered region. `kind` and `ordinal` are NIXL's: DRAM or VRAM, and which device."""

    address: int
    nbytes: int
    kind: str
    ordinal: int
    block_bytes: int

    @classmethod
    def of(cls, region: Region) -> Memory:
        device, _, ordinal = region.device.partition(":")
        kind = "DRAM" if device == "cpu" else "VRAM"
        return cls(region.address, region.nbytes, kind, int(ordinal or 0), region.block_bytes)


class Nixl:
    """The vendor's module, and agents made of it."""

    def __init__(self, api: ModuleType) -> None:
        self._api, bindings = api, api.nixlBind
        names = [name for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")]
        self.errors: tuple[type[Exception], ...] = tuple(getattr(bindings, name) for name in names)
        self.lost: tuple[type[Exception], ...] = (bindings.nixlRemoteDisconnectError, bindings.nixlBackendError)

    def agent(self, name: str, memory: list[Memory], sender: bytes = b"") -> Any:
        """A new agent with this memory registered, for a sender of which this is the metadata.

        It makes progress only when called. Raises TransferError.
        """
        config = self._api.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"])
        try:
            agent = self._api.nixl_agent(name, config)
            for kind in ("DRAM", "VRAM"):
                table = sorted({(one.address, one.nbytes, one.ordinal, "") for one in memory if one.kind == kind})
                if table:
                    agent.register_memory(table, kind)
            if sender:
                agent.add_remote_agent(sender)
        except self.errors as error:
            raise TransferError(f"nixl: {error}") from error
        return agent


def drop(owner: Any) -> None:
    """Destroy the agent that `owner.agent` holds. Raises TransferError if something else still holds it."""
    agent = weakref.ref(owner.agent.agent)
    owner.agent = None
    if agent() is not None:
        gc.collect()  # an exception that somebody kept
    if agent() is not None:
        raise TransferError("an agent of NIXL is still in use, so it goes on reading")


def rows(offsets: I64, lengths: I64, block_bytes: int) -> tuple[Grid, npt.NDArray[np.int32]] | None:
    """One side of a post as rows of a grid over its region, and which of them.

    For whole blocks, alone or in runs (NIXL joins neighbours again), and for the same slice of any blocks; else None.
    A region without blocks counts as made of blocks of the shortest span.
    """
    stride = block_bytes or int(lengths.min())
    phase, length = int(offsets[0]) % stride, int(lengths[0])
    if not phase and not (lengths % stride).any() and not (offsets % stride).any():
        counts = lengths // stride
        starts = np.repeat(offsets // stride - (np.cumsum(counts) - counts), counts)
        return (0, stride, stride), (starts + np.arange(len(starts))).astype(np.int32)
    if phase + length > stride or (lengths != length).any() or (offsets % stride != phase).any():
        return None
    return (phase, length, stride), (offsets // stride).astype(np.int32)


@dataclass(eq=False)
class Ticket:
    """One post: what NIXL does not have yet, and the requests that it has."""

    link: Link
    waiting: collections.deque[Spans]
    requests: list[Any] = field(default_factory=list)
    failure: Callable[[], TransferError] | None = None

    @property
    def open(self) -> bool:
        return self.failure is None and bool(self.waiting or self.requests)

    def failed(self, reason: str, lost: bool) -> TransferError:
        """Remembers how to say it, not the exception: its traceback would keep the agent alive."""
        lose, fail = partial(PeerLost, self.link.identity, reason), partial(TransferError, f"nixl: {reason}")
        self.failure = lose if lost else fail
        return self.failure()


class Link(Receiver):
    """A sender's end: the peer that `connect` returns. Writes wait until the peer has answered the call.

    `counts`: requests by index and by descriptors of their own, and the lists that were prepared for the former.
    """

    def __init__(
        self, identity: str, call: Call, nixl: Nixl, agent: Any, memory: list[Memory], remote: list[Memory]
    ) -> None:
        super().__init__(identity, call)
        self.table = [(one.address, one.nbytes) for one in remote]
        self.counts = {"indexed_posts": 0, "plain_posts": 0, "prepared_lists": 0}
        self.agent, self._nixl, self._memory, self._remote = agent, nixl, memory, remote
        self._tickets: set[Ticket] = set()  # not done: open, or failed
        self._lists: dict[tuple[str, int, Grid], Any] = {}
        self._landing = ""  # the peer's agent, once it has answered

    @property
    def busy(self) -> bool:
        return bool(self._tickets)

    def progress(self) -> None:
        """Let NIXL work. What goes wrong meets the polls."""
        if self.agent is not None:
            with contextlib.suppress(*self._nixl.errors):
                self.agent.get_new_notifs()

    def post(self, spans: Spans) -> Ticket:
        """In requests of one pair of regions each, and not too many bytes."""
        change = (spans[1:, [0, 2]] != spans[:-1, [0, 2]]).any(axis=1)
        total = np.cumsum(spans[:, 4]) // np.uint64(REQUEST_BYTES)
        pieces = np.split(spans, np.flatnonzero(change | (total[1:] != total[:-1])) + 1) if len(spans) else []
        ticket = Ticket(self, collections.deque(pieces))
        if ticket.open:
            self._tickets.add(ticket)
            self._drive(ticket)
        return ticket

    def poll(self, ticket: Ticket) -> bool:
        """Drive one post for a moment. Raises PeerLost, TransferError."""
        until = time.perf_counter() + DRIVE_SECONDS
        while ticket.open:
            self._drive(ticket)
            if not self._landing or time.perf_counter() >= until:
                break
        if ticket.failure is not None:
            raise ticket.failure()
        return not ticket.open

    def _drive(self, ticket: Ticket) -> None:
        if end := "it was reset" if self.agent is None else self.call.end:
            raise ticket.failed(end, lost=True)
        try:
            if not self._landing:
                if not self.call.answered:
                    return
                self._landing = self.agent.add_remote_agent(self.call.words).decode()
            self._check(ticket)
            # At most one request that NIXL completes in the call, so that others get a turn.
            while ticket.waiting and len(ticket.requests) < REQUESTS:
                ticket.requests.append(self._request(ticket.waiting[0]))
                ticket.waiting.popleft()
                if self.agent.transfer(ticket.requests[-1]) != "PROC":
                    self._check(ticket)
                    break
            if not ticket.open:
                self._tickets.discard(ticket)
        except self._nixl.errors as error:
            raise ticket.failed(str(error), lost=isinstance(error, self._nixl.lost)) from error

    def _check(self, ticket: Ticket) -> None:
        for request in list(ticket.requests):
            state = self.agent.check_xfer_state(request)
            if state == "ERR":
                raise ticket.failed("a request failed", lost=False)
            if state == "DONE":
                request.release()
                ticket.requests.remove(request)

    def _request(self, spans: Spans) -> Any:
        """A write of spans between one pair of regions: by index where they fit a grid on both sides."""
        ends = ((0, 1, self._memory, ""), (2, 3, self._remote, self._landing))
        forms, sides = [], []
        for region, offset, memory, owner in ends:
            table, columns = memory[int(spans[0, region])], spans[:, [offset, 4]].astype(np.int64)
            sides.append((owner, int(spans[0, region]), table))
            forms.append(rows(columns[:, 0], columns[:, 1], table.block_bytes))
        here, there = forms
        if here is not None and there is not None and here[0][1] == there[0][1]:
            lists = [self._list(*side, form[0]) for side, form in zip(sides, (here, there), strict=True)]
            if None not in lists:
                self.counts["indexed_posts"] += 1
                return self.agent.make_prepped_xfer("WRITE", lists[0], here[1], lists[1], there[1])
        self.counts["plain_posts"] += 1
        plain = []
        for (_, _, table), (_, offset, _, _) in zip(sides, ends, strict=True):
            one = np.full((len(spans), 3), table.ordinal, np.uint64)
            one[:, 0], one[:, 1] = spans[:, offset] + np.uint64(table.address), spans[:, 4]
            plain.append(self.agent.get_xfer_descs(one, table.kind))
        return self.agent.initialize_xfer("WRITE", *plain, self._landing)

    def _list(self, owner: str, region: int, memory: Memory, grid: Grid) -> Any | None:
        """The prepared list of these rows; made once. None if there are too many already."""
        key, (first, length, stride) = (owner, region, grid), grid
        if key not in self._lists and len(self._lists) < MAX_LISTS:
            count = (memory.nbytes - first - length) // stride + 1
            rows = [[memory.address + first, length, memory.ordinal, stride, count]]
            self._lists[key] = self.agent.prep_xfer_dlist(owner, np.array(rows, np.uint64), memory.kind)
            self.counts["prepared_lists"] += 1
        return self._lists.get(key)

    def stop(self) -> None:
        """When this returns, nothing of it reads local memory any more."""
        if self.agent is not None:
            self._release()
            drop(self)

    def _release(self) -> None:
        """Let go of all that holds the agent."""
        for ticket in self._tickets:
            if ticket.open:
                ticket.failed("was reset", lost=True)
            for request in ticket.requests:
                with contextlib.suppress(*self._nixl.errors):  # it is still written; the end of the agent ends it
                    request.release()
            ticket.requests.clear()
        self._tickets.clear()
        for prepared in self._lists.values():
            prepared.release()
        self._lists.clear()


class Landing:
    """A receiver's end: the agent to which one sender writes. Without it nothing lands, but what a process copies.

    `copies`: this sender may write without it. Thread-safe.
    """

    def __init__(self, agent: Any, copies: bool) -> None:
        self.agent, self.copies = agent, copies
        self._lock = threading.Lock()

    def progress(self) -> None:
        with self._lock:
            if self.agent is not None:
                self.agent.get_new_notifs()

    def close(self) -> None:
        with self._lock:
            if self.agent is not None:
                drop(self)
