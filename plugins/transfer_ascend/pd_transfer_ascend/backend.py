"""The backend over `memfabric_hybrid`, or `mf_adapter`: blocking writes between registered memory of NPUs.

Of the library only what both have is used, and only what `initialize` and the writes return is believed: registering
reports success even after a start that failed. There is no poll, no cancel and no end of a single peer.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pd.abc import (
    BackendContext,
    ConnectedBackend,
    Peer,
    Receiver,
    Region,
    Spans,
    Ticket,
    TransferCapabilities,
    decode,
    host_region,
    reachable_address,
)
from pd.errors import BackendUnavailable, PeerLost, TransferError

#: The library registers memory in pieces of this size.
ALIGNMENT = 2 << 20


class Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="ascend/1"):
    identity: str
    session: str
    address: tuple[str, int]
    regions: list[tuple[int, int]]


@dataclass(eq=False)
class Target(Receiver):
    session: str
    regions: list[tuple[int, int]]


class AscendBackend(ConnectedBackend[Target]):
    """See the module."""

    name = "ascend"
    capabilities = TransferCapabilities(
        memory_kinds=frozenset({"cpu", "npu"}), concurrent_posts=True, blocking_post=True, allocates=True
    )

    def __init__(self, context: BackendContext, vendor: Any, store_url: str, protocol: str) -> None:
        super().__init__(context)
        self._vendor, self._store_url = vendor, store_url
        operations = vendor.TransferEngine.TransDataOpType
        known = sorted(name for name in vars(operations) if name.isupper())
        if protocol.upper() not in known:
            names = ", ".join(known).lower()
            raise BackendUnavailable("ascend", f"ASCEND_MF_TRANSFER_PROTOCOL={protocol}", f"use one of {names}")
        self._operation = getattr(operations, protocol.upper())
        self._session = ""
        self._engine: Any = None
        self._lengths: dict[int, int] = {}  # of what `allocate` made: address -> whole pieces

    def open(self, identity: str) -> None:
        """Join the config store, which a prefill instance opens where nobody has."""
        super().open(identity)
        engine, role = self._vendor.TransferEngine(), "Decode" if self.context.role == "decode" else "Prefill"
        device = int(self.context.device.partition(":")[2] or 0)
        if role == "Prefill" and (status := self._vendor.create_config_store(self._store_url)) != 0:
            self.context.log("no config store opened: another instance may have", url=self._store_url, status=status)
        host, said = reachable_address(self.door.host), list[str]()
        port = engine.get_rpc_port()  # 0: known once it has started
        with _own_words(said):
            status = engine.initialize(self._store_url, f"{host}:{port}", role, device, self._operation)
        if status != 0:
            reason = said[-1] if said else f"initialize returned {status}"
            raise BackendUnavailable("ascend", reason, f"check the NPU's driver and {self._store_url}")
        self._session, self._engine = f"{host}:{port or engine.get_rpc_port()}", engine

    def allocate(self, nbytes: int, device: str) -> Region | None:
        """Host memory in whole pieces. An NPU's comes from its own allocator, which aligns."""
        if device != "cpu":
            return None
        length = -(-nbytes // ALIGNMENT) * ALIGNMENT
        whole = np.frombuffer(mmap.mmap(-1, length + ALIGNMENT), dtype=np.uint8)
        start = -int(whole.ctypes.data) % ALIGNMENT
        region = host_region(whole[start : start + nbytes].data)
        self._lengths[region.address] = length
        return region

    def register(self, regions: Sequence[Region]) -> None:
        """All in one call: another would not be taken."""
        lengths = [self._lengths.get(region.address, region.nbytes) for region in regions]
        for region, length in zip(regions, lengths, strict=True):
            if region.address % ALIGNMENT or length % ALIGNMENT:
                raise TransferError(f"a region of {region.nbytes} bytes at {region.address:#x} is not 2 MiB aligned")
        table: dict[int, int] = {}  # the same memory may be several regions
        for region, length in zip(regions, lengths, strict=True):
            table[region.address] = max(length, table.get(region.address, 0))
        status = self._engine.batch_register_memory(list(table), list(table.values()))
        if status != 0:
            raise TransferError(f"the library registered no memory: {status}")
        super().register(regions)

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(Descriptor(self.identity, self._session, self.door.address, self.table))

    def connect(self, descriptor: bytes) -> Peer:
        """Raises TransferError for a foreign descriptor, PeerLost for a peer that is gone, hangs or refuses."""
        there = decode(descriptor, Descriptor)
        call = self.call(there.identity, there.address)
        call.answer()
        target = Target(there.identity, call, there.session, there.regions)
        self.receivers.add(target)
        return target

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        """One call for all spans; it returns when they are applied."""
        assert isinstance(peer, Target)
        if end := peer.call.end:  # it takes no more: let it know that nothing is under way
            peer.call.close()
            raise PeerLost(peer.identity, end)
        sources, targets = self.ends(spans, peer.regions)
        if len(spans):
            lists = sources.tolist(), targets.tolist(), spans[:, 4].tolist()
            status = self._engine.batch_transfer_sync_write(peer.session, *lists)
            if status != 0:
                raise PeerLost(peer.identity, f"a write failed: {status}")
        return peer

    def poll(self, ticket: Ticket) -> bool:
        return True  # a post that raised has no ticket

    def expel(self, identity: str) -> bool:
        """True when the sender has closed its connection or died: nothing can stop one that lives."""
        quiet = self.door.expel(identity)
        self.context.log("expelled", sender=identity, quiet=quiet)
        return quiet

    def close(self) -> None:
        super().close()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.destroy()
            engine.unInitialize()


@contextlib.contextmanager
def _own_words(said: list[str]) -> Iterator[None]:
    """Collect the errors that the library prints to standard output, where it also stays.

    Most telling last: what it says of the driver.
    """
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as stack:
        kept = os.dup(1)
        stack.callback(os.close, kept)
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            file.seek(0)
            text = file.read()
            os.write(1, text)
            lines = [line for line in text.decode(errors="replace").splitlines() if " error " in line.lower()]
            said += sorted((line.rpartition("] ")[2] for line in lines), key=lambda line: "driver" in line)
