"""The decode side's states, events and transitions, and what is known of one attempt."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pd import messages as m
from pd.scheduler.actions import Level, Log
from pd.scheduler.blocks import BlockPool
from pd.scheduler.decode_peers import NEVER, Sender
from pd.scheduler.handoff_base import MAX_ATTEMPTS, AskSpec, Table, handoff_log, to_i32, to_u64
from pd.types import HandoffId

MASK = 0xFFFFFFFFFFFFFFFF
REMEMBERED_KEYS = 1 << 16


class DecodeState(enum.Enum):
    ASKED = "asked"
    LANDING = "landing"
    VERIFYING = "verifying"
    DRAINING = "draining"
    QUARANTINED = "quarantined"
    CLOSED = "closed"


class DecodeEvent(enum.Enum):
    """`LEFT`: the request does not want it any more. `OVER`: a new Welcome of the same incarnation does not list it."""

    FIRST_TOKEN = "first token"
    LANDED = "landed"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    LEFT = "left"
    EXPIRED = "expired"
    REVOKED = "revoked"
    VERIFIED = "verified"
    EXPELLED = "expelled"
    OVER = "over"


#: What a prefill instance says of a hand-off, as an event.
PEER_EVENTS: dict[type, DecodeEvent] = {
    m.FirstToken: DecodeEvent.FIRST_TOKEN,
    m.Landed: DecodeEvent.LANDED,
    m.Refused: DecodeEvent.REFUSED,
    m.Failed: DecodeEvent.FAILED,
    m.Cancelled: DecodeEvent.CANCELLED,
}

_S = DecodeState

DECODE_TABLE: Table[DecodeState, DecodeEvent] = Table.build(
    DecodeState,
    DecodeEvent,
    {
        _S.ASKED: {
            "FIRST_TOKEN": "_first_token",
            "LANDED": "_landed",
            "REFUSED": "_refused",
            "FAILED": "_failed",
            "CANCELLED": "_given_up",
            "LOST": "_lost",
            "LEFT": "_left",
            "EXPIRED": "_expired",
            "REVOKED VERIFIED EXPELLED OVER": "_stale",
        },
        _S.LANDING: {
            "FIRST_TOKEN": "_first_token",
            "LANDED": "_landed",
            "REFUSED": "_contradicted",
            "FAILED": "_failed",
            "CANCELLED": "_given_up",
            "LOST": "_lost",
            "LEFT": "_left",
            "EXPIRED": "_expired",
            "REVOKED VERIFIED EXPELLED OVER": "_stale",
        },
        _S.VERIFYING: {  # every rank has landed: no write is left, whatever is said now
            "LANDED": "_landed_again",
            "FIRST_TOKEN REFUSED FAILED CANCELLED REVOKED": "_stale",
            "LOST EXPELLED OVER": "_ignore",
            "LEFT": "_left_verifying",
            "EXPIRED": "_expired_verifying",
            "VERIFIED": "_verified",
        },
        _S.DRAINING: {
            "FIRST_TOKEN FAILED": "_ignore",
            "LANDED": "_landed_draining",
            "REFUSED CANCELLED OVER": "_quiet",
            "LOST": "_lost_draining",
            "LEFT EXPIRED": "_ignore",
            "VERIFIED": "_stale",
            "REVOKED EXPELLED": "_rank_quiet",
        },
        _S.QUARANTINED: {
            "FIRST_TOKEN FAILED": "_ignore",
            "LANDED": "_landed_draining",
            "REFUSED CANCELLED OVER": "_quiet",
            "LOST LEFT EXPIRED": "_ignore",
            "VERIFIED": "_stale",
            "REVOKED EXPELLED": "_rank_quiet",
        },
        _S.CLOSED: {
            "LANDED": "_landed_again",
            "FIRST_TOKEN REFUSED FAILED CANCELLED VERIFIED": "_stale",
            "REVOKED": "_ignore",  # the answer to the clean-up of a closed grant
            "LOST LEFT EXPIRED EXPELLED OVER": "_ignore",
        },
    },
)


@dataclass(eq=False)
class Attempt:
    """`unquiet`: sender identity -> local ranks on which a write of it may still land. Empty means quiet.

    `digests`: per sending rank, as its Landed said. `counted`: it is part of its peer's `asked`. `deadline` is the
    spec's until a token comes.
    """

    id: HandoffId
    key: int
    spec: AskSpec
    blocks: list[int]
    generations: list[int]
    sender: Sender
    endpoint: str
    asked_at: float
    state: DecodeState = DecodeState.ASKED
    tried: tuple[str, ...] = ()
    first_token: bool = False
    digests: dict[int, list[int]] = field(default_factory=dict)
    nbytes: int = 0
    unquiet: dict[str, set[int]] = field(default_factory=dict)
    counted: bool = True
    answers: int = 0  # TransferVerified still to come
    computed: list[int] = field(default_factory=list)  # sums over local ranks, when several had to compute
    problem: str = ""
    revoked: set[str] = field(default_factory=set)  # senders whose grants are gone at every local rank
    revoke_at: float = NEVER
    cancel_at: float = NEVER
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = self.spec.deadline

    def log(self, event: str, level: Level = "info", /, **fields: object) -> Log:
        return handoff_log(event, self.spec.rid, self.id, level, prefill=self.endpoint, **fields)

    def rank_landed(self, message: m.Landed) -> None:
        """One sending rank's writes are done; a second report of it changes nothing."""
        identity = self.sender.ranks.get(message.rank)
        if identity is not None and message.rank not in self.digests:
            self.unquiet.pop(identity, None)
            self.digests[message.rank] = np.frombuffer(message.digests_u64, "<u8").tolist()
            self.nbytes += message.nbytes

    def block_digests(self) -> list[int]:
        """Sums over the sending ranks, modulo 2**64: slices add up to blocks."""
        sums = [0] * len(self.blocks)
        for values in self.digests.values():
            for index, value in enumerate(values):
                sums[index] = (sums[index] + value) & MASK
        return sums

    def verify(self, page: int, local_ranks: int) -> list[m.TransferVerify]:
        """Orders to fence every sender and to compare the digests, here if one rank sent to one, else by `verified`."""
        identities, tag = list(self.sender.ranks.values()), self.id.tag
        tokens = to_i32([page] * (len(self.blocks) - 1) + [self.spec.tail_tokens])
        digests = to_u64(self.block_digests()) if len(identities) == local_ranks == 1 else b""
        self.answers = len(identities) * local_ranks
        last = m.TransferVerify(identities[-1], tag, to_i32(self.blocks), tokens, digests)
        return [*(m.TransferVerify(identity, tag, b"", b"", b"") for identity in identities[:-1]), last]

    def verified(self, event: m.TransferVerified, local_ranks: int) -> bool:
        """Note one answer in `problem`; True when it was the last one."""
        self.answers -= 1
        self.problem = self.problem or event.error or ("digest mismatch" if event.bad_i32 else "")
        if event.digests_u64:
            mine = np.frombuffer(event.digests_u64, "<u8")
            self.computed = (mine + np.asarray(self.computed or [0] * len(mine), "<u8")).tolist()
        if self.answers:
            return False
        several = len(self.sender.ranks) > 1 or local_ranks > 1
        if several and not self.problem and self.computed and self.computed != self.block_digests():
            self.problem = "digest mismatch"
        return True


