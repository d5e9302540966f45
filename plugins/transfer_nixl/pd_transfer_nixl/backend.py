"""The backend: agents by peer, checks of what is asked, and what each promise rests on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from pd.abc import (
    BackendContext,
    Caller,
    ConnectedBackend,
    Peer,
    Region,
    Spans,
    TransferCapabilities,
    decode,
    machine_id,
)
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd_transfer_nixl.agents import Landing, Link, Memory, Nixl, Ticket

#: Transports (UCX_TLS) whose writes end with the agent that receives them: by sockets or by its own registration.
FENCED = frozenset("tcp self ib rc rc_x rc_v rc_verbs rc_mlx5 ud ud_x ud_v ud_verbs ud_mlx5 dc dc_x dc_mlx5".split())

#: Calls of progress per look at agents from which nothing is expected.
REST = 8

#: Seconds that `connect` waits for the peer's answer; afterwards the posts wait.
PROMPT = 0.25


class Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="nixl/1"):
    identity: str
    address: tuple[str, int]
    memory: list[Memory]


class Introduction(msgspec.Struct, frozen=True, array_like=True, tag="nixl/1"):
    """Of a sender: its agent's metadata, and the machine on which it may write without the receiver's help."""

    metadata: bytes
    machine: str


class NixlBackend(ConnectedBackend[Link]):
    """See the README. Options: `ib_device`, `insecure_control_plane`. A sender's agent is what its caller keeps."""

    name = "nixl"
    capabilities = TransferCapabilities(
        memory_kinds=frozenset({"cpu", "cuda"}), max_spans_per_post=4096, needs_progress=True
    )

    def __init__(self, context: BackendContext, api: ModuleType) -> None:
        super().__init__(context)
        self._nixl = Nixl(api)
        transports = {one.strip() for one in os.environ.get("UCX_TLS", "all").split(",")}
        self._copies = not transports <= FENCED
        self._memory: list[Memory] = []
        self._numbers, self._turns = itertools.count(1), itertools.count(1)

    def open(self, identity: str) -> None:
        """Also sees that UCX starts."""
        try:
            self._nixl.agent("try-out", [])
        except TransferError as error:
            raise BackendUnavailable("nixl", error.reason, "check UCX_TLS and UCX_NET_DEVICES") from error
        super().open(identity)

    def register(self, regions: Sequence[Region]) -> None:
        """Each peer's agent registers them for itself, so that dropping it withdraws them."""
        self._memory = [Memory.of(region) for region in regions]
        super().register(regions)

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(Descriptor(self.identity, self.door.address, self._memory))

    def progress(self) -> None:
        """Every agent that is written to, or that writes; the others now and then."""
        if self._door is None:
            return
        rested = next(self._turns) % REST == 0
        for link in list(self.receivers):
            if rested or link.busy:
                link.progress()
        for caller in self.door.callers():
            if caller.kept is not None:
                caller.kept.progress()

    # --- sender -------------------------------------------------------------------------------------------------

    def connect(self, descriptor: bytes) -> Peer:
        """Raises TransferError for a foreign descriptor, PeerLost for a peer that is gone or refuses."""
        there = decode(descriptor, Descriptor)
        agent = self._agent(f"{self.identity}>{there.identity}")
        words = msgspec.msgpack.encode(Introduction(agent.get_agent_metadata(), machine_id() if self._copies else ""))
        call = self.call(there.identity, there.address, words)
        link = Link(there.identity, call, self._nixl, agent, self._memory, there.memory)
        del agent  # the link is the only one that holds it
        if call.wait(PROMPT) and not call.answered:
            link.stop()
            raise PeerLost(there.identity, call.end)
        self.receivers.add(link)
        return link

    def _agent(self, name: str, sender: bytes = b"") -> Any:
        self.context.memory.enter()
        return self._nixl.agent(f"{name}/{next(self._numbers)}", self._memory, sender)

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        assert isinstance(peer, Link)
        spans = np.ascontiguousarray(spans, dtype=np.uint64).reshape(-1, 5)
        self.ends(spans, peer.table)
        return peer.post(spans)

    def poll(self, ticket: Ticket) -> bool:
        return ticket.link.poll(ticket)

    def reset_peer(self, peer: Peer) -> None:
        assert isinstance(peer, Link)
        peer.stop()
        super().reset_peer(peer)
        self.context.log("nixl peer closed", peer=peer.identity, **peer.counts)

    # --- receiver -----------------------------------------------------------------------------------------------

    def admit(self, caller: Caller) -> bytes:
        """An agent to which this sender alone writes; an earlier one of the same sender ends."""
        sender = decode(caller.words, Introduction)
        self.door.cut(caller.identity, before=caller)
        agent = self._agent(f"{self.identity}<{caller.identity}", sender.metadata)
        caller.kept = Landing(agent, copies=sender.machine == machine_id())
        metadata: bytes = agent.get_agent_metadata()
        return metadata

    def leave(self, caller: Caller) -> None:
        caller.kept.close()

    def expel(self, identity: str) -> bool:
        """True when its agents here are gone, and one that writes without their help has ended its calls."""
        self.door.expel(identity)
        copying = [one for one in self.door.callers(identity) if one.kept is not None and one.kept.copies]
        for caller in copying:
            caller.kept.close()
        if not copying:
            self.door.cut(identity)
        return not copying
