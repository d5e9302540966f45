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
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pd import messages as m
from pd.scheduler import actions as ac
from pd.scheduler import events as ev
from pd.testing.instance import Client, runner_ready
from pd.testing.invariants import check_scheduler
from pd.testing.sim_node import Misplaced, Node, SimConfig
from pd.types import Role, SamplingParams

__all__ = ["Misplaced", "Node", "SimCluster", "SimConfig"]


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
        self.tick = 0.05  # seconds between two
        self.clients: dict[int, Client] = {}
        self.prompts: dict[int, tuple[list[int], SamplingParams, Node]] = {}
        self.submits: dict[int, m.Submit] = {}  # what the instance was sent for each client
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
        self.later(self.tick, self._ticks)

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
        worker: int = 0,
        rid: str = "",
        **more: Any,
    ) -> Client:
        key = (worker << 40) + next(self._key)
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
        submit = self.submits[key] = m.Submit(
            key,
            rid or f"r{key}",
            np.array(tokens, "<i4").tobytes(),
            params,
            choices,
            logprob_start=logprob_start,
            prefills=tuple(names),
            client_timeout_ms=None if timeout is None else int(timeout * 1000),
            **more,
        )
        if worker in decode.lost_workers:
            client.fail("its api worker is dead", 502)
            return client

        def submitted(now: float) -> ev.Event:
            decode.heard.add(key)
            return ev.RequestSubmitted(now, submit)

        decode.event(submitted)
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

    def command(self, node: Node, command: m.Command) -> None:
        node.event(lambda now: ev.Commanded(now, 0, command))

    def lose_api(self, node: Node, worker: int) -> None:
        """An api worker dies, and its clients' connections with it."""
        node.lost_workers.add(worker)
        for key, (_, _, owner) in self.prompts.items():
            if owner is node and key >> 40 == worker:
                self.clients[key].fail("api worker died", 502)
        node.event(lambda now: ev.ApiLost(now, worker))

    # --- what must always hold ---

    def check(self, node: Node) -> None:
        """After every event of a node."""
        if node.alive:
            try:
                check_scheduler(node.scheduler)
            except AssertionError as error:
                raise AssertionError(f"{node.name}: {error}") from error

    def check_exit(self, node: Node) -> None:
        """An instance that ends in an orderly way has answered all of whom it had heard."""
        for key in node.heard:
            assert self.clients[key].ended, f"{node.name} left request {key} without an end"

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
            if key in self.submits:
                client.check_logprobs(f"request {key}", prompt, sampling, self.submits[key].logprob_start)

    def check_rest(self) -> None:
        """At rest nobody holds anything: every block of a living instance is free or cached."""
        for node in self.nodes.values():
            core = node.scheduler.core
            if node.alive and core is not None:
                counts = core.pool.audit()
                held = {k: v for k, v in counts.items() if k in ("owned", "incoming", "quarantined") and v}
                assert not held, f"{node.name} still holds {held}"
                assert not core.requests and not core.families, f"{node.name} still has requests"
