"""The backend: one engine for each peer, on both sides, so that ending an engine is what makes memory quiet.

Measured, and the reason for it: a write that Mooncake reports as failed may still go on; only destroying the engine
that reads the source, or the one that owns the target, stops it. On TCP an engine costs less than a millisecond.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pd.abc import (
    BackendContext,
    Caller,
    ConnectedBackend,
    Peer,
    Receiver,
    Region,
    Spans,
    TransferCapabilities,
    decode,
)
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd_transfer_mooncake.engines import Engines, first_contact

#: Seconds for the first answer of a peer's engine.
CONTACT_TIMEOUT = 3.0


class Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="mooncake/1"):
    identity: str
    address: tuple[str, int]


class Introduction(msgspec.Struct, frozen=True, array_like=True, tag="mooncake/1"):
    """Of a sender."""

    protocol: str


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="mooncake/1"):
    """The engine for this sender alone: its session, (address, bytes) of each region, a word for first contact."""

    session: str
    regions: list[tuple[int, int]]
    mailbox: int


@dataclass(eq=False)
class Target(Receiver):
    """`engine` is the one that writes there. None: it was reset, and nothing here is read for it."""

    welcome: Welcome
    engine: Any

    @property
    def end(self) -> str:
        """Why nothing more can be written to it, "" as far as its connection tells."""
        return "it was reset" if self.engine is None else self.call.end


@dataclass
class Ticket:
    """Writes of one post; those before `position` are applied."""

    peer: Target
    writes: list[int]
    position: int = 0


class MooncakeBackend(ConnectedBackend[Target]):
    """See the module. A sender's engine here is what its caller keeps; None: nothing of it can land."""

    name = "mooncake"

    def __init__(self, context: BackendContext, module: Any, protocol: str, devices: str) -> None:
        super().__init__(context)
        self._protocol = protocol
        kinds = {"cuda"} if protocol == "nvlink_intra" else {"cpu", "cuda"} if module.SUPPORT_CUDA else {"cpu"}
        self.capabilities = TransferCapabilities(memory_kinds=frozenset(kinds), concurrent_posts=True)
        self._engines = Engines(module, protocol, devices, context.log)
        self._mailbox = ctypes.create_string_buffer(4096)

    def open(self, identity: str) -> None:
        """Also sees that Mooncake starts."""
        if ":" in self.context.data_host:
            raise BackendUnavailable("mooncake", f"cannot bind to {self.context.data_host}", "use an IPv4 address")
        super().open(identity)
        self._engines.make(self.door.host, None, ())

    def register(self, regions: Sequence[Region]) -> None:
        """Engines register it, each when it is made: on TCP that is a line in a table."""
        for region in regions:
            if region.device.partition(":")[0] not in self.capabilities.memory_kinds:
                raise TransferError(f"mooncake by {self._protocol} does not move memory of {region.device}")
        super().register(regions)

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(Descriptor(self.identity, self.door.address))

    # --- who writes here ---

    def admit(self, caller: Caller) -> bytes:
        """An engine for this sender alone, behind a fence that lets in its host alone."""
        theirs = decode(caller.words, Introduction).protocol
        if theirs != self._protocol:
            raise TransferError(f"it moves KV by {self._protocol}, not {theirs}")
        self.door.cut(caller.identity, before=caller)  # it was reset and connects again
        self.context.memory.enter()
        mailbox = Region(0, ctypes.addressof(self._mailbox), len(self._mailbox), "cpu")
        memory = [*self.regions, mailbox] if "cpu" in self.capabilities.memory_kinds else self.regions
        caller.kept = self._engines.make(caller.reached, (caller.host, caller.reached), memory)
        session = f"{caller.reached}:{caller.kept.get_rpc_port()}"
        return msgspec.msgpack.encode(Welcome(session, self.table, mailbox.address))

    def leave(self, caller: Caller) -> None:
        """Afterwards nothing of this sender can land: its engine is gone, and with it every connection."""
        caller.kept = None  # the last reference

    def expel(self, identity: str) -> bool:
        self.door.expel(identity)
        self.door.cut(identity)
        self.context.log("expelled", sender=identity)
        return True

    # --- where we write ---

    def connect(self, descriptor: bytes) -> Peer:
        """Raises TransferError for a foreign descriptor, PeerLost for a peer that is gone, refuses or hangs."""
        there = decode(descriptor, Descriptor)
        call = self.call(there.identity, there.address, msgspec.msgpack.encode(Introduction(self._protocol)))
        try:
            welcome = decode(call.answer(), Welcome)
            engine = self._engines.make(call.local_host, None, () if self._protocol == "tcp" else self.regions)
            if "cpu" in self.capabilities.memory_kinds:
                reached = first_contact(engine, welcome.session, welcome.mailbox, CONTACT_TIMEOUT)
            else:
                reached = engine.send_probe(welcome.session) == 0
            if not reached:
                raise PeerLost(there.identity, f"its engine at {welcome.session} does not answer")
        except BaseException:
            call.close()
            raise
        target = Target(there.identity, call, welcome, engine)
        self.receivers.add(target)
        return target

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        """One write for each span: only single writes can be polled one by one."""
        assert isinstance(peer, Target)
        if peer.end:  # another process may have its ports by now
            raise PeerLost(peer.identity, peer.end)
        sources, targets = self.ends(spans, peer.welcome.regions)
        submit, session = peer.engine.transfer_submit_write, peer.welcome.session
        ticket = Ticket(peer, [])
        for source, target, length in zip(sources.tolist(), targets.tolist(), spans[:, 4].tolist(), strict=True):
            write = submit(session, source, target, length)
            if not write:
                raise PeerLost(peer.identity, "Mooncake takes no write to it")
            ticket.writes.append(write)
        return ticket

    def poll(self, ticket: Ticket) -> bool:
        """Mooncake tells no reasons; addresses were checked, so what is left is the peer."""
        writes, peer = ticket.writes, ticket.peer
        while ticket.position < len(writes):
            if peer.engine is None:
                raise PeerLost(peer.identity, peer.end)
            status = peer.engine.transfer_check_status(writes[ticket.position])
            if status == 0:
                return False
            if status != 1:
                raise PeerLost(peer.identity, f"a write failed ({status}): {peer.end or 'it does not answer'}")
            ticket.position += 1
        return True

    def reset_peer(self, peer: Peer) -> None:
        assert isinstance(peer, Target)
        peer.engine = None  # the last reference
        super().reset_peer(peer)
