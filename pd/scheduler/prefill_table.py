"""The prefill side's states, events and transitions, and what is known of one hand-off and one push."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pd import messages as m
from pd.scheduler.actions import Level, Log
from pd.scheduler.handoff_base import MAX_RID, Table, handoff_log, ints, millis
from pd.scheduler.prefill_peers import PrefillPeers, Receiver, Session
from pd.types import HandoffId, InstanceState


class PrefillState(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPUTED = "computed"
    LANDED = "landed"
    STOPPING = "stopping"
    CLOSED = "closed"


class PrefillEvent(enum.Enum):
    """`BROKEN`: a push failed and is not quiet. `DROPPED`: a push failed before it started. `RESET`: one was ended."""

    PREFILL = "prefill"
    CANCEL = "cancel"
    ACK = "ack"
    STARTED = "started"
    FIRST_TOKEN = "first token"
    COMPUTED = "computed"
    FAIL = "fail"
    PUSHED = "pushed"
    BROKEN = "broken"
    DROPPED = "dropped"
    RESET = "reset"
    LOST = "lost"


_S = PrefillState
_ACTIVE = {
    "PREFILL ACK": "_stale",
    "CANCEL": "_cancelled",
    "FIRST_TOKEN": "_first_token",
    "FAIL": "_fail",
    "PUSHED": "_land_if_done",
    "BROKEN": "_broken",
    "DROPPED RESET": "_dropped",
    "LOST": "_lost",
}

PREFILL_TABLE: Table[PrefillState, PrefillEvent] = Table.build(
    PrefillState,
    PrefillEvent,
    {
        _S.QUEUED: {**_ACTIVE, "STARTED": "_started", "COMPUTED": "_computed"},
        _S.RUNNING: {**_ACTIVE, "STARTED": "_ignore", "COMPUTED": "_computed"},
        _S.COMPUTED: {**_ACTIVE, "STARTED COMPUTED": "_stale"},
        _S.LANDED: {
            "CANCEL": "_cancel_closed",  # no write is left: Cancelled is true as well
            "ACK LOST": "_close",
            "PREFILL STARTED FIRST_TOKEN COMPUTED PUSHED BROKEN DROPPED RESET": "_stale",
            "FAIL": "_ignore",
        },
        _S.STOPPING: {
            "CANCEL LOST": "_ignore",  # Cancelled follows anyway
            "PREFILL ACK": "_stale",
            "STARTED FIRST_TOKEN COMPUTED FAIL": "_ignore",  # the scheduler has not taken its notices yet
            "PUSHED DROPPED": "_close_if_quiet",
            "RESET": "_settle",
            "BROKEN": "_ignore",  # its reset follows when it is due
        },
        _S.CLOSED: {
            "PREFILL": "_prefill_closed",
            "CANCEL": "_cancel_closed",
            "ACK PUSHED BROKEN DROPPED": "_stale",
            "STARTED FIRST_TOKEN COMPUTED FAIL RESET LOST": "_ignore",
        },
    },
)

#: Why a hand-off whose time is over fails.
EXPIRED = "the request's deadline passed"

COMPUTING = (PrefillState.QUEUED, PrefillState.RUNNING)
LIVE = (*COMPUTING, PrefillState.COMPUTED)


@dataclass(eq=False)
class Handoff:
    """`missing`: destination blocks not pushed yet. `digests`: per sending rank, or for the only one under None."""

    id: HandoffId
    session: Session
    tokens: int
    dests: list[int]
    deadline: float
    rid: str = ""
    state: PrefillState = PrefillState.QUEUED
    missing: set[int] = field(default_factory=set)
    pushes: set[int] = field(default_factory=set)
    first_sent: bool = False
    queued: bool = True  # counted in its session's `queued`
    digests: Mapping[int, Sequence[int]] = field(default_factory=dict)
    nbytes: dict[int, int] = field(default_factory=dict)
    stopped_at: float = 0.0
    quiet_at: float = 0.0  # not closed before
    source_free: bool = False
    computed_at: float = 0.0
    pushed: list[tuple[float, float]] = field(default_factory=list)  # begin and end of each push

    def overdue(self, now: float) -> bool:
        """Once the first token is sent the decode instance alone knows the deadline: a token may move it."""
        return self.state in LIVE and not self.first_sent and now >= self.deadline

    def took(self, now: float) -> dict[str, float]:
        """Milliseconds in which its pushes were under way, and from the end of its last step to now, when it landed.

        The runner begins the last chunk's push as soon as it is computed, and may have done before its step's result
        is here: the earlier of the two counts.
        """
        last = max((begin for begin, _ in self.pushed), default=self.computed_at)
        after = now - min(last, self.computed_at)
        return {"push_ms": millis(covered(self.pushed)), "after_compute_ms": millis(after)}

    def log(self, event: str, level: Level = "info", /, **fields: object) -> Log:
        return handoff_log(event, self.rid, self.id, level, decode=self.session.hello.instance, **fields)


def new_handoff(now: float, session: Session, message: m.Prefill) -> Handoff:
    """Of a Prefill that is accepted."""
    dests = ints(message.dests[0].blocks_i32)
    deadline, tokens = now + message.remaining_ms / 1000, len(message.tokens_i32) // 4
    return Handoff(message.id, session, tokens, dests, deadline, message.rid[:MAX_RID], missing=set(range(len(dests))))


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of these was under way."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


class ClosedIds:
    """The latest `limit` hand-offs that are over, each with what refused it (None: nothing did)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._answers: OrderedDict[HandoffId, m.Refused | None] = OrderedDict()

    def __contains__(self, id: HandoffId) -> bool:
        return id in self._answers

    def answer(self, id: HandoffId) -> m.Refused | None:
        return self._answers.get(id)

    def remember(self, id: HandoffId, answer: m.Refused | None = None) -> None:
        self._answers[id] = answer
        if len(self._answers) > self._limit:
            self._answers.popitem(last=False)


