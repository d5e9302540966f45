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
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pd.abc import Call, Region, Spans
from pd.errors import BackendUnavailable, PeerLost, TransferError

I64 = npt.NDArray[np.int64]

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

    def try_out(self) -> None:
        """Raises BackendUnavailable."""
        try:
            self.agent("try-out", [])
        except self.errors as error:
            raise BackendUnavailable("nixl", f"UCX: {error}", "check UCX_TLS and UCX_NET_DEVICES") from error

    def agent(self, name: str, memory: list[Memory]) -> Any:
        """A new agent with this memory registered. It makes progress only when called."""
        config = self._api.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=["UCX"])
        agent = self._api.nixl_agent(name, config)
        for kind in ("DRAM", "VRAM"):
            table = sorted({(one.address, one.nbytes, one.ordinal, "") for one in memory if one.kind == kind})
            if table:
                agent.register_memory(table, kind)
        return agent


def drop(owner: Any) -> None:
    """Destroy the agent that `owner.agent` holds. Raises TransferError if something else still holds it."""
    agent = weakref.ref(owner.agent.agent)
    owner.agent = None
    if agent() is not None:
        gc.collect()  # an exception that somebody kept
    if agent() is not None:
        raise TransferError("an agent of NIXL is still in use, so it goes on reading")


@dataclass(frozen=True)
class Rows:
    """One side of a post as rows `first + i * stride` of `length` bytes of a region, and which of them."""

    first: int
    length: int
    stride: int
    indices: npt.NDArray[np.int32]