class Counters:
    """Numbers for hand-offs: the attempts of one request share a counter, and no number is used twice."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._of: OrderedDict[int, tuple[int, int]] = OrderedDict()  # request -> (counter, next attempt)

    def next(self, key: int, counter: int | None = None) -> tuple[int, int]:
        """(counter, attempt). A request that was forgotten, or that used up its attempts, gets a new counter."""
        number, attempt = self._of.pop(key, (-1, 0))
        if number < 0 or attempt >= MAX_ATTEMPTS or counter not in (None, number):
            number, attempt = self._next, 0
            self._next += 1
        self._of[key] = (number, attempt + 1)
        if len(self._of) > REMEMBERED_KEYS:
            self._of.popitem(last=False)
        return number, attempt


@dataclass(frozen=True)
class DecodeAudit:
    states: dict[str, list[HandoffId]]
    incoming: frozenset[int]


def audit_attempts(attempts: Iterable[Attempt], pool: BlockPool) -> DecodeAudit:
    """Every granted block is granted once and in the pool's right state, and no other block is."""
    states: dict[str, list[HandoffId]] = {}
    held: set[int] = set()
    for attempt in attempts:
        states.setdefault(attempt.state.value, []).append(attempt.id)
        wanted = "quarantined" if attempt.state is DecodeState.QUARANTINED else "incoming"
        for block in attempt.blocks:
            assert block not in held, f"block {block} is granted twice"
            assert pool.state_of(block) == wanted, f"block {block}: {pool.state_of(block)}, not {wanted}"
            held.add(block)
    counts = pool.audit()
    assert counts["incoming"] + counts["quarantined"] == len(held), f"{counts} but {len(held)} are granted"
    return DecodeAudit(states, frozenset(held))
