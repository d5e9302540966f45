"""One request as the scheduler sees it, and the queue of those that wait."""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterator

from pd.messages import Finish, FirstChoice, PromptLogprobs, TokenLogprobs, TopLogprobs
from pd.types import FinishReason, HandoffId, SamplingParams

#: `Request.done` of a decoding request: the KV of every token but the last is computed by finished steps.
ALL_BUT_LAST = 1 << 60

#: A key is the api's own (worker << 40 | counter). A choice of several adds 1 + its index from this bit on.
CHOICE_SHIFT = 54
CLIENT_KEY = (1 << CHOICE_SHIFT) - 1


class State(enum.Enum):
    WAITING = "waiting"  # queued: new, or to be replayed
    ASKED = "asked"  # a prefill instance computes it (decode side)
    LANDING = "landing"  # one choice of several: emitted its first token, waits for the prompt's KV
    PREFILL = "prefill"  # its prompt is being computed here
    RUNNING = "running"  # decoding
    LEG = "leg"  # a foreign router's leg to a prefill instance: it waits for the hand-off of its room
    PUSHING = "pushing"  # prompt computed; its blocks are held until no push reads them (prefill side)
    GONE = "gone"


class Family:
    """A client's request with several choices.

    First there is only the `prompt`, a request that computes what all need. Its first tokens make the `members`, one
    request per choice, and it goes when its blocks have been shared out.
    """

    __slots__ = ("members", "prompt", "unwanted")

    def __init__(self, prompt: Request) -> None:
        self.prompt: Request | None = prompt
        self.members: dict[int, Request] = {}  # living choices by index
        self.unwanted: dict[int, Finish] = {}  # how choices end, by index, that were ended before they have begun


