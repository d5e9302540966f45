"""One instance in a simulated cluster: a whole scheduler, a fake runner, and what its transfer thread would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from pd import messages as m
from pd.errors import PdError
from pd.scheduler import actions as ac
from pd.scheduler import events as ev
from pd.scheduler.core import SchedulerSettings
from pd.scheduler.state import Scheduler
from pd.testing.fake_runner import FakeRunner
from pd.testing.instance import note_reply, settings
from pd.types import Role

if TYPE_CHECKING:
    from pd.testing.sim_cluster import SimCluster


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
    compile_time: tuple[float, float] = (0.001, 0.004)
    unusable: frozenset[str] = frozenset()  # grammars that compile nowhere
    failing: dict[str, int] = field(default_factory=dict)  # see FakeRunner


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
        self.runner = FakeRunner(world.config.num_blocks, world.config.page_size, failing=world.config.failing)
        self.alive, self.frozen = True, False
        self.stepping = False
        self.exit: ac.Exit | None = None
        self.grants: dict[tuple[str, int], list[int]] = {}  # (sender, tag) -> blocks
        self.last_command = 0.0
        self.deaf = False  # its transfer thread hangs
        self.no_grammar = ""  # why its runner can use none
        self.heard: set[int] = set()  # keys of the clients' requests that it has been given
        self.lost_workers: set[int] = set()
        self.answers: dict[int, dict[str, object]] = {}  # to commands and questions, by token
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
                problem = "it makes no sense" if compile.grammar in world.config.unusable else self.no_grammar
                world.later(
                    world.draw(world.config.compile_time),
                    lambda: self.event(lambda now: ev.GrammarCompiled(now, compile.number, problem)),
                    node=self,
                )
            case ac.Reply(worker, message):
                self._replied(worker, message)
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
                world.check_exit(self)
                world.kill(self)

    def _replied(self, worker: int, message: m.SchedulerToApi) -> None:
        if isinstance(message, m.Answer):
            self.answers[message.token] = message.data
        if isinstance(message, m.StepOutputs):
            keys = [*np.frombuffer(message.keys_i64, "<i8").tolist(), *(f.key for f in message.finished)]
            assert all(key >> 40 == worker for key in keys), f"worker {worker} is told of another's requests"
        if worker not in self.lost_workers and self.world.owner_of(message) in (None, self):
            note_reply(self.world.clients, message)

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
                lambda: self._say(m.TransferPushed(push.tag, push.index, nbytes, push.peer, micros=500)),
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
