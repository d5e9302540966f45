"""Several whole schedulers with fake runners, a network and one-sided writes, in one process and on a virtual clock.

Everything that is not the scheduler is simulated at the level at which it can hurt: messages are delayed, reordered
across sessions and lost with their session; a push copies KV slots from one fake runner's memory to another's when it
lands, which may be late; processes die, freeze and come back as new incarnations. The fake runners read all of a
request's KV back before every token, so a block that two owners wrote does not go unnoticed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pd import messages as m
from pd.errors import PdError
from pd.scheduler import actions as ac
from pd.scheduler import events as ev
from pd.scheduler.core import SchedulerSettings
from pd.scheduler.report import books
from pd.scheduler.state import Scheduler
from pd.testing.fake_runner import FakeRunner
from pd.testing.instance import Client, note_reply, runner_ready, settings
from pd.types import Role, SamplingParams


class Misplaced(PdError):
    """A one-sided write met a block that its owner had not granted to it."""


@dataclass
class SimConfig:
    """Delays are drawn uniformly, in seconds. `revocable` backends refuse a write whose grant was revoked."""

    prefills: int = 1
    decodes: int = 1
    num_blocks: int = 65
    page_size: int = 4
    revocable: bool = True
    message_delay: tuple[float, float] = (0.0001, 0.002)
    write_delay: tuple[float, float] = (0.0002, 0.005)
    step_time: tuple[float, float] = (0.001, 0.004)
    scheduler: dict[str, object] = field(default_factory=dict)
    control: dict[str, object] = field(default_factory=dict)


class Node:
    """One instance's life: scheduler, fake runner, its transfer thread's state."""

    def __init__(self, world: SimCluster, name: str, role: Role, incarnation: int) -> None:
        self.world, self.name, self.role = world, name, role
        self.identity = f"{name}/{incarnation}/0"
        self.endpoint = f"tcp://{name}:1"
        base = settings(role, world.config.page_size, **world.config.scheduler)
        control = replace(base.control, **world.config.control)  # type: ignore[arg-type]
        self.settings: SchedulerSettings = replace(
            base, instance=name, incarnation=incarnation, http=f"http://{name}", control=control
        )
        self.scheduler = Scheduler(self.settings)
        self.runner = FakeRunner(world.config.num_blocks, world.config.page_size)
        self.alive, self.frozen = True, False
        self.stepping = False
        self.exit: ac.Exit | None = None
        self.grants: dict[tuple[str, int], list[int]] = {}  # (sender, tag) -> blocks
        self.last_command = 0.0
        self.deaf = False  # its transfer thread hangs
        self.no_grammar = ""  # why its runner can use none
        self.granted: set[tuple[str, int]] = set()  # ever
        self.expelled: set[str] = set()
        self.resets: dict[str, int] = {}  # receiver -> number of resets: earlier writes no longer count
        self.cancelled: set[tuple[str, int]] = set()
        self.backlog: list[Callable[[], None]] = []  # what happens when it thaws

    def event(self, make: Callable[[float], ev.Event]) -> None:
        """Handle an event now, or on thawing; a dead node handles nothing."""
        if not self.alive:
            return
        if self.frozen:
            self.backlog.append(lambda: self.event(make))
            return
        for action in self.scheduler.handle(make(self.world.now)):
            self._do(action)
        self.world.check(self)

    def _do(self, action: ac.Action) -> None:
        world = self.world
        match action:
            case ac.RunStep(order):
                self.runner.step(order)
                self._run()
            case ac.CompileGrammar(compile):
                world.later(
                    world.draw(world.config.step_time),
                    lambda: self.event(lambda now: ev.GrammarCompiled(now, compile.number, self.no_grammar)),
                    node=self,
                )
            case ac.Reply(_, message):
                if world.owner_of(message) in (None, self):
                    note_reply(world.clients, message)
            case ac.Transfer(command):
                # One socket: commands are late, but in order.
                at = max(world.now + world.draw(world.config.message_delay), self.last_command)
                self.last_command = at
                world.later(at - world.now, lambda: self._command(command), node=self)
            case ac.SendPeer(session, message):
                world.send(self, session, message)
            case ac.OpenSession(endpoint, hello, timeout):
                world.dial(self, endpoint, hello, timeout)
            case ac.WelcomePeer(conn, welcome):
                world.welcomed(self, conn, welcome)
            case ac.RefusePeer(conn, unwelcome):
                world.refused(conn, f"{unwelcome.field}: {unwelcome.problem}", unwelcome.field != "state")
            case ac.CloseSession(session, reason):
                world.close(self, session, reason)
            case ac.Log():
                world.logs.append((self.name, action))
            case ac.Exit():
                self.exit = action
                world.kill(self)

    # --- the runner ---

    def _run(self) -> None:
        if self.stepping or not self.runner.pending:
            return
        self.stepping = True
        self.world.later(self.world.draw(self.world.config.step_time), self._step_done, node=self)

    def _step_done(self) -> None:
        self.stepping = False
        order = self.runner.pending[0]
        done = self.runner.finish()
        for push in order.pushes:
            self._push(push)
        self.event(lambda now: ev.StepFinished(now, done))
        self._run()

    # --- the transfer thread ---

    def _say(self, event: m.TransferEvent) -> None:
        self.event(lambda now: ev.TransferSaid(now, event))

    def _command(self, command: m.TransferCommand) -> None:
        if self.deaf:
            return
        match command:
            case m.TransferConnect(peer, _):
                found = self.world.by_identity(peer)
                ok = found is not None and found.alive
                self._say(m.TransferConnected(peer) if ok else m.TransferPeerLost(peer, "unreachable"))
            case m.TransferGrant(sender, tag, blocks):
                self.granted.add((sender, tag))
                self.grants[sender, tag] = np.frombuffer(blocks, "<i4").tolist()
            case m.TransferRevoke(sender, tag):
                revocable = self.world.config.revocable
                if revocable:
                    self.grants.pop((sender, tag), None)
                self._say(m.TransferRevoked(tag, revocable, sender=sender))
            case m.TransferPush(push):
                self._push(push)
            case m.TransferCancel(peer, tag):
                self.cancelled.add((peer, tag))
            case m.TransferResetPeer(peer):
                self.resets[peer] = self.resets.get(peer, 0) + 1
                self._say(m.TransferReset(peer))
            case m.TransferVerify():
                self._verify(command)
            case m.TransferExpel(sender):
                self.expelled.add(sender)
                self.grants = {k: v for k, v in self.grants.items() if k[0] != sender}
                self._say(m.TransferExpelled(sender, True))

    def _push(self, push: m.Push) -> None:
        """Post a write: it reads the source and lands, or fails, later."""
        if (push.peer, push.tag) in self.cancelled:
            self._say(m.TransferFailed(push.tag, push.index, "cancelled", push.peer, quiet=True))
            return
        epoch = self.resets.get(push.peer, 0)
        self.world.later(self.world.draw(self.world.config.write_delay), lambda: self._land(push, epoch))

    def _land(self, push: m.Push, epoch: int) -> None:
        """The bytes arrive, whatever has become of the sender; only a reset, expel or revoke stops them."""
        target = self.world.by_identity(push.peer)
        if self.resets.get(push.peer, 0) != epoch:
            return
        if target is None or not target.alive:
            self._failed(push, "peer lost")
            return
        if self.identity in target.expelled:
            self._failed(push, "expelled")
            return
        src = np.frombuffer(push.src_i32, "<i4").tolist()
        dst = np.frombuffer(push.dst_i32, "<i4").tolist()
        granted = target.grants.get((self.identity, push.tag))
        if (self.identity, push.tag) not in target.granted:  # the receiver's command is still under way: backends wait
            self.world.later(0.001, lambda: self._land(push, epoch))
            return
        if granted is None and self.world.config.revocable:
            self._failed(push, "revoked")
            return
        for source, destination in zip(src, dst, strict=True):
            self.world.check_write(target, destination, self.identity, push.tag)
            self.world.check_read(self, source)
            target.runner.memory[destination] = self.runner.memory[source]
            if self.world.random.random() < self.world.corruption:
                target.runner.memory[destination, 0] ^= 1
        nbytes = 64 * len(src)
        if self.alive:
            self.world.later(
                self.world.draw(self.world.config.message_delay),
                lambda: self._say(m.TransferPushed(push.tag, push.index, nbytes, push.peer)),
                node=self,
            )

    def _failed(self, push: m.Push, reason: str) -> None:
        if self.alive:
            self._say(m.TransferFailed(push.tag, push.index, reason, push.peer))

    def _verify(self, command: m.TransferVerify) -> None:
        blocks = np.frombuffer(command.blocks_i32, "<i4").tolist()
        tokens = np.frombuffer(command.tokens_i32, "<i4").tolist()
        wanted = np.frombuffer(command.digests_u64, "<u8").tolist()
        bad = [b for b, n, d in zip(blocks, tokens, wanted, strict=True) if self.runner.digest(b, n) != d]
        self.grants.pop((command.sender, command.tag), None)
        raw = np.array(bad, "<i4").tobytes()
        self._say(m.TransferVerified(command.tag, raw, 64 * len(blocks), sender=command.sender))


@dataclass
class _Session:
    number: int
    decode: Node
    prefill: Node
    endpoint: str
    arrives: dict[str, float] = field(default_factory=dict)  # direction -> latest arrival: in order within a session
    open: bool = True


class SimCluster:
    """The world: nodes, clock, network. Deterministic for a seed."""

    def __init__(self, seed: int = 0, config: SimConfig | None = None) -> None:
        self.config = config or SimConfig()
        self.random = random.Random(seed)
        self.now = 0.0
        self.corruption = 0.0
        self.clients: dict[int, Client] = {}
        self.prompts: dict[int, tuple[list[int], SamplingParams, Node]] = {}
        self.legs: set[int] = set()  # those of `clients` that get the first token only
        self.sessions: dict[int, _Session] = {}
        self._dials: dict[int, tuple[Node, str, Node]] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._incarnations = itertools.count(1)
        self._key = itertools.count(1)
        self.lives: list[Node] = []
        self.logs: list[tuple[str, ac.Log]] = []  # what each node logged, in the order of time
        self.nodes: dict[str, Node] = {}
        for index in range(self.config.prefills):
            self.start(f"p{index}", Role.PREFILL)
        for index in range(self.config.decodes):
            self.start(f"d{index}", Role.DECODE)
        self._ticks()

    # --- time ---

    def draw(self, bounds: tuple[float, float]) -> float:
        return self.random.uniform(*bounds)

    def later(self, delay: float, act: Callable[[], None], node: Node | None = None) -> None:
        """`act` after `delay`; with a node, only while it lives, and after its thaw."""

        def run() -> None:
            if node is None:
                act()
            elif node.alive:
                if node.frozen:
                    node.backlog.append(act)
                else:
                    act()

        heapq.heappush(self._queue, (self.now + delay, next(self._serial), run))

    def run(self, until: float) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, act = heapq.heappop(self._queue)
            act()
        self.now = until

    def settle(self, bound: float) -> bool:
        """Run until every request has ended, at most `bound` seconds."""
        end = self.now + bound
        while self.now < end and not all(c.ended for c in self.clients.values()):
            self.run(min(end, self.now + 0.05))
        return all(c.ended for c in self.clients.values())

    def _ticks(self) -> None:
        for node in list(self.nodes.values()):
            node.event(ev.Tick)
        self.later(0.05, self._ticks)

    # --- nodes ---

    def start(self, name: str, role: Role) -> Node:
        node = self.nodes[name] = Node(self, name, role, next(self._incarnations))
        self.lives.append(node)
        ready = runner_ready(self.config.num_blocks, node.identity)
        node.event(lambda now: ev.RunnerUp(now, ready))
        return node

    def kill(self, node: Node) -> None:
        """SIGKILL: its connections close at once, its clients see an error, writes under way may still land."""
        if not node.alive:
            return
        node.alive = False
        for session in list(self.sessions.values()):
            if node in (session.decode, session.prefill):
                self._end(session, "connection lost", but=node)
        for key, (_, _, owner) in self.prompts.items():
            if owner is node:
                self.clients[key].fail("instance died", 502)

    def restart(self, node: Node) -> Node:
        return self.start(node.name, node.role)

    def freeze(self, node: Node) -> None:
        """SIGSTOP; ZMQ heartbeats of its peers notice after 1.5 s."""
        node.frozen = True

        def noticed() -> None:
            if node.frozen and node.alive:
                for session in list(self.sessions.values()):
                    if node in (session.decode, session.prefill):
                        self._end(session, "link heartbeats missed")

        self.later(1.5, noticed)

    def thaw(self, node: Node) -> None:
        node.frozen = False
        backlog, node.backlog = node.backlog, []
        for act in backlog:
            if node.alive and not node.frozen:
                act()

    def by_identity(self, identity: str) -> Node | None:
        return next((n for n in self.lives if n.identity == identity), None)

    def owner_of(self, message: m.SchedulerToApi) -> Node | None:
        keys: list[int] = []
        if isinstance(message, m.StepOutputs):
            keys = [*np.frombuffer(message.keys_i64, "<i8").tolist(), *(f.key for f in message.finished)]
        elif isinstance(message, m.Rejected):
            keys = [message.key]
        return self.prompts[keys[0]][2] if keys else None

    # --- the control plane ---

    def dial(self, decode: Node, endpoint: str, hello: m.Hello, timeout: float) -> None:
        conn = next(self._serial)

        def arrive() -> None:
            prefill = self.nodes.get(endpoint.removeprefix("tcp://").removesuffix(":1"))
            if prefill is None or not prefill.alive:
                decode.event(lambda now: ev.SessionRefused(now, endpoint, "connection refused"))
                return
            self._dials[conn] = (decode, endpoint, prefill)
            prefill.event(lambda now: ev.HelloReceived(now, conn, hello))

        def expire() -> None:
            if self._dials.pop(conn, None) is not None:
                decode.event(lambda now: ev.SessionRefused(now, endpoint, "no answer"))

        self.later(self.draw(self.config.message_delay), arrive)
        self.later(timeout, expire)

    def welcomed(self, prefill: Node, conn: int, welcome: m.Welcome) -> None:
        dial = self._dials.pop(conn, None)
        if dial is None:  # too late: nobody attaches
            self.later(0.1, lambda: prefill.event(lambda now: ev.SessionDown(now, welcome.session, "not attached")))
            return
        decode, endpoint, _ = dial
        session = self.sessions[welcome.session] = _Session(welcome.session, decode, prefill, endpoint)

        def up() -> None:
            if session.open:
                decode.event(lambda now: ev.SessionUp(now, endpoint, welcome))
            else:
                decode.event(lambda now: ev.SessionRefused(now, endpoint, "lost while attaching"))

        self._deliver(session, "up", up)

    def refused(self, conn: int, reason: str, permanent: bool) -> None:
        dial = self._dials.pop(conn, None)
        if dial is not None:
            dial[0].event(lambda now: ev.SessionRefused(now, dial[1], reason, permanent))

    def send(self, sender: Node, number: int, message: m.PeerMessage) -> None:
        session = self.sessions.get(number)
        if session is None or not session.open:
            return
        target = session.prefill if sender is session.decode else session.decode

        def arrive() -> None:
            if session.open:
                target.event(lambda now: ev.PeerSaid(now, number, message))

        self._deliver(session, "up" if target is session.decode else "down", arrive)

    def _deliver(self, session: _Session, direction: str, act: Callable[[], None]) -> None:
        at = max(self.now + self.draw(self.config.message_delay), session.arrives.get(direction, 0.0))
        session.arrives[direction] = at
        heapq.heappush(self._queue, (at, next(self._serial), act))

    def close(self, closer: Node, number: int, reason: str) -> None:
        session = self.sessions.get(number)
        if session is not None:
            self._end(session, reason, but=closer)

    def lose(self, session: _Session) -> None:
        """The network drops the session: both sides hear of it, at their own time; what was under way is lost."""
        self._end(session, "connection lost")

    def _end(self, session: _Session, reason: str, but: Node | None = None) -> None:
        if not session.open:
            return
        session.open = False
        del self.sessions[session.number]
        for node in (session.decode, session.prefill):
            if node is not but:
                delay = self.draw(self.config.message_delay)
                self.later(
                    delay,
                    lambda n=node: n.event(lambda now: ev.SessionDown(now, session.number, reason)),  # type: ignore[misc]
                )

    # --- clients ---

    def submit(
        self,
        decode: Node,
        prompt: Iterable[int],
        max_tokens: int,
        *,
        prefills: Iterable[str] | None = None,
        seed: int = 0,
        stop: tuple[int, ...] = (),
        timeout: float | None = None,
        logprob_start: int = -1,
        choices: int = 1,
        grammar: str = "",
        sampling: dict[str, Any] | None = None,
        **more: Any,
    ) -> Client:
        key = next(self._key)
        params = SamplingParams(
            seed=seed, max_tokens=max_tokens, stop_token_ids=stop, grammar=grammar, **(sampling or {})
        )
        tokens = list(prompt)
        client = self.clients[key] = Client.of(choices)
        self.prompts[key] = (tokens, params, decode)
        if not decode.alive:
            client.fail("instance is dead", 502)
            return client
        names = [f"tcp://p{i}:1" for i in range(self.config.prefills)] if prefills is None else list(prefills)
        submit = m.Submit(
            key,
            f"r{key}",
            np.array(tokens, "<i4").tobytes(),
            params,
            choices,
            logprob_start=logprob_start,
            prefills=tuple(names),
            client_timeout_ms=None if timeout is None else int(timeout * 1000),
            **more,
        )
        decode.event(lambda now: ev.RequestSubmitted(now, submit))
        return client

    def submit_leg(self, prefill: Node, prompt: Iterable[int], max_tokens: int, room: int, **more: Any) -> Client:
        """What a foreign router sends to the prefill instance; `submit` with the same room is the other half."""
        client = self.submit(prefill, prompt, max_tokens, prefills=(), room=room, **more)
        self.legs.add(next(k for k, c in self.clients.items() if c is client))
        return client

    def abort(self, client: Client, choice: int = -1) -> None:
        key = next(k for k, c in self.clients.items() if c is client)
        owner = self.prompts[key][2]
        owner.event(lambda now: ev.AbortRequested(now, key, "client left", choice))

    # --- what must always hold ---

    def check(self, node: Node) -> None:
        """After every event of a node: the books of its blocks and hand-offs."""
        scheduler = node.scheduler
        if scheduler.core is not None and node.alive:
            found = books(scheduler.core, scheduler.decode, scheduler.prefill)
            assert found["balanced"], f"{node.name}: {found}"

    def check_write(self, target: Node, block: int, sender: str, tag: int) -> None:
        core = target.scheduler.core
        assert core is not None
        state = core.pool.state_of(block)
        if state not in ("incoming", "quarantined") or block not in target.grants.get((sender, tag), ()):
            raise Misplaced(f"{sender} wrote block {block} of {target.name} (tag {tag}), which is {state}")

    def check_read(self, sender: Node, block: int) -> None:
        core = sender.scheduler.core
        assert core is not None
        if sender.alive and core.pool.state_of(block) != "owned":
            raise Misplaced(f"a push reads block {block} of {sender.name}, which is {core.pool.state_of(block)}")

    def check_digests(self) -> None:
        """Digests are the second line: unless data is corrupted on its way, they never find anything."""
        for node in self.lives:
            if node.scheduler.decode is not None and not self.corruption:
                found = node.scheduler.decode.handoffs.outcomes.get("digest_mismatch", 0)
                assert not found, f"{node.name} received {found} damaged prompts"

    def check_answers(self) -> None:
        for key, client in self.clients.items():
            prompt, sampling, _ = self.prompts[key]
            client.check(f"request {key}", prompt, sampling, 1 if key in self.legs else sampling.max_tokens)

    def check_rest(self) -> None:
        """At rest nobody holds anything: every block of a living instance is free or cached."""
        for node in self.nodes.values():
            core = node.scheduler.core
            if node.alive and core is not None:
                counts = core.pool.audit()
                held = {k: v for k, v in counts.items() if k in ("owned", "incoming", "quarantined") and v}
                assert not held, f"{node.name} still holds {held}"
                assert not core.requests and not core.families, f"{node.name} still has requests"