@dataclass(eq=False)
class PushState:
    """`awaited`: sending ranks that have not reported. `riding`: not known to be with the runner yet."""

    handoff: Handoff
    receiver: Receiver
    awaited: set[int]
    riding: bool
    step: int | None
    created: float


class Pushes:
    """Every push that has not ended. Its number is unique over all receivers; tags of two receivers may be equal."""

    def __init__(self, step_timeout: float) -> None:
        self._step_timeout = step_timeout
        self._pushes: dict[int, PushState] = {}
        self._boarding: list[PushState] = []
        self._next = 0

    def __getitem__(self, index: int) -> PushState:
        return self._pushes[index]

    def add(self, now: float, handoff: Handoff, receiver: Receiver, *, riding: bool) -> int:
        index = self._next
        self._next += 1
        push = self._pushes[index] = PushState(handoff, receiver, set(receiver.sources), riding, None, now)
        handoff.pushes.add(index)
        receiver.pushes.add(index)
        if riding:
            self._boarding.append(push)
        return index

    def find(self, event: m.TransferPushed | m.TransferFailed) -> PushState | None:
        """The push that a sending rank reports about, if that report is awaited."""
        push = self._pushes.get(event.index)
        if push is None or push.handoff.id.tag != event.tag or event.rank not in push.awaited:
            return None
        return push

    def of(self, index: int) -> Handoff | None:
        push = self._pushes.get(index)
        return push.handoff if push is not None else None

    def end(self, index: int) -> PushState:
        push = self._pushes.pop(index)
        push.handoff.pushes.discard(index)
        push.receiver.pushes.discard(index)
        return push

    def ordered(self, step: int) -> None:
        for push in self._boarding:
            push.step = step
        self._boarding.clear()

    def step_done(self, step: int) -> None:
        for push in self._pushes.values():
            if push.riding and push.step is not None and push.step <= step:
                push.riding = False

    def posted(self, now: float, index: int) -> bool:
        """A riding push is with the runner when its step is done: told, or past the longest step."""
        push = self._pushes[index]
        return not push.riding or now >= push.created + self._step_timeout

    def audit(self) -> None:
        for index, push in self._pushes.items():
            known = index in push.handoff.pushes and index in push.receiver.pushes
            assert known, f"push {index} of {push.handoff.id} is not known to its hand-off and its receiver"


