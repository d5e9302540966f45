"""Notices a runner whose transfer threads hang: a command that must be answered is not.

A push may wait for its peer and has a deadline of its own, and nobody answers a grant or a cancel; everything else is
answered at once, whatever has become of the peer. Without an answer blocks would be held for ever, here or there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from pd import messages as m

#: (command, sender or receiver, tag or 0)
_Key: TypeAlias = tuple[type[m.Message], str, int]


@dataclass(slots=True)
class _Awaited:
    at: float
    ranks: set[int]


class TransferWatch:
    """Commands without an answer, oldest first; there are no more of them than hand-offs and peers.

    Each thread answers in order, so the time of a command that waits behind others counts from the answer to the last
    one of those: many slow answers in a row are no hang.
    """

    def __init__(self, ranks: Iterable[int], bound: float) -> None:
        """`ranks`: the local ones, all of which answer; `bound`: the longest time for one answer, seconds."""
        self._ranks, self._bound = frozenset(ranks), bound
        self._awaited: OrderedDict[_Key, _Awaited] = OrderedDict()
        self._first_since = 0.0  # when the oldest became the oldest

    def __len__(self) -> int:
        return len(self._awaited)

    def sent(self, now: float, command: m.TransferCommand) -> None:
        """A repeated command waits as long as the first."""
        match command:
            case m.TransferConnect(peer) | m.TransferResetPeer(peer):
                key: _Key = (type(command), peer, 0)
            case m.TransferRevoke(sender, tag) | m.TransferVerify(sender, tag):
                key = (type(command), sender, tag)
            case m.TransferExpel(sender):
                key = (type(command), sender, 0)
            case _:
                return
        if key not in self._awaited:
            self._awaited[key] = _Awaited(now, set(self._ranks))

    def answered(self, now: float, event: m.TransferEvent) -> None:
        match event:
            case m.TransferConnected() | m.TransferPeerLost():
                self._answer(now, (m.TransferConnect, event.peer, 0), event.rank)
            case m.TransferReset():
                self._answer(now, (m.TransferResetPeer, event.peer, 0), event.rank)
            case m.TransferRevoked():
                self._answer(now, (m.TransferRevoke, event.sender, event.tag), event.rank)
            case m.TransferVerified():
                self._answer(now, (m.TransferVerify, event.sender, event.tag), event.rank)
            case m.TransferExpelled():
                self._answer(now, (m.TransferExpel, event.sender, 0), event.rank)

    def _answer(self, now: float, key: _Key, rank: int) -> None:
        awaited = self._awaited.get(key)
        if awaited is None:
            return
        awaited.ranks.discard(rank)
        if not awaited.ranks:
            if next(iter(self._awaited)) == key:
                self._first_since = now
            del self._awaited[key]

    def problem(self, now: float, since: float = 0.0) -> str:
        """Why the runner is taken for dead, or ""; it could not answer before `since`."""
        for (command, peer, _), awaited in self._awaited.items():
            if now - max(awaited.at, self._first_since, since) > self._bound:
                return f"the transfer thread has not answered {command.__name__} of {peer} for {self._bound:g} s"
            break
        return ""
