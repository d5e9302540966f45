"""What backends share that keep a connection from each sender to each receiver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar, cast

from pd.abc.doors import Call, Caller, Door
from pd.abc.transfer import U64, BackendContext, BackendDefaults, Peer, Region, Spans, addresses


@dataclass(eq=False)
class Receiver:
    """A sender's end, which `connect` returns. A backend adds what its engine needs."""

    identity: str
    call: Call


R = TypeVar("R", bound=Receiver)


class ConnectedBackend(BackendDefaults, Generic[R]):
    """For an engine that knows neither strangers nor peers that leave: see `pd.abc.doors`.

    A subclass says under which name it is registered. Its `connect` makes a call with `call` and keeps what it returns
    in `receivers`. `admit` and `leave` are the door's, for what it keeps of a sender.
    """

    name: ClassVar[str]

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self.identity = ""
        self.regions: list[Region] = []
        self.table: list[tuple[int, int]] = []  # address and bytes of each region
        self.receivers: set[R] = set()  # changed by any thread, in single steps
        self._door: Door | None = None

    @property
    def door(self) -> Door:
        assert self._door is not None, "not open"
        return self._door

    def open(self, identity: str) -> None:
        """Bind the package's own port. Nobody is answered before `register`."""
        self.identity = identity
        self._door = Door(self.context, self.name, identity, self.admit, self.leave)

    def register(self, regions: Sequence[Region]) -> None:
        """Last in a subclass's own: senders come from now on."""
        self.regions = list(regions)
        self.table = [(region.address, region.nbytes) for region in regions]
        self.door.start()

    def admit(self, caller: Caller) -> bytes:
        return b""

    def leave(self, caller: Caller) -> None:
        """Nothing is kept of a sender."""

    def call(self, receiver: str, address: tuple[str, int], words: bytes = b"") -> Call:
        return Call(self.context, self.name, self.identity, receiver, address, words)

    def ends(self, spans: Spans, remote: Sequence[tuple[int, int]]) -> tuple[U64, U64]:
        """Addresses at which spans begin here and there, given the peer's table.

        Raises TransferError for spans outside the regions of either side.
        """
        here = addresses(spans[:, 0], spans[:, 1], spans[:, 4], self.table, "local")
        return here, addresses(spans[:, 2], spans[:, 3], spans[:, 4], remote, "remote")

    def reset_peer(self, peer: Peer) -> None:
        """Last in a subclass's own: the closed connection tells the receiver that nothing is under way."""
        receiver = cast(R, peer)
        receiver.call.close()
        self.receivers.discard(receiver)

    def close(self) -> None:
        for receiver in list(self.receivers):
            self.reset_peer(receiver)
        if self._door is not None:
            self._door.close()