def problem_of(message: m.Prefill, page: int, incarnation: int) -> str:
    """What is wrong with a peer's request; block ids are bounds-checked where they are used, by the receiver."""
    if message.id.incarnation != incarnation:
        return "id: of another incarnation"
    if len(message.tokens_i32) % 4 or not message.tokens_i32:
        return "tokens_i32: not a positive number of int32"
    tokens = len(message.tokens_i32) // 4
    blocks = -(-tokens // page)
    if not 0 <= message.first_block < blocks:
        return f"first_block: {message.first_block} of {blocks} blocks"
    if not 1 <= message.prompt_len <= tokens:
        return f"prompt_len: {message.prompt_len} of {tokens} tokens"
    if message.remaining_ms <= 0:
        return f"remaining_ms: {message.remaining_ms}"
    if not 1 <= message.choices <= 255:
        return f"choices: {message.choices}"
    if len(message.dests) != 1 or (message.dests[0].lane, message.dests[0].group) != (0, 0):
        return "dests: one lane and one group"
    dest, wanted = message.dests[0], 4 * (blocks - message.first_block)
    if len(dest.blocks_i32) != wanted or len(dest.generations_i32) != wanted:
        return f"dests: {len(dest.blocks_i32) // 4} blocks where {wanted // 4} are needed"
    ids = ints(dest.blocks_i32)
    if min(ids) < 1 or len(set(ids)) != len(ids):
        return "dests: a block is named twice or is not positive"
    return ""


def refusal_of(peers: PrefillPeers, accepting: bool, session: Session, message: m.Prefill) -> m.Refused | None:
    """Why a Prefill cannot be accepted now, or None."""
    problem = problem_of(message, peers.identity.block_tokens, session.hello.incarnation)
    if problem:
        return m.Refused(message.id, "mismatch", problem)
    if not accepting:
        return m.Refused(message.id, "draining")
    if peers.state is not InstanceState.READY:
        return m.Refused(message.id, "busy", "starting")
    if not peers.ready(session):
        return m.Refused(message.id, "busy", "the data connection is being made anew")
    if session.queued and len(message.tokens_i32) // 4 > peers.credit:
        return m.Refused(message.id, "busy", "no queue credit")
    return None


def refusal_log(session: Session, message: m.Prefill, refused: m.Refused) -> Log:
    return handoff_log(
        "handoff_refused",
        message.rid[:MAX_RID],
        message.id,
        decode=session.hello.instance,
        reason=refused.why,
        detail=refused.detail,
    )


def audit_handoffs(handoffs: Iterable[Handoff], pushes: Pushes, peers: PrefillPeers) -> dict[str, list[HandoffId]]:
    """Open hand-offs by state. Raises AssertionError when they disagree with the pushes or the sessions."""
    states: dict[str, list[HandoffId]] = {}
    queued: dict[int, int] = {}
    for h in handoffs:
        states.setdefault(h.state.value, []).append(h.id)
        assert not (h.state is PrefillState.LANDED and h.pushes), f"{h.id} landed with pushes in flight"
        assert all(pushes.of(i) is h for i in h.pushes), f"{h.id} has a push that is not known as its own"
        if h.queued:
            queued[h.session.id] = queued.get(h.session.id, 0) + h.tokens
    pushes.audit()
    for session in peers:
        counted = queued.get(session.id, 0)
        assert session.queued == counted, f"{session.queued} queued tokens, {counted} counted"
    return states
