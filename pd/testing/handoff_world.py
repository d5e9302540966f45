"""A simulated world in which hand-off machines are model-checked: one seed is one interleaving.

Decode and prefill instances, a control plane that delays, duplicates and (together with the session) loses messages,
and the data plane of `handoff_data`. Instances die, freeze and restart as new incarnations, sessions break, clients
leave, deadlines pass, data is corrupted. After every event the books of the machine concerned are audited; every write
is checked where it lands. Then faults stop, and everything must come to its end: requests, blocks, source pins.

    World(seed).run()          # raises Violation, with the last lines of what happened
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from pd import messages as m
from pd.scheduler.handoff import DecodeHandoffs, HandoffConfig, PrefillHandoffs
from pd.testing.handoff_control import ControlPlane
from pd.testing.handoff_data import DecodeRunner, PrefillRunner, Violation, Write
from pd.testing.handoff_sides import PAGE, DecodeHost, Host, PrefillHost, Request
from pd.types import HandoffId, InstanceState, Load

#: Times of the simulated world: short against its steps, in the proportions of the real ones.
CONFIG = HandoffConfig(
    heartbeat_interval=1.0,
    connect_timeout=1.0,
    waiting_timeout=20.0,
    step_timeout=5.0,
    revoke_grace=0.5,
    expel_retry=0.5,
    expel_after=4.0,
    reconnect_first=0.2,
    reconnect_most=1.0,
    mismatch_backoff=1.0,
    busy_backoff=0.2,
    reset_after=1.0,
    reset_linger=0.5,
)

STEPS = 140
HEAL_LIMIT = 90.0


class World:
    """`decode_machine` and `prefill_machine` may be replaced by mutants; `trace` keeps a line per event."""

    def __init__(
        self,
        seed: int,
        *,
        decode_machine: Callable[..., DecodeHandoffs] = DecodeHandoffs,
        prefill_machine: Callable[..., PrefillHandoffs] = PrefillHandoffs,
        trace: bool = False,
    ) -> None:
        self.seed, self.random, self.config = seed, random.Random(seed), CONFIG
        self.decode_machine, self.prefill_machine = decode_machine, prefill_machine
        self.now, self.healing = 10.0, False
        self.log: deque[str] | None = deque(maxlen=150) if trace else None
        pick = self.random
        self.revocable = pick.random() < 0.4
        self.rough = pick.choice((0.3, 1.0, 2.0))  # how often things go wrong
        self.writes: list[Write] = []
        self.control = ControlPlane(self)
        self.outcomes: dict[str, int] = {}
        self.graves: list[Host] = []
        self._keys = 0
        self._incarnation = 100
        decode_ranks, prefill_ranks = pick.choice(((1, 1), (1, 1), (1, 1), (1, 2), (2, 1)))
        self.shape = {"d": (decode_ranks, 11), "p": (prefill_ranks, 14)}
        self.decodes = {f"d{i}": self._born(f"d{i}") for i in range(pick.randint(1, 2))}
        self.prefills = {f"p{i}": self._born(f"p{i}") for i in range(pick.randint(1, 3))}

    # --- chance, time, notes ---

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def faulty(self, p: float) -> bool:
        """Whether a fault of this probability happens; never while the world heals."""
        return not self.healing and self.random.random() < p * self.rough

    def note(self, line: str) -> None:
        if self.log is not None:
            self.log.append(f"{self.now:7.2f} {line}")

    def ended(self, request: Request) -> None:
        self.outcomes[request.outcome] = self.outcomes.get(request.outcome, 0) + 1
        self.note(f"request {request.key} ended: {request.outcome}")

    # --- hosts ---

    def _born(self, name: str) -> Any:
        self._incarnation += 1
        ranks, blocks = self.shape[name[0]]
        self.note(f"{name}.{self._incarnation} is born")
        kind: type[Any] = DecodeHost if name[0] == "d" else PrefillHost
        return kind(self, name, self._incarnation, ranks, blocks)

    def hosts(self) -> list[Host]:
        return [*self.decodes.values(), *self.prefills.values()]

    def decode_runner(self, identity: str) -> DecodeRunner | None:
        """The living rank of that identity."""
        host = self.decodes.get(identity.partition(".")[0])
        if host is not None and host.alive:
            for runner in host.runners:
                if runner.info.identity == identity:
                    return runner
        return None

    def kill(self, host: Host) -> None:
        """A process dies, to be restarted soon. What it posted stays in flight; what it received in is gone."""
        self.note(f"{host.name}.{host.incarnation} dies")
        host.alive, host.frozen_until = False, self.now + self.random.choice((0.2, 1.0, 5.0))
        for write in self.writes:
            if write.runner.host is host:
                write.job = None  # its bytes are in kernel buffers
        self.control.host_died(host)
        if isinstance(host, DecodeHost):
            for request in list(host.requests.values()):
                request.outcome = "instance died"
                self.ended(request)
            host.requests.clear()

    def revive(self, host: Host) -> None:
        side: dict[str, Any] = self.decodes if isinstance(host, DecodeHost) else self.prefills
        side[host.name] = self._born(host.name)

    # --- the data plane ---

    def land(self) -> bool:
        """Some write lands; False when the one that was drawn is a slow one."""
        index = self.random.randrange(len(self.writes))
        if self.now < self.writes[index].not_before:
            return False
        self.writes[index], self.writes[-1] = self.writes[-1], self.writes[index]
        self._lands(self.writes.pop())
        return True

    def _lands(self, write: Write) -> None:
        job = write.job
        if job is not None and job.freed:
            raise Violation(f"a write of {job.id} reads source block {write.src} after it was given back")
        applied = write.receiver.apply(write)
        self.note(
            f"write of tag {write.posted.tag & 0xFFFF:x} into {write.receiver.info.identity} {write.dst}: {applied}"
        )
        if write.runner.host.alive:
            write.runner.landed(write, applied)

    def drop_writes(self, which: Callable[[Write], bool]) -> None:
        self.writes = [w for w in self.writes if not which(w)]

    def writes_of(self, host: DecodeHost, tag: int, sender: str = "") -> list[Write]:
        """Writes into this instance that are still in flight, of any sender or of one."""
        return [
            w
            for w in self.writes
            if w.receiver.host is host and w.posted.tag == tag and sender in ("", w.runner.info.identity)
        ]

    # --- what may happen next ---

    def _deliveries(self) -> list[tuple[Callable[..., None], Any]]:
        """Everything that is on its way somewhere."""
        ready: list[tuple[Callable[..., None], Any]] = list(self.control.deliveries())
        now = self.now
        for host in self.hosts():
            if not host.alive:
                continue
            for runner in host.runners:
                if runner.commands:
                    ready.append((self._obey, runner))
                if runner.events and now >= host.frozen_until:
                    ready.append((self._report, runner))
        for prefill in self.prefills.values():
            if prefill.alive:
                self._prefill_work(prefill, ready)
        return ready

    def _prefill_work(self, host: PrefillHost, ready: list[tuple[Callable[..., None], Any]]) -> None:
        if any(not step.run and (self.now >= step.at or self.healing) for step in host.steps):
            ready.append((lambda h: h.run_step(), host))
        if host.runs:
            if host.steps and host.steps[0].run:
                ready.append((lambda h: h.step_done(), host))
            ready.extend((host.work, job) for job in host.busy_jobs() if job.src or job.pages <= host.pool.available)

    def _obey(self, runner: Any) -> None:
        command = runner.commands.popleft()
        self.note(f"runner {runner.info.identity}: {command}")
        runner.obey(command)

    def _report(self, runner: Any) -> None:
        event = runner.events.popleft()
        self.note(f"{runner.host.name} <- runner: {event}")
        runner.host.machine.transfer_said(self.now, event)
        runner.host.flush()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.control.expire()
        for prefill in self.prefills.values():
            while prefill.alive and any(not s.run and s.at + 1.0 <= self.now for s in prefill.steps):
                prefill.run_step()  # a longer step would end the instance
        for write in [w for w in self.writes if w.not_after and w.not_after <= self.now]:
            self.writes.remove(write)
            self._lands(write)
        for host in self.hosts():
            if not host.alive and self.now >= host.frozen_until:
                self.revive(host)
        for host in self.hosts():
            if host.runs:
                host.machine.tick(self.now)
                host.flush()

    # --- running ---

    def run(self) -> World:
        try:
            for _ in range(STEPS):
                self._step()
            self._heal()
        except AssertionError as error:
            lines = "\n".join(self.log or ["(trace=True shows what happened)"])
            raise Violation(f"seed {self.seed}: {error}\n{lines}") from error
        return self

    def _step(self) -> None:
        r = self.random.random()
        if r < 0.05:
            self._submit()
        elif r < 0.13:
            self.advance(self.random.choice((0.01, 0.05, 0.1, 0.3, 0.7)))
        elif r < 0.13 + 0.05 * self.rough:
            self._fault()
        elif self.writes and r > 0.8:
            self.land()
        else:
            ready = self._deliveries()
            if ready:
                what, on = ready[self.random.randrange(len(ready))]
                what(on)
            else:
                self.advance(0.1)

    def _submit(self) -> None:
        hosts = [h for h in self.decodes.values() if h.runs]
        if not hosts:
            return
        pick = self.random
        self._keys += 1
        candidates = [f"tcp://{name}" for name in self.prefills]
        pick.shuffle(candidates)
        deadline = self.now + (pick.uniform(0.5, 4.0) if self.faulty(0.15) else 60.0)
        request = Request(self._keys, self._keys, pick.randint(1, 4), tuple(candidates), deadline)
        pick.choice(hosts).submit(request)

    def _fault(self) -> None:
        pick, r = self.random, self.random.random()
        if r < 0.25:
            self._client()
        elif r < 0.45 and self.control.sessions:
            wire = pick.choice(list(self.control.sessions.values()))
            if self.chance(0.7):
                self.note(f"session {wire.id & 0xFF} breaks")
                self.control.sever(wire)
            else:
                wire.stalled_until = self.now + 4.0
        elif r < 0.6:
            self._break_push()
        elif r < 0.7:
            host = pick.choice(self.hosts())
            host.frozen_until = self.now + pick.choice((0.5, 3.0, 6.0))
            self.note(f"{host.name} freezes until {host.frozen_until:.2f}")
        elif r < 0.85:
            senders = [w.runner.host for w in self.writes]
            host = pick.choice(senders) if senders and self.chance(0.5) else pick.choice(self.hosts())
            if host.alive:
                self.kill(host)
        elif r < 0.93:
            prefill = pick.choice(list(self.prefills.values()))
            if prefill.runs:
                state = pick.choice((InstanceState.DRAINING, InstanceState.READY, InstanceState.STARTING))
                prefill.machine.set_status(self.now, state, Load(), PAGE * pick.randint(0, 12))
                prefill.flush()
        else:
            self._fail_job()

    def _client(self) -> None:
        hosts = [h for h in self.decodes.values() if h.runs and h.requests]
        if hosts:
            host = self.random.choice(hosts)
            host.leave(self.random.choice(list(host.requests.values())), "client left")
            host.flush()

    def _break_push(self) -> None:
        """A push is reported failed while it is in flight, or a data connection is reported lost."""
        runners = [r for h in self.prefills.values() if h.alive for r in h.runners if r.posted or r.connected]
        if not runners:
            return
        runner: PrefillRunner = self.random.choice(runners)
        if runner.posted and self.chance(0.8):
            runner.break_push(self.random.choice(list(runner.posted.values())))
        elif runner.connected:
            peer = self.random.choice(sorted(runner.connected))
            runner.connected.discard(peer)
            runner.events.append(m.TransferPeerLost(peer, "simulated", runner.info.rank))

    def _fail_job(self) -> None:
        hosts = [h for h in self.prefills.values() if h.runs and h.jobs]
        if hosts:
            host = self.random.choice(hosts)
            id: HandoffId = self.random.choice(list(host.jobs))
            host.machine.fail(self.now, id, "simulated", self.chance(0.8))
            host.flush()

    # --- the end ---

    def _heal(self) -> None:
        """Faults stop, dead instances restart; everything must end."""
        self.healing = True
        self.note("healing")
        until = self.now + HEAL_LIMIT
        for host in self.hosts():
            host.frozen_until = 0.0
            if not host.alive:
                self.revive(host)
        for wire in self.control.sessions.values():
            wire.stalled_until = 0.0
        for prefill in self.prefills.values():
            prefill.machine.set_status(self.now, InstanceState.READY, Load(), 12 * PAGE)
            prefill.flush()
        while not self._at_rest():
            self._settle()
            self.advance(0.4)
            if self.now > until:
                raise Violation(f"it does not come to rest: {self._unrest()}")

    def _settle(self) -> None:
        """Everything that is on its way arrives."""
        for _ in range(2000):
            ready = self._deliveries()
            if self.writes and (not ready or self.chance(0.3)):
                if not self.land() and not ready:
                    break
            elif ready:
                what, on = ready[self.random.randrange(len(ready))]
                what(on)
            else:
                break
        for decode in self.decodes.values():
            for request in [r for r in decode.requests.values() if r.state == "held"]:
                decode.leave(request, "served")
            decode.flush()

    def _at_rest(self) -> bool:
        return not self._unrest()

    def _unrest(self) -> list[str]:
        """What has not ended."""
        left: list[str] = []
        for decode in self.decodes.values():
            left.extend(f"{decode.name}: request {r.key} {r.state}" for r in decode.requests.values())
            if decode.pool.counts[0] != decode.pool.total or not decode.machine.quiet:
                left.append(f"{decode.name}: {decode.machine.audit()}, {decode.pool.counts}")
        for prefill in self.prefills.values():
            open_ = prefill.machine.audit()
            if open_ or prefill.jobs or prefill.pool.counts[0] != prefill.pool.total:
                left.append(f"{prefill.name}: {open_}, {[j.id for j in prefill.jobs.values()]}, {prefill.pool.counts}")
        if self.writes:
            left.append(f"{len(self.writes)} writes in flight")
        return left
