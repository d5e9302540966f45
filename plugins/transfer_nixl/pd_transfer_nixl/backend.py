"""The backend: agents by peer, checks of what is asked, and what each promise rests on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.abc import BackendContext, Peer, Region, Spans, TransferCapabilities
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd_transfer_nixl.agents import Landing, Link, Nixl, Ticket
from pd_transfer_nixl.wire import Descriptor, Greeting, Memory, Place, seal, unseal

U64 = npt.NDArray[np.uint64]

#: Transports (UCX_TLS) whose writes end with the agent that receives them: by sockets or by its own registration.
FENCED = frozenset("tcp self ib rc rc_x rc_v rc_verbs rc_mlx5 ud ud_x ud_v ud_verbs ud_mlx5 dc dc_x dc_mlx5".split())

#: Calls of progress (a millisecond apart) per look at agents from which nothing is expected.
REST = 8


class NixlBackend:
    """See the README. Options: `ib_device`, `insecure_control_plane`."""

    capabilities = TransferCapabilities(
        memory_kinds=frozenset({"cpu", "cuda"}), max_spans_per_post=4096, needs_progress=True
    )

    def __init__(self, context: BackendContext, api: ModuleType) -> None:
        self._context, self._nixl, self._place = context, Nixl(api), Place.here()
        transports = {one.strip() for one in os.environ.get("UCX_TLS", "all").split(",")}
        self._copies = not transports <= FENCED
        self._identity = ""
        self._door: Any = None
        self._memory: list[Memory] = []
        self._numbers, self._turns = itertools.count(1), itertools.count(1)
        self._links: list[Link] = []
        self._landings: dict[str, Landing] = {}
        self._expelled: set[str] = set()

    def open(self, identity: str) -> None:
        self._identity = identity
        try:
            self._door = self._nixl.agent(identity, [])
        except self._nixl.errors as error:
            raise BackendUnavailable("nixl", f"UCX: {error}", "check UCX_TLS and UCX_NET_DEVICES") from error

    def allocate(self, nbytes: int, device: str) -> Region | None:
        return None

    def register(self, regions: Sequence[Region]) -> None:
        """Each peer's agent registers them for itself, so that dropping it withdraws them."""
        self._memory = [Memory.of(region) for region in regions]

    def descriptor(self) -> bytes:
        return seal(Descriptor(self._identity, self._door.get_agent_metadata(), self._memory, self._place))

    def close(self) -> None:
        for link in list(self._links):
            self.reset_peer(link)
        for landing in self._landings.values():
            landing.close()
        self._landings.clear()
        self._door = None

    def progress(self) -> None:
        """Every agent that is written to, or waits for an answer; the others now and then."""
        rested = next(self._turns) % REST == 0
        for link in self._links:
            if rested or link.busy:
                link.progress()
        for landing in self._landings.values():
            landing.progress()
        if self._door is not None and rested:
            for notes in self._door.get_new_notifs().values():
                for note in notes:
                    self._greeted(note)

    # --- sender -------------------------------------------------------------------------------------------------

    def connect(self, descriptor: bytes) -> Peer:
        there = unseal(descriptor, Descriptor)
        name = f"{self._identity}>{there.identity}/{next(self._numbers)}"
        try:
            link = Link(self._nixl, self._memory, there, Greeting(self._identity, name, b"", self._place, self._copies))
        except self._nixl.errors as error:
            raise PeerLost(there.identity, f"cannot be reached: {error}") from error
        self._links.append(link)
        return link

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        assert isinstance(peer, Link)
        spans = np.ascontiguousarray(spans, dtype=np.uint64).reshape(-1, 5)
        for what, memory, column in (("local", self._memory, 0), ("peer's", peer.remote, 2)):
            sizes = np.array([one.nbytes for one in memory], np.uint64)
            if not within(spans[:, column], spans[:, column + 1], spans[:, 4], sizes):
                raise TransferError(f"a span outside the {what} regions")
        if peer.agent is None:
            raise PeerLost(peer.identity, "was reset")
        return peer.post(spans)

    def poll(self, ticket: Ticket) -> bool:
        return bool(ticket.poll(ticket))

    def reset_peer(self, peer: Peer) -> None:
        assert isinstance(peer, Link)
        peer.close()
        if peer in self._links:
            self._links.remove(peer)
            self._context.log("nixl peer closed", peer=peer.identity, **peer.counts)

    # --- receiver -----------------------------------------------------------------------------------------------

    def _greeted(self, note: bytes) -> None:
        """Make the agent to which this sender writes; an earlier one of the same sender ends."""
        try:
            greeting = unseal(note, Greeting)
            if greeting.identity in self._expelled:
                return
            known = self._landings.get(greeting.identity)
            if known is not None and known.greeting.agent == greeting.agent:
                known.welcome()
                return
            if known is not None:
                known.close()
            name = f"{self._identity}<{greeting.agent}"
            self._landings[greeting.identity] = Landing(self._nixl, name, self._memory, greeting, self._place)
        except self._nixl.faults as error:
            self._context.log("cannot answer a sender", reason=str(error))

    def grant(self, tag: int, spans: Spans, sender: str) -> None:
        """Not revocable: whoever is connected may write to all that is registered."""

    def revoke(self, tag: int, sender: str) -> bool:
        return False

    def take_digests(self, tag: int, sender: str) -> U64:
        return np.zeros((0, 4), np.uint64)

    def fence(self, identity: str) -> None:
        if self._context.device != "cpu":
            self._context.memory.fence()

    def expel(self, identity: str) -> bool:
        """A sender that was never answered cannot write. The agent of another one goes; see `Landing.close`."""
        self._expelled.add(identity)
        landing = self._landings.get(identity)
        if landing is not None and not landing.close():
            return False
        self._landings.pop(identity, None)
        return True


def within(region: U64, offset: U64, length: U64, sizes: U64) -> bool:
    """Whether every span is in its region, and not empty."""
    if not len(region):
        return True
    if region.max() >= len(sizes) or not length.all():
        return False
    limit = sizes[region.astype(np.int64)]
    return bool(((length <= limit) & (offset <= limit - np.minimum(length, limit))).all())
