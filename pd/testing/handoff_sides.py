"""The two kinds of instances of the simulated world: a hand-off machine, its runners, and a scheduler's habits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pd import messages as m
from pd.scheduler import actions as act
from pd.scheduler.blocks import BlockPool
from pd.scheduler.handoff import (
    Accepted,
    AskSpec,
    AttemptFailed,
    ChoiceKind,
    FirstTokenCame,
    GrantReturned,
    LocalIdentity,
    Ready,
    SourceFree,
    Stop,
)
from pd.scheduler.handoff_base import ints, to_i32
from pd.testing.handoff_data import MASK, DecodeRunner, PrefillRunner, Violation, value
from pd.types import HandoffId, InstanceState, Load, SamplingParams

if TYPE_CHECKING:
    from pd.testing.handoff_world import World

PAGE = 4
HEADS = 2
SAMPLING = SamplingParams(seed=1)


def make_identity(name: str, incarnation: int, ranks: int) -> LocalIdentity:
    infos = []
    for r in range(ranks):
        heads = (HEADS * r // ranks, HEADS * (r + 1) // ranks)
        identity = f"{name}.{incarnation}.{r}"
        infos.append(m.RankInfo(0, r, (0, 2), heads, identity, identity.encode()))
    group = m.KvGroup(0, (0, 2), PAGE, 8, "float32")
    return LocalIdentity(name, incarnation, "model", PAGE, "block-major", "sum64", "sim", infos, [group])


class Host:
    """One incarnation of an instance. `flush` carries out what its machine ordered, until nothing is left."""

    machine: Any
    runners: list[Any]

    def __init__(self, world: World, name: str, incarnation: int, ranks: int) -> None:
        self.world, self.name, self.incarnation = world, name, incarnation
        self.identity = make_identity(name, incarnation, ranks)
        self.out: list[act.Action] = []
        self.alive = True
        self.frozen_until = 0.0

    @property
    def runs(self) -> bool:
        return self.alive and self.world.now >= self.frozen_until

    def flush(self) -> None:
        while self.out or self.notices():
            orders = self.out[:]
            self.out.clear()
            for order in orders:
                if isinstance(order, act.Transfer):
                    self.ordered(order.command)
                    for runner in self.runners:
                        runner.commands.append(order.command)
                elif not isinstance(order, act.Log):
                    self.world.control.carry_out(self, order)
        self.audit()

    def ordered(self, command: Any) -> None:
        pass

    def notices(self) -> bool:
        raise AssertionError("each side has its own")

    def audit(self) -> None:
        self.machine.audit()


@dataclass(eq=False)
class Request:
    key: int
    prompt: int
    blocks_wanted: int
    candidates: tuple[str, ...]
    deadline: float
    state: str = "waiting"  # waiting, asked, held, ended
    id: HandoffId | None = None
    blocks: list[int] = field(default_factory=list)
    tries: int = 0
    outcome: str = ""


class DecodeHost(Host):
    def __init__(self, world: World, name: str, incarnation: int, ranks: int, blocks: int) -> None:
        super().__init__(world, name, incarnation, ranks)
        self.pool = BlockPool(blocks + 1)
        self.machine = world.decode_machine(self.out, self.pool, self.identity, world.config)
        self.runners = [DecodeRunner(self, info, blocks + 1) for info in self.identity.ranks]
        self.owner: dict[int, int] = {}
        self.requests: dict[int, Request] = {}

    # --- rules ---

    def ordered(self, command: Any) -> None:
        if isinstance(command, m.TransferGrant):
            for block in ints(command.blocks_i32):
                self.owner[block] = command.tag

    def check_write(self, tag: int, block: int) -> None:
        state = self.pool.state_of(block)
        if state not in ("incoming", "quarantined") or self.owner.get(block) != tag:
            raise Violation(f"{self.name}: tag {tag:x} wrote block {block}: {state}, of tag {self.owner.get(block):x}")

    def audit(self) -> None:
        held = self.machine.audit().incoming
        mine = {b for b in range(1, self.pool.total + 1) if self.pool.state_of(b) in ("incoming", "quarantined")}
        if mine != held:
            raise Violation(f"{self.name}: pool says {mine}, machine says {held}")

    # --- a decode scheduler's habits ---

    def submit(self, request: Request) -> None:
        self.requests[request.key] = request
        self.flush()

    def leave(self, request: Request, outcome: str) -> None:
        """The request ends, whatever it was doing."""
        if request.state == "held":
            self.pool.release(request.blocks)
        request.state, request.outcome, request.id = "ended", outcome, None
        del self.requests[request.key]
        self.world.ended(request)
        self.machine.cancel(self.world.now, request.key, outcome)

    def notices(self) -> bool:
        taken = self.machine.take_notices()
        for notice in taken:
            request = self.requests.get(notice.key)
            if request is None:
                continue  # it left in the same event
            if isinstance(notice, GrantReturned):
                self._returned(request, notice)
            elif isinstance(notice, FirstTokenCame | Ready | AttemptFailed):
                if request.state != "asked":
                    raise Violation(f"{type(notice).__name__} of {notice.id} for a request that is {request.state}")
                request.id = notice.id
                self._about_attempt(request, notice)
        self._admit()
        return bool(taken)

    def _returned(self, request: Request, notice: GrantReturned) -> None:
        self.world.note(f"{self.name}: grant of {request.key} returned: {notice.reason}")
        if request.state != "asked":
            raise Violation(f"a grant of request {request.key} was returned in state {request.state}")
        if any(self.pool.state_of(b) != "free" for b in notice.blocks):
            raise Violation("a returned grant is not free")
        self._again(request, True)

    def _about_attempt(self, request: Request, notice: Any) -> None:
        if isinstance(notice, FirstTokenCame):
            if notice.message.choices[0].token != request.prompt:
                raise Violation(
                    f"request {request.key} got the first token of prompt {notice.message.choices[0].token}"
                )
            if self.world.faulty(0.05):
                self.leave(request, "finished with its first token")
        elif isinstance(notice, Ready):
            self._ready(request, notice)
        else:
            self.world.note(f"{self.name}: {notice.id} failed: {notice.reason}")
            self._again(request, notice.retryable)

    def _again(self, request: Request, retryable: bool) -> None:
        request.id, request.state = None, "waiting"
        request.tries += 1
        if not retryable or request.tries > 12:
            self.leave(request, "failed")

    def _ready(self, request: Request, notice: Ready) -> None:
        if self.world.writes_of(self, notice.id.tag):
            raise Violation(f"{notice.id} is ready while a write of it is in flight")
        for page, block in enumerate(notice.blocks):
            for runner in self.runners:
                wanted = {h: value(request.prompt, page, h) for h in runner.heads()}
                if runner.content[block] != wanted:
                    raise Violation(f"{notice.id} is ready but block {block} does not hold page {page}")
        if any(self.pool.state_of(b) != "owned" for b in notice.blocks):
            raise Violation("ready, but its blocks are not owned")
        request.state, request.blocks = "held", notice.blocks

    def _admit(self) -> None:
        now = self.world.now
        for request in list(self.requests.values()):
            if request.state != "waiting":
                continue
            if now >= request.deadline:
                self.leave(request, "deadline")
                continue
            choice = self.machine.choose(now, request.candidates, PAGE * request.blocks_wanted)
            if choice.kind is ChoiceKind.NONE and (self.world.healing or self.world.chance(0.1)):
                self.leave(request, "local")
            if choice.kind is not ChoiceKind.READY:
                continue
            grant = self.pool.grant(request.blocks_wanted)
            if grant is None:
                continue
            for runner in self.runners:
                for block in grant:
                    runner.content[block].clear()
            after = request.candidates[request.candidates.index(choice.endpoint) + 1 :]
            spec = AskSpec(
                to_i32([request.prompt] * (PAGE * request.blocks_wanted)),
                1,
                SAMPLING,
                0,
                request.deadline,
                PAGE,
                candidates=after,
            )
            request.state = "asked"
            request.id = self.machine.ask(now, request.key, choice.endpoint, spec, grant)


@dataclass(eq=False)
class Job:
    id: HandoffId
    owner: str  # the decode instance
    prompt: int
    pages: int
    src: list[int] = field(default_factory=list)
    done: int = 0  # pages computed or ordered
    stepping: int = 0  # steps under way
    stopped: bool = False
    freed: bool = False  # SourceFree came

    def page_of(self, block: int) -> int:
        return self.src.index(block)


@dataclass(eq=False)
class Step:
    number: int
    job: Job
    pushes: list[m.Push]
    last: bool
    at: float  # when the runners have done it, at the earliest
    run: bool = False  # the runners have done it


class PrefillHost(Host):
    def __init__(self, world: World, name: str, incarnation: int, ranks: int, blocks: int) -> None:
        super().__init__(world, name, incarnation, ranks)
        self.pool = BlockPool(blocks + 1)
        self.machine = world.prefill_machine(self.out, self.identity, world.config)
        self.runners = [PrefillRunner(self, info) for info in self.identity.ranks]
        self.jobs: dict[HandoffId, Job] = {}
        self.steps: deque[Step] = deque()
        self.step = 0
        self.tells_steps = world.chance(0.7)
        self.machine.set_status(world.now, InstanceState.READY, Load(), 12 * PAGE)
        self.flush()

    def job_of(self, tag: int, peer: str) -> Job:
        for job in self.jobs.values():
            if job.id.tag == tag and peer.startswith(f"{job.owner}."):
                return job
        raise Violation(f"a push of tag {tag:x} to {peer} after its sources were given back")

    # --- a prefill scheduler's habits ---

    def notices(self) -> bool:
        taken = self.machine.take_notices()
        for notice in taken:
            if isinstance(notice, Accepted):
                tokens = ints(notice.message.tokens_i32)
                owner = self.world.control.sessions[notice.session].decode.name
                self.jobs[notice.id] = Job(notice.id, owner, tokens[0], len(tokens) // PAGE)
            elif isinstance(notice, Stop):
                self.jobs[notice.id].stopped = True
            elif isinstance(notice, SourceFree):
                job = self.jobs[notice.id]
                if job.freed:
                    raise Violation(f"the sources of {notice.id} are freed twice")
                job.freed = True
                self._release(job)
        return bool(taken)

    def _release(self, job: Job) -> None:
        if job.freed and not job.stepping:
            self.pool.release(job.src)
            del self.jobs[job.id]

    def busy_jobs(self) -> list[Job]:
        return [j for j in self.jobs.values() if not j.stopped and not j.stepping and j.done < j.pages]

    def work(self, job: Job) -> None:
        """Start a queued job, or order its next chunk."""
        machine, world = self.machine, self.world
        if not job.src:
            blocks = self.pool.allocate(job.pages)
            if blocks is None:
                return
            job.src = blocks
            machine.started(job.id)
            job.done = world.random.randrange(job.pages)  # cached
            if job.done:
                machine.push_all(job.id, job.src[: job.done], 0, after_step=False)
        else:
            count = world.random.randint(1, job.pages - job.done)
            self.step += 1
            pushes = machine.push_all(job.id, job.src[job.done : job.done + count], job.done, after_step=True)
            job.done += count
            job.stepping += 1
            if self.tells_steps:
                machine.ordered(self.step)
            at = world.now + (world.random.uniform(0.2, 3.0) if world.faulty(0.2) else 0.0)
            self.steps.append(Step(self.step, job, pushes, job.done == job.pages, at))
        self.flush()

    def run_step(self) -> None:
        """The runners have done the oldest step: what rides on it starts. The scheduler has not heard of it yet."""
        step = next(s for s in self.steps if not s.run)
        step.run = True
        for push in step.pushes:
            for runner in self.runners:
                runner.commands.append(m.TransferPush(push))

    def step_done(self) -> None:
        step, now = self.steps.popleft(), self.world.now
        job = step.job
        job.stepping -= 1
        self._release(job)
        if self.tells_steps:
            self.machine.step_done(step.number)
        if step.last and not job.stopped:
            self.machine.first_token(now, job.id, [m.FirstChoice(job.prompt)], 0)
            self.machine.computed(now, job.id, self._digests(job))
        self.flush()

    def _digests(self, job: Job) -> Any:
        by_rank = {
            runner.info.rank: [
                sum(value(job.prompt, page, h) for h in runner.heads()) & MASK for page in range(job.pages)
            ]
            for runner in self.runners
        }
        return by_rank if len(by_rank) > 1 else by_rank[0]
