"""What both sides of the hand-off share: identity, settings, notices, the transition table, who sends to whom."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from pd import messages as m
from pd.scheduler.actions import Level, Log
from pd.types import HandoffId, SamplingParams

MAX_ATTEMPTS = 256  # HandoffId.tag keeps eight bits of the attempt
MAX_REMAINING_MS = 1 << 31
MAX_RID = 256  # characters of a peer's request id that a log line repeats


def ints(raw: bytes) -> list[int]:
    """A `…_i32` field as a list. Raises ValueError when it is not a whole number of int32."""
    return np.frombuffer(raw, "<i4").tolist()


def to_i32(values: Sequence[int]) -> bytes:
    return np.asarray(values, "<i4").tobytes()


def to_u64(values: Sequence[int]) -> bytes:
    return np.asarray(values, "<u8").tobytes()


# --- identity and settings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalIdentity:
    """What this instance says of itself in Hello or Welcome, and what it compares a peer with."""

    instance: str
    incarnation: int
    fingerprint: str
    block_tokens: int
    layout: str
    digest: str
    transfer: str
    ranks: Sequence[m.RankInfo]
    groups: Sequence[m.KvGroup]
    lanes: int = 1
    http: str = ""
    vocab_size: int = 1 << 31  # token ids that peers send lie below

    @property
    def local_ranks(self) -> frozenset[int]:
        return frozenset(rank.rank for rank in self.ranks)


@dataclass(frozen=True)
class HandoffConfig:
    """Times in seconds. Those that have a setting of their own carry its name."""

    heartbeat_interval: float = 5.0
    heartbeat_max_failure: int = 2
    #: A heartbeat that is late by less is not missed: each side looks at its clock from time to time only.
    heartbeat_grace: float = 0.5
    connect_timeout: float = 3.0
    waiting_timeout: float = 300.0
    step_timeout: float = 60.0
    #: Decode: after a Cancel a willing peer gets this long to answer before its grant is revoked under it: a push that
    #: meets a revoked grant fails, and a failed push costs the sender a reset of all its pushes to this instance.
    revoke_grace: float = 1.0
    #: Decode: how often Cancel is repeated and expel is tried again.
    expel_retry: float = 1.0
    #: Decode: a sender without a session for this long is shut out for good when blocks wait for it. Final for its
    #: incarnation, therefore not at once.
    expel_after: float = 30.0
    reconnect_first: float = 0.5
    reconnect_most: float = 8.0
    #: After a mismatch, which only a restart of one side ends.
    mismatch_backoff: float = 30.0
    #: Decode: after Refused(busy) a peer that sends no new credit is left alone for this long.
    busy_backoff: float = 0.5
    #: Prefill: stopped writes that have not ended after this long are ended by a reset of their peer.
    reset_after: float = 1.0
    #: Prefill: after a reset, bytes that were handed to the network may still land for this long: Cancelled waits.
    reset_linger: float = 1.0
    #: Prefill: least time between two unscheduled heartbeats to one peer.
    status_interval: float = 0.05
    #: Prefill: how many closed ids are remembered.
    remember: int = 4096

    def longest_silence(self, interval: float) -> float:
        """Of a peer that sends a heartbeat every `interval` seconds; one that is silent for longer is lost."""
        return interval * self.heartbeat_max_failure + self.heartbeat_grace


# --- the transition table -------------------------------------------------------------------------------------------


class UndefinedTransition(Exception):
    """An event met a state for which the table has no entry."""

    def __init__(self, state: enum.Enum, event: enum.Enum) -> None:
        self.state, self.event = state, event
        super().__init__(f"{event.name} in state {state.name}")


S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)


@dataclass(frozen=True)
class Table(Generic[S, E]):
    """(state, event) -> name of the handler, a method of the machine; also for what is ignored or only counted."""

    states: type[S]
    events: type[E]
    rows: Mapping[tuple[S, E], str]

    @classmethod
    def build(cls, states: type[S], events: type[E], rows: Mapping[S, Mapping[str, str]]) -> Table[S, E]:
        """`rows`: state -> {"EVENT EVENT …": handler}. An event that is named twice for a state is an error."""
        flat: dict[tuple[S, E], str] = {}
        for state, entries in rows.items():
            for names, handler in entries.items():
                for name in names.split():
                    pair = (state, events[name])
                    if pair in flat:
                        raise ValueError(f"{name} in state {state.name} is defined twice")
                    flat[pair] = handler
        return cls(states, events, flat)

    def undefined(self) -> list[tuple[S, E]]:
        return [(s, e) for s in self.states for e in self.events if (s, e) not in self.rows]

    def bind(self, machine: object) -> Callable[[S, E], Callable[..., None]]:
        """The lookup for one machine; raises UndefinedTransition."""
        bound = {pair: getattr(machine, name) for pair, name in self.rows.items()}

        def handler(state: S, event: E) -> Callable[..., None]:
            found = bound.get((state, event))
            if found is None:
                raise UndefinedTransition(state, event)
            return found

        return handler


# --- decode: what the scheduler asks, and what it is told -----------------------------------------------------------


class ChoiceKind(enum.Enum):
    READY = "ready"
    WAIT = "wait"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Choice:
    """READY names an endpoint that can be asked now; WAIT and NONE say why not."""

    kind: ChoiceKind
    endpoint: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AskSpec:
    """Everything of a Prefill but its id and destinations. `deadline` is a local monotonic time.

    `tail_tokens` counts the valid ones in the last granted block. `candidates` are the endpoints that may be asked next
    with the same grant when this one refuses.
    """

    tokens_i32: bytes
    prompt_len: int
    sampling: SamplingParams
    first_block: int
    deadline: float
    tail_tokens: int
    choices: int = 1
    logprob_start: int = -1
    prompt_top_logprobs: int = 0
    priority: int = 0
    salt: str = ""
    room: int = -1
    candidates: tuple[str, ...] = ()
    rid: str = ""

    @property
    def tokens(self) -> int:
        return len(self.tokens_i32) // 4

    @property
    def emitted(self) -> int:
        """Tokens that the request has emitted before: more than 0 in a replay."""
        return self.tokens - self.prompt_len

    def prefill(self, now: float, id: HandoffId, dest: m.Dest) -> m.Prefill:
        left = min(self.deadline - now, MAX_REMAINING_MS / 1000)
        return m.Prefill(
            id=id,
            tokens_i32=self.tokens_i32,
            prompt_len=self.prompt_len,
            sampling=self.sampling,
            first_block=self.first_block,
            dests=[dest],
            remaining_ms=max(1, int(left * 1000)),
            choices=self.choices,
            logprob_start=self.logprob_start,
            prompt_top_logprobs=self.prompt_top_logprobs,
            priority=self.priority,
            salt=self.salt,
            room=self.room,
            rid=self.rid,
        )


@dataclass(frozen=True, slots=True)
class FirstTokenCame:
    key: int
    id: HandoffId
    message: m.FirstToken


@dataclass(frozen=True, slots=True)
class Ready:
    """Landed, fenced and verified: the request owns `blocks` (one reference each); digests are in `pool.digest`."""

    key: int
    id: HandoffId
    blocks: list[int]
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """The request is free to try again; the grant stays with the machine until it is quiet."""

    key: int
    id: HandoffId
    endpoint: str
    reason: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class GrantReturned:
    """Nothing was ever written: `blocks` are free again. Every endpoint in `tried` refused."""

    key: int
    reason: str
    blocks: list[int]
    tried: tuple[str, ...] = ()


DecodeNotice: TypeAlias = FirstTokenCame | Ready | AttemptFailed | GrantReturned


# --- prefill: what the scheduler is told ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """Queue it. Ends with exactly one SourceFree; a Stop before that means that no result is wanted any more."""

    id: HandoffId
    session: int
    message: m.Prefill
    deadline: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop computing, push nothing more."""

    id: HandoffId
    reason: str


