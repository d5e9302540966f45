"""The backend: agents by peer, checks of what is asked, and what each promise rests on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from pd.abc import (
    BackendContext,
    BackendDefaults,
    Call,
    Caller,
    Door,
    Peer,
    Region,
    Spans,
    TransferCapabilities,
    addresses,
    decode,
)
from pd.errors import PeerLost, TransferError
from pd_transfer_nixl.agents import Landing, Link, Memory, Nixl, Ticket

#: Transports (UCX_TLS) whose writes end with the agent that receives them: by sockets or by its own registration.
FENCED = frozenset("tcp self ib rc rc_x rc_v rc_verbs rc_mlx5 ud ud_x ud_v ud_verbs ud_mlx5 dc dc_x dc_mlx5".split())

#: Calls of progress (a millisecond apart) per look at agents from which nothing is expected.
REST = 8

#: Seconds that `connect` waits for the peer's answer; afterwards the posts wait.
PROMPT = 0.25


class Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="nixl/1"):
    identity: str
    address: tuple[str, int]
    memory: list[Memory]


class Introduction(msgspec.Struct, frozen=True, array_like=True, tag="nixl/1"):
    """Of a sender: its agent's metadata, its machine, and whether it may write without the receiver's help."""

    metadata: bytes
    machine: str
    copies: bool


class NixlBackend(BackendDefaults):
    """See the README. Options: `ib_device`, `insecure_control_plane`. A sender's agent is what its caller keeps."""

    capabilities = TransferCapabilities(
        memory_kinds=frozenset({"cpu", "cuda"}), max_spans_per_post=4096, needs_progress=True
    )

    def __init__(self, context: BackendContext, api: ModuleType) -> None:
        super().__init__(context)
        self._nixl = Nixl(api)
        self._machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        transports = {one.strip() for one in os.environ.get("UCX_TLS", "all").split(",")}
        self._copies = not transports <= FENCED
        self._identity = ""
        self._door: Door | None = None
        self._memory: list[Memory] = []
        self._numbers, self._turns = itertools.count(1), itertools.count(1)
        self._links: list[Link] = []

    def open(self, identity: str) -> None:
        """Bind the plugin's own port, and see that UCX starts. Nobody is answered before `register`."""
        self._identity = identity
        self._nixl.try_out()
        self._door = Door(self.context, "nixl", identity, self._admit, self._leave)

    def register(self, regions: Sequence[Region]) -> None:
        """Each peer's agent registers them for itself, so that dropping it withdraws them."""
        self._memory = [Memory.of(region) for region in regions]
        assert self._door is not None
        self._door.start()

    def descriptor(self) -> bytes:
        assert self._door is not None
        return msgspec.msgpack.encode(Descriptor(self._identity, self._door.address, self._memory))

    def close(self) -> None:
        for link in list(self._links):
            self.reset_peer(link)
        if self._door is not None:
            self._door.close()

    def progress(self) -> None:
        """Every agent that is written to, or that writes; the others now and then."""
        if self._door is None:
            return
        rested = next(self._turns) % REST == 0
        for link in self._links:
            if rested or link.busy:
                link.progress()
        for caller in self._door.callers():
            if caller.kept is not None:
                caller.kept.progress()

    # --- sender -------------------------------------------------------------------------------------------------

    def connect(self, descriptor: bytes) -> Peer:
        """Raises TransferError for a foreign descriptor, PeerLost for a peer that is gone or refuses."""
        there = decode(descriptor, Descriptor)
        agent = self._agent(f"{self._identity}>{there.identity}/{next(self._numbers)}")
        words = msgspec.msgpack.encode(Introduction(agent.get_agent_metadata(), self._machine, self._copies))
        call = Call(self.context, "nixl", self._identity, there.identity, there.address, words)
        link = Link(self._nixl, agent, self._memory, there.identity, there.memory, call)
        del agent  # the link is the only one that holds it
        if call.wait(PROMPT) and not call.answered:
            reason = call.end
            link.close()
            raise PeerLost(there.identity, reason)
        self._links.append(link)
        return link

    def _agent(self, name: str) -> Any:
        """Raises TransferError."""
        self.context.memory.enter()
        try:
            return self._nixl.agent(name, self._memory)
        except self._nixl.errors as error:
            raise TransferError(f"nixl: {error}") from error

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        assert isinstance(peer, Link)
        spans = np.ascontiguousarray(spans, dtype=np.uint64).reshape(-1, 5)
        for what, memory, column in (("local", self._memory, 0), ("remote", peer.remote, 2)):
            table = [(one.address, one.nbytes) for one in memory]
            addresses(spans[:, column], spans[:, column + 1], spans[:, 4], table, what)
        if end := peer.end:
            raise PeerLost(peer.identity, end)
        return peer.post(spans)

    def poll(self, ticket: Ticket) -> bool:
        return bool(ticket.poll(ticket))

    def reset_peer(self, peer: Peer) -> None:
        assert isinstance(peer, Link)
        peer.close()
        if peer in self._links:
            self._links.remove(peer)
            self.context.log("nixl peer closed", peer=peer.identity, **peer.counts)

    # --- receiver -----------------------------------------------------------------------------------------------

    def _admit(self, caller: Caller) -> bytes:
        """An agent to which this sender alone writes; an earlier one of the same sender ends."""
        sender = decode(caller.words, Introduction)
        assert self._door is not None
        self._door.cut(caller.identity, before=caller)
        copies = sender.copies and sender.machine == self._machine
        agent = self._agent(f"{self._identity}<{caller.identity}/{next(self._numbers)}")
        try:
            caller.kept = Landing(agent, sender.metadata, copies)
        except self._nixl.errors as error:
            raise TransferError(f"nixl: {error}") from error
        metadata: bytes = caller.kept.metadata
        return metadata

    @staticmethod
    def _leave(caller: Caller) -> None:
        caller.kept.close()

    def expel(self, identity: str) -> bool:
        """True when its agents here are gone, and one that writes without their help has ended its calls."""
        assert self._door is not None
        self._door.expel(identity)
        copying = [one for one in self._door.callers(identity) if one.kept is not None and one.kept.copies]
        for caller in copying:
            caller.kept.close()
        if not copying:
            self._door.cut(identity)
        return not copying