class Request:
    """Mutable, owned by the scheduler alone. A client's request, one choice of it, or a prompt with several choices.

    `tokens` is int32 bytes: prompt, then every emitted token. `ordered` counts tokens whose KV is computed by steps
    ordered so far; it runs ahead of the tokens known here by the steps in flight. `left` counts samples that may
    still be ordered. `epoch` rises whenever the request leaves the runner, so that late results are dropped.
    """

    __slots__ = (
        "age",
        "blocks",
        "cached",
        "capacity",
        "choice",
        "choices",
        "client_key",
        "deadline",
        "done",
        "emitted",
        "epoch",
        "extras",
        "family",
        "first_block",
        "handoff",
        "heard_at",
        "idle_timeout",
        "inserted",
        "key",
        "left",
        "leg",
        "logprob_start",
        "max_tokens",
        "ordered",
        "prefill_name",
        "prefills",
        "priority",
        "probe",
        "prompt_len",
        "prompt_logprobs",
        "prompt_top_logprobs",
        "remote",
        "replay",
        "rid",
        "room",
        "salt",
        "sampling",
        "started",
        "state",
        "stops",
        "tail_digests",
        "tokens",
        "tried",
        "worker",
    )

    def __init__(self, key: int, rid: str, tokens: bytes, prompt_len: int, sampling: SamplingParams) -> None:
        self.key, self.rid, self.prompt_len, self.sampling = key, rid, prompt_len, sampling
        self.client_key = key & CLIENT_KEY
        self.worker = self.client_key >> 40
        self.choice = sampling.choice
        self.family: Family | None = None
        self.tokens = bytearray(tokens)
        self.state = State.WAITING
        self.epoch = 0
        self.emitted = len(tokens) // 4 - prompt_len
        self.max_tokens = sampling.max_tokens
        self.stops = frozenset(sampling.stop_token_ids)
        self.left = 0
        self.ordered = 0
        self.done = 0
        self.capacity = 0
        self.blocks: list[int] = []
        self.extras: dict[int, int] = {}  # page -> equal block of the prefix tree, held besides our own
        self.inserted = 0
        self.cached = 0
        self.choices = 1  # to be sampled with the first token
        self.logprob_start = -1
        self.prompt_top_logprobs = 0
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.prefills: tuple[str, ...] = ()
        self.tried: dict[str, str] = {}  # endpoint -> why it is not asked again
        self.prefill_name = ""
        self.priority = 0
        self.probe = False
        self.salt = ""
        self.room = -1
        self.leg = ""  # decode side: endpoint of the prefill instance whose leg waits for this request's first token
        self.age = 0
        self.replay = False
        self.started = False
        self.deadline = float("inf")
        self.idle_timeout = float("inf")
        self.heard_at = 0.0
        self.handoff: HandoffId | None = None  # decode side: the attempt under way
        self.remote: HandoffId | None = None  # prefill side: whose request this is
        self.first_block = 0  # prefill side: the first prompt block that the decode instance wants
        self.tail_digests: dict[int, int] = {}  # prefill side: digest by prompt block index

    @property
    def known(self) -> int:
        """Tokens known here: prompt and emitted."""
        return len(self.tokens) // 4

    @property
    def client_rid(self) -> str:
        """The id of the client's request, also of one of its choices."""
        is_choice = self.family is not None and self.family.prompt is not self
        return self.rid.removesuffix(f"-{self.choice}") if is_choice else self.rid

    @property
    def slots(self) -> int:
        """Running slots that it takes or will take here."""
        return self.choices if self.remote is None else 1

    @property
    def expires(self) -> float:
        return min(self.deadline, self.heard_at + self.idle_timeout)

    def match_limit(self) -> int:
        """Most tokens that a prefix cache may supply: the last is computed, and so are wanted prompt logprobs."""
        limit = self.known - 1
        if self.logprob_start >= 0 and not self.started:
            limit = min(limit, max(0, self.logprob_start - 1))
        return limit

    def finish_of(self, token: int) -> Finish | None:
        """What `token`, just counted in `emitted`, means for the request."""
        if token in self.stops:  # the sampler masks them until `min_tokens`
            return Finish(FinishReason.STOP, stop_id=token)
        if self.emitted >= self.max_tokens:
            return Finish(FinishReason.LENGTH)
        return None

    def first_finish(self, token: int) -> Finish | None:
        """Prefill side: what D will make of the first token (not counted in `emitted` here)."""
        if token in self.stops:
            return Finish(FinishReason.STOP, stop_id=token)
        return Finish(FinishReason.LENGTH) if self.emitted + 1 >= self.max_tokens else None

    def merged_prompt_logprobs(self) -> PromptLogprobs | None:
        """The chunks' pieces as one."""
        pieces = self.prompt_logprobs
        if not pieces:
            return None
        tops = None
        if pieces[0].tops is not None:
            width = pieces[0].tops.width
            parts = [piece.tops for piece in pieces if piece.tops is not None]
            tops = TopLogprobs(width, b"".join(p.ids_i32 for p in parts), b"".join(p.logprobs_f32 for p in parts))
        return PromptLogprobs(
            pieces[0].start,
            b"".join(piece.logprobs_f32 for piece in pieces),
            tops,
            b"".join(piece.wanted_f32 for piece in pieces),
        )


def first_choices(request: Request, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> list[FirstChoice]:
    return [FirstChoice(t, lp, request.first_finish(t)) for t, lp in zip(tokens, logprobs, strict=True)]


class WaitingQueue:
    """Replays first, then by priority, then by age. Push and pop are O(log n); removal is lazy."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, int, Request]] = []
        self._live: dict[int, int] = {}  # key -> serial of the entry that counts
        self._serial = 0
        self.tokens = 0  # of all waiting requests

    def __len__(self) -> int:
        return len(self._live)

    def push(self, request: Request) -> None:
        self._serial += 1
        self._live[request.key] = self._serial
        self.tokens += request.known
        heapq.heappush(self._heap, (0 if request.replay else 1, -request.priority, request.age, self._serial, request))

    def discard(self, request: Request) -> None:
        if self._live.pop(request.key, None) is not None:
            self.tokens -= request.known
            if len(self._heap) > 64 and len(self._heap) > 2 * len(self._live):
                self._heap = [e for e in self._heap if self._live.get(e[4].key) == e[3]]
                heapq.heapify(self._heap)

    def peek(self) -> Request | None:
        """The request that `pop` would take."""
        while self._heap:
            *_, serial, request = self._heap[0]
            if self._live.get(request.key) == serial:
                return request
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Request | None:
        request = self.peek()
        if request is not None:
            heapq.heappop(self._heap)
            del self._live[request.key]
            self.tokens -= request.known
        return request

    def __iter__(self) -> Iterator[Request]:
        return (e[4] for e in self._heap if self._live.get(e[4].key) == e[3])