def rows(offsets: I64, lengths: I64, block_bytes: int) -> Rows | None:
    """Whole blocks, alone or in runs (NIXL joins neighbours again), or the same slice of any blocks; else None.

    A region without blocks counts as made of blocks of the shortest span.
    """
    stride = block_bytes or int(lengths.min())
    phase, length = int(offsets[0]) % stride, int(lengths[0])
    if not phase and not (lengths % stride).any() and not (offsets % stride).any():
        counts = lengths // stride
        starts = np.repeat(offsets // stride - (np.cumsum(counts) - counts), counts)
        return Rows(0, stride, stride, (starts + np.arange(len(starts))).astype(np.int32))
    if phase + length > stride or (lengths != length).any() or (offsets % stride != phase).any():
        return None
    return Rows(phase, length, stride, (offsets // stride).astype(np.int32))


@dataclass(eq=False)
class Ticket:
    """One post: what NIXL does not have yet, and the requests that it has."""

    identity: str
    waiting: collections.deque[Spans]
    poll: Any  # of its link
    requests: list[Any] = field(default_factory=list)
    error: str = ""
    lost: bool = False

    @property
    def open(self) -> bool:
        return not self.error and bool(self.waiting or self.requests)

    def failed(self, reason: str, lost: bool) -> TransferError:
        """Remembers the reason, not the exception: its traceback would keep the agent alive."""
        self.error, self.lost = reason, lost
        return self.failure()

    def failure(self) -> TransferError:
        return PeerLost(self.identity, self.error) if self.lost else TransferError(f"nixl: {self.error}")


class Link:
    """A sender's end: the peer that `connect` returns. Writes wait until the peer has answered the call.

    `counts`: requests by index and by descriptors of their own, and the lists that were prepared for the former.
    """

    def __init__(
        self, nixl: Nixl, agent: Any, memory: list[Memory], identity: str, remote: list[Memory], call: Call
    ) -> None:
        self.identity, self.remote, self.agent, self.call = identity, remote, agent, call
        self.counts = {"indexed_posts": 0, "plain_posts": 0, "prepared_lists": 0}
        self._nixl, self._memory = nixl, memory
        self._tickets: set[Ticket] = set()  # not done: open, or failed
        self._lists: dict[tuple[str, int, int, int, int], Any] = {}
        self._landing = ""  # the peer's agent, once it has answered

    @property
    def end(self) -> str:
        """Why nothing more can be written to it, "" as far as its connection tells."""
        return "it was reset" if self.agent is None else self.call.end

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
        ticket = Ticket(self.identity, collections.deque(pieces), self.poll)
        self._tickets.add(ticket)
        self._drive(ticket)
        self._settle(ticket)
        return ticket

    def poll(self, ticket: Ticket) -> bool:
        """Drive one post for a moment. Raises PeerLost, TransferError."""
        until = time.perf_counter() + DRIVE_SECONDS
        while ticket.open:
            self._drive(ticket)
            if not self._landing or time.perf_counter() >= until:
                break
        if ticket.error:
            raise ticket.failure()
        return self._settle(ticket)

    def _settle(self, ticket: Ticket) -> bool:
        if not ticket.open:
            self._tickets.discard(ticket)
        return not ticket.open

    def _drive(self, ticket: Ticket) -> None:
        if end := self.end:
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
        ends = ((0, 1, self._memory, ""), (2, 3, self.remote, self._landing))
        forms, sides = [], []
        for region, offset, memory, owner in ends:
            table, columns = memory[int(spans[0, region])], spans[:, [offset, 4]].astype(np.int64)
            sides.append((owner, int(spans[0, region]), table))
            forms.append(rows(columns[:, 0], columns[:, 1], table.block_bytes))
        if forms[0] is not None and forms[1] is not None and forms[0].length == forms[1].length:
            here, there = (self._list(*side, form) for side, form in zip(sides, forms, strict=True) if form)
            if here is not None and there is not None:
                self.counts["indexed_posts"] += 1
                return self.agent.make_prepped_xfer("WRITE", here, forms[0].indices, there, forms[1].indices)
        self.counts["plain_posts"] += 1
        plain = []
        for (_, _, table), (_, offset, _, _) in zip(sides, ends, strict=True):
            one = np.full((len(spans), 3), table.ordinal, np.uint64)
            one[:, 0], one[:, 1] = spans[:, offset] + np.uint64(table.address), spans[:, 4]
            plain.append(self.agent.get_xfer_descs(one, table.kind))
        return self.agent.initialize_xfer("WRITE", *plain, self._landing)

    def _list(self, owner: str, region: int, memory: Memory, form: Rows) -> Any | None:
        """The prepared list of these rows; made once. None if there are too many already."""
        key = (owner, region, form.first, form.length, form.stride)
        if key not in self._lists and len(self._lists) < MAX_LISTS:
            count = (memory.nbytes - form.first - form.length) // form.stride + 1
            grid = [[memory.address + form.first, form.length, memory.ordinal, form.stride, count]]
            self._lists[key] = self.agent.prep_xfer_dlist(owner, np.array(grid, np.uint64), memory.kind)
            self.counts["prepared_lists"] += 1
        return self._lists.get(key)

    def close(self) -> None:
        """When this returns, nothing of it reads local memory any more; then the peer learns it."""
        if self.agent is not None:
            self._release()
            drop(self)
        self.call.close()

    def _release(self) -> None:
        """Let go of all that holds the agent."""
        for ticket in self._tickets:
            if ticket.open:
                ticket.failed("was reset", lost=True)
            for request in ticket.requests:
                try:
                    request.release()
                except self._nixl.errors:
                    pass  # it is still written; the end of the agent ends it
            ticket.requests.clear()
            ticket.waiting.clear()
        self._tickets.clear()
        for prepared in self._lists.values():
            prepared.release()
        self._lists.clear()


class Landing:
    """A receiver's end: the agent to which one sender writes. Without it nothing lands, but what a process copies.

    `copies`: this sender may write without it. Thread-safe.
    """

    def __init__(self, agent: Any, sender: bytes, copies: bool) -> None:
        self.agent, self.copies = agent, copies
        self.metadata: bytes = agent.get_agent_metadata()
        self._lock = threading.Lock()
        agent.add_remote_agent(sender)

    def progress(self) -> None:
        with self._lock:
            if self.agent is not None:
                self.agent.get_new_notifs()

    def close(self) -> None:
        with self._lock:
            if self.agent is not None:
                drop(self)
