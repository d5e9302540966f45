"""NIXL's agents: one per direction of a pair of peers and one that answers greetings, so that either end can cut.

To drop an agent is the only thing that stops NIXL: a request that was released, or a peer that was removed, is written
to the end. Everything here is used by one thread at a time.
"""

from __future__ import annotations

import collections
import gc
import itertools
import time
import weakref
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.abc import Spans
from pd.errors import PeerLost, TransferError
from pd_transfer_nixl.wire import Descriptor, Greeting, Memory, Place, Welcome, seal, unseal

I64 = npt.NDArray[np.int64]

#: Seconds between greetings. They are repeated: only one that fails tells that the peer is gone.
GREETING_INTERVAL = 0.25

#: Bytes per request, where NIXL copies inside the call the longest that other peers wait; requests under way per post.
REQUEST_BYTES, REQUESTS = 64 << 20, 4

#: A poll drives its post for so many seconds: at a call per millisecond sockets would run dry.
DRIVE_SECONDS = 200e-6

#: Prepared lists per peer; posts that would need more of them use descriptors of their own.
MAX_LISTS = 16


class Nixl:
    """The vendor's module, and agents made of it."""

    def __init__(self, api: ModuleType) -> None:
        self._api, bindings = api, api.nixlBind
        names = [name for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")]
        self.errors: tuple[type[Exception], ...] = tuple(getattr(bindings, name) for name in names)
        self.faults: tuple[type[Exception], ...] = (*self.errors, TransferError)
        self.lost: tuple[type[Exception], ...] = (bindings.nixlRemoteDisconnectError, bindings.nixlBackendError)

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
    """A sender's end: the peer that `connect` returns. Writes wait until the peer has answered the greeting.

    `counts`: requests by index and by descriptors of their own, and the lists that were prepared for the former.
    """

    def __init__(self, nixl: Nixl, memory: list[Memory], there: Descriptor, greeting: Greeting) -> None:
        self.identity, self.remote = there.identity, there.memory
        self.counts = {"indexed_posts": 0, "plain_posts": 0, "prepared_lists": 0}
        self._nixl, self._memory, self._here, self._there = nixl, memory, greeting.place, there.place
        self._tickets: set[Ticket] = set()  # not done: open, or failed
        self._lists: dict[tuple[str, int, int, int, int], Any] = {}
        self._landing, self._lost, self._greet_at = "", "", 0.0
        self.agent = nixl.agent(greeting.agent, memory)
        greeting = Greeting(
            greeting.identity, greeting.agent, self.agent.get_agent_metadata(), greeting.place, greeting.copies
        )
        self._greeting = seal(greeting)
        self._door = self.agent.add_remote_agent(there.door).decode()
        self.progress()

    @property
    def busy(self) -> bool:
        return not self._landing or bool(self._tickets)

    def progress(self) -> None:
        """Drive what is under way; greet until there is an answer. What goes wrong meets the posts."""
        if self.agent is None or self._lost:
            return
        try:
            notes = self.agent.get_new_notifs()
            if not self._landing:
                self._greet(list(itertools.chain.from_iterable(notes.values())))
        except self._nixl.faults as error:
            self._lost = f"does not answer: {error}"

    def _greet(self, answers: list[bytes]) -> None:
        if answers:
            self._landing = self.agent.add_remote_agent(unseal(answers[0], Welcome).metadata).decode()
            self.agent.remove_remote_agent(self._door)
        elif time.monotonic() >= self._greet_at:
            self._greet_at = time.monotonic() + GREETING_INTERVAL
            self.agent.send_notif(self._door, self._greeting)
            if self._here.knows_ended(self._there):
                self._lost = "its process has ended"

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
        if not self._landing:
            self.progress()
        if self._lost:
            raise ticket.failed(self._lost, lost=True)
        try:
            self._check(ticket)
            # At most one request that NIXL completes in the call, so that others get a turn.
            while ticket.waiting and self._landing and len(ticket.requests) < REQUESTS:
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
    """A receiver's end: the agent to which one sender writes. Without it nothing lands, but what a process copies."""

    def __init__(self, nixl: Nixl, name: str, memory: list[Memory], greeting: Greeting, here: Place) -> None:
        self.greeting, self._here = greeting, here
        self.agent = nixl.agent(name, memory)
        self._peer = self.agent.add_remote_agent(greeting.metadata).decode()
        self._welcome = seal(Welcome(self.agent.get_agent_metadata()))
        self.welcome()

    def welcome(self) -> None:
        self.agent.send_notif(self._peer, self._welcome)

    def progress(self) -> None:
        if self.agent is not None:
            self.agent.get_new_notifs()

    def close(self) -> bool:
        """Whether nothing of this sender can land here any more."""
        if self.agent is not None:
            drop(self)
        there = self.greeting.place
        elsewhere = there.machine != self._here.machine
        return elsewhere or not self.greeting.copies or self._here.knows_ended(there)
