"""What the parts of the scheduler share: settings, memory, the batch, the requests, and how a request ends."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from pd.config import STEP_TOKENS, CacheConfig, ControlConfig, SchedulerConfig
from pd.messages import Finish, Push, RunnerReady
from pd.scheduler.actions import Action, Level, Log
from pd.scheduler.batch import Batcher, BatchLimits
from pd.scheduler.blocks import BlockPool
from pd.scheduler.grammars import GrammarGate
from pd.scheduler.outputs import Outputs
from pd.scheduler.prefix import PrefixCache
from pd.scheduler.request import Family, Request, State, WaitingQueue
from pd.types import FinishReason, Role

#: Keys of requests that a prefill instance computes for others lie above every api worker's.
REMOTE_KEYS = 1 << 62


@dataclass(frozen=True)
class SchedulerSettings:
    """The scheduler's slice of the configuration. `incarnation` is unique among this instance's lives."""

    role: Role
    instance: str
    incarnation: int
    transfer: str
    context_length: int = 1 << 30
    http: str = ""
    control_endpoint: str = ""  # where this instance answers Hello; prefill only
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    control: ControlConfig = field(default_factory=ControlConfig)

    @property
    def short_prefill(self) -> int:
        """N of `short:N`, or -1."""
        kind, _, number = self.scheduler.local_prefill.partition(":")
        return int(number) if kind == "short" else -1

    @property
    def fallback(self) -> bool:
        return self.scheduler.local_prefill != "never"

    @property
    def step_prefill_tokens(self) -> int:
        """Prompt tokens per step: a decode instance protects its running decodes."""
        if self.role is Role.DECODE:
            return min(self.scheduler.local_prefill_tokens, self.max_prefill_tokens)
        return self.max_prefill_tokens

    @property
    def max_prefill_tokens(self) -> int:
        return self.scheduler.max_prefill_tokens or STEP_TOKENS["cpu"][1]

    @property
    def chunk(self) -> int:
        """Prompt tokens of one request per step."""
        return min(self.scheduler.chunked_prefill_size or STEP_TOKENS["cpu"][0], self.step_prefill_tokens)


@dataclass
class Stats:
    """Counts since start, for /metrics."""

    computed: int = 0
    cached: int = 0
    landed: int = 0
    steps: int = 0
    compute_us: int = 0
    late_tokens: int = 0  # dropped: of finished, cancelled or retracted requests
    audit_failures: int = 0
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=1200))  # of the last minute's ticks, seconds


class Core:
    """One lane's requests and memory. Built when the runner is up and its pool is known."""

    def __init__(self, settings: SchedulerSettings, ready: RunnerReady, out: list[Action]) -> None:
        limits, page = settings.scheduler, settings.cache.page_size
        self.settings, self.out, self.vocab_size = settings, out, ready.model.vocab_size
        self.pool = BlockPool(ready.num_blocks)
        self.prefix = PrefixCache(self.pool, page, enabled=not settings.cache.disable_prefix_cache)
        self.batcher = Batcher(
            BatchLimits(
                page_size=page,
                max_running=limits.max_running_requests,
                chunk=settings.chunk,
                prefill_tokens=settings.step_prefill_tokens,
                reserve_blocks=limits.reserve_blocks,
                digests=settings.role is Role.PREFILL,
            ),
            self.pool,
            self.prefix,
            self._no_push,
            self.requeue,
        )
        self.waiting = WaitingQueue()
        self.grammars = GrammarGate(out)
        self.requests: dict[int, Request] = {}
        self.families: dict[int, Family] = {}  # by the api's key: requests with several choices
        self.workers: dict[int, int] = {}  # api worker -> its requests
        self.outputs = Outputs()
        self.ended = self._no_room  # told of the end of a client's request that has a room
        self.stats = Stats()
        self._expiry: list[tuple[float, int, Request]] = []
        self._age = 0

    @staticmethod
    def _no_push(request: Request, page: int, blocks: list[int]) -> Push | None:
        return None

    @staticmethod
    def _no_room(request: Request, finish: Finish) -> None:
        pass

    @property
    def page_size(self) -> int:
        return self.settings.cache.page_size

    @property
    def capacity_tokens(self) -> int:
        return self.pool.total * self.page_size

    @property
    def idle(self) -> bool:
        """No request is here, no step is under way, no push reads a block: nothing holds one."""
        return not self.requests and not self.batcher.busy

    # --- requests ---

    @property
    def added(self) -> int:
        """Requests that ever came."""
        return self._age

    def strange_token(self, tokens_i32: bytes) -> int | None:
        """A token id that the model does not have: it would end the runner. None when all are fine."""
        tokens = np.frombuffer(tokens_i32, "<u4")  # of which a negative one is among the largest
        if len(tokens) and tokens.max() >= self.vocab_size:
            return int(tokens.max().astype("<i4"))
        return None

    def add(self, request: Request, now: float) -> None:
        request.age = self._age + 1
        self._age += request.slots  # each choice has an age of its own
        if request.slots > 1:
            request.family = self.families[request.key] = Family(request)
        self.adopt(request, now)
        if self.grammars.passes(request):
            self.waiting.push(request)

    def adopt(self, request: Request, now: float) -> None:
        """Know the request from now on; the caller says what becomes of it."""
        request.heard_at = now
        self.requests[request.key] = request
        if request.remote is None:
            self.workers[request.worker] = self.workers.get(request.worker, 0) + 1
        self.watch(request)

    def requeue(self, request: Request) -> None:
        """A retracted request: back to the queue, at its age's place among the replays."""
        self.log("request_retracted", rid=request.rid, emitted=request.emitted)
        request.replay = True
        request.state = State.WAITING
        request.tried.clear()
        if not request.started:
            request.prompt_logprobs.clear()  # they come again
        self.waiting.push(request)

    def unqueue(self, request: Request) -> None:
        """It does not wait any more, in the queue or for its grammar."""
        self.waiting.discard(request)
        self.grammars.leave(request)

    def remove(self, request: Request) -> None:
        """Forget the request; its blocks must have an owner that ends (`batcher.leave` or a hand-off)."""
        self.unqueue(request)
        request.state = State.GONE
        if self.requests.pop(request.key, None) is not None and request.remote is None:
            self.workers[request.worker] -= 1
            if not self.workers[request.worker]:
                del self.workers[request.worker]
        family = request.family
        if family is not None:
            if request is family.prompt:
                family.prompt = None
            else:
                family.members.pop(request.choice, None)
            if family.prompt is None and not family.members:
                self.families.pop(request.client_key, None)

    def watch(self, request: Request) -> None:
        if request.expires < float("inf"):
            heapq.heappush(self._expiry, (request.expires, request.key, request))

    def expired(self, now: float) -> list[Request]:
        """Clients' requests whose deadline has passed. A deadline that moved meanwhile is watched anew."""
        late: list[Request] = []
        while self._expiry and self._expiry[0][0] <= now:
            request = heapq.heappop(self._expiry)[2]
            if request.state is State.GONE:
                continue
            if request.expires <= now:
                late.append(request)
            else:
                self.watch(request)
        return late

    # --- ends ---

    def finish(self, request: Request, finish: Finish) -> None:
        """A client's request ends here, whatever it was doing; what it holds in a hand-off the caller ends."""
        if not request.started and finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.outputs.started(request)
        self.outputs.finished(request, finish)
        if request.room >= 0:
            self.ended(request, finish)
        self.batcher.leave(request)
        self.remove(request)
        if finish.reason is FinishReason.ERROR:
            self.log("request_failed", "warning", rid=request.rid, status=finish.status, reason=finish.message)

    def fail(self, request: Request, message: str, status: int = 503) -> None:
        self.finish(request, Finish(FinishReason.ERROR, message=message, status=status))

    def log(self, event: str, level: Level = "info", /, **fields: object) -> None:
        self.out.append(Log(event, tuple(fields.items()), level))