@dataclass(frozen=True, slots=True)
class SourceFree:
    """No write reads this hand-off's source blocks any more, and none will."""

    id: HandoffId


@dataclass(frozen=True, slots=True)
class RoomAnswered:
    session: int
    message: m.Answered


@dataclass(frozen=True, slots=True)
class RoomExpected:
    session: int
    room: int


@dataclass(frozen=True, slots=True)
class RoomsLost:
    """A session that has spoken of rooms is over."""

    session: int
    reason: str


PrefillNotice: TypeAlias = Accepted | Stop | SourceFree | RoomAnswered | RoomExpected | RoomsLost

#: Why a hand-off fails whose prefill leg was dropped: by then the client has left both.
LEG_DROPPED = "the client of its prefill leg has gone"

#: Why a hand-off failed whose request asks for what no output can be: its client's error.
UNCONSTRAINABLE = "the output cannot be constrained"


# --- life-cycle lines -------------------------------------------------------------------------------------------------


def handoff_log(event: str, rid: str, id: HandoffId, level: Level = "info", **fields: object) -> Log:
    """Both sides name a hand-off alike, by its request's id and by its tag, so that their lines can be joined."""
    return Log(event, (("rid", rid), ("handoff", f"{id.tag:x}"), *fields.items()), level)


def millis(seconds: float) -> float:
    """As log lines show times."""
    return round(1e3 * seconds, 3)


# --- who sends to whom ----------------------------------------------------------------------------------------------


def source_ranks(senders: Sequence[m.RankInfo], receiver: m.RankInfo) -> tuple[int, ...] | None:
    """Ranks that send to `receiver`: one source, the lowest rank, per (layer, kv head). None: a piece has no source."""
    used: set[int] = set()
    for layer in range(*receiver.layers):
        for head in range(*receiver.kv_heads):
            holders = [
                s.rank for s in senders if s.layers[0] <= layer < s.layers[1] and s.kv_heads[0] <= head < s.kv_heads[1]
            ]
            if not holders:
                return None
            used.add(min(holders))
    return tuple(sorted(used))


def sending_ranks(senders: Sequence[m.RankInfo], receivers: Sequence[m.RankInfo]) -> dict[int, str] | None:
    """Sending rank -> identity, over all receiving ranks; None when a receiver's slice has no source."""
    used: set[int] = set()
    for receiver in receivers:
        ranks = source_ranks(senders, receiver)
        if not ranks:
            return None
        used.update(ranks)
    return {s.rank: s.identity for s in senders if s.rank in used}


@dataclass
class Counts:
    """What /metrics shows: hand-offs by outcome, messages that came too late or from the wrong incarnation, bytes."""

    outcomes: dict[str, int] = field(default_factory=dict)
    stale: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0

    def outcome(self, name: str) -> None:
        self.outcomes[name] = self.outcomes.get(name, 0) + 1

    def late(self, what: Any) -> None:
        """`what`: the message, or a name of its kind; few of them, since each becomes a label."""
        name = what if isinstance(what, str) else type(what).__name__
        self.stale[name] = self.stale.get(name, 0) + 1


def first_counter(name: str) -> int:
    """Where an instance's numbering starts, so that the numbers of two instances do not meet: 32 bits of its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") << 22
