"""A simulated data plane for the hand-off: memory, one-sided writes that may land late, and the runners' answers.

Every block of a decode instance's memory has an owner, the tag of the hand-off that it was granted to. A write that
lands anywhere else, or that reads a source block which was given back, is a `Violation`.
Backends are honest about quiet and nothing else: a push that failed may still land until shortly after its peer was
reset, and writes of a dead sender may land until it was expelled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pd import messages as m
from pd.scheduler.handoff_base import ints, to_i32, to_u64

if TYPE_CHECKING:
    from pd.testing.handoff_sides import DecodeHost, Job, PrefillHost

MASK = 0xFFFFFFFFFFFFFFFF


class Violation(AssertionError):
    """A rule of the hand-off was broken."""


def value(prompt: int, page: int, head: int) -> int:
    """What a kv head of a prompt's page holds."""
    return ((prompt * 1_000_003 + page * 8191 + head) * 0x9E3779B97F4A7C15 + 1) & MASK


@dataclass(eq=False)
class Posted:
    """One push in flight from one sending rank."""

    tag: int
    index: int
    peer: str
    left: int
    broken: bool = False  # its failure was reported


@dataclass(eq=False)
class Write:
    """One block of a push, on its way. `job` is None when the sender died: its bytes are in buffers already."""

    runner: PrefillRunner
    receiver: DecodeRunner
    posted: Posted
    job: Job | None
    src: int
    dst: int
    values: dict[int, int]  # kv head -> content
    not_before: float = 0.0  # a slow one
    not_after: float = 0.0  # in the network's buffers: it lands by then, or (0) at any time


class Runner:
    """One rank. Commands are taken in order, at any time; so are its events."""

    def __init__(self, host: Any, info: m.RankInfo) -> None:
        self.host, self.world, self.info = host, host.world, info
        self.commands: deque[m.TransferCommand] = deque()
        self.events: deque[m.TransferEvent] = deque()

    def heads(self) -> range:
        return range(*self.info.kv_heads)


class DecodeRunner(Runner):
    """Receiver. A revocable one applies only what is granted; another applies whatever arrives."""

    host: DecodeHost

    def __init__(self, host: DecodeHost, info: m.RankInfo, blocks: int) -> None:
        super().__init__(host, info)
        self.revocable = self.world.revocable
        self.grants: dict[tuple[str, int], frozenset[int]] = {}
        self.shut: set[str] = set()
        self.content: list[dict[int, int]] = [{} for _ in range(blocks)]

    def obey(self, command: Any) -> None:
        if isinstance(command, m.TransferGrant):
            self.grants[command.sender, command.tag] = frozenset(ints(command.blocks_i32))
        elif isinstance(command, m.TransferRevoke):
            self.grants.pop((command.sender, command.tag), None)
            if command.over and self.world.writes_of(self.host, command.tag, command.sender):
                raise Violation(f"tag {command.tag:x} is said to be over while a write of it is in flight")
            quiet = command.over or (self.revocable and not self.world.chance(0.05))
            self.events.append(m.TransferRevoked(command.tag, quiet, command.sender, self.info.rank))
        elif isinstance(command, m.TransferVerify):
            self._verify(command)
        elif isinstance(command, m.TransferExpel):
            self.shut.add(command.sender)
            quiet = not self.world.chance(0.3)
            if quiet:
                self.world.drop_writes(lambda w: w.receiver is self and w.runner.info.identity == command.sender)
            self.events.append(m.TransferExpelled(command.sender, quiet, self.info.rank))

    def _verify(self, command: m.TransferVerify) -> None:
        self.grants.pop((command.sender, command.tag), None)
        blocks = ints(command.blocks_i32)
        sums = [sum(self.content[b].values()) & MASK for b in blocks]
        bad: list[int] = []
        if command.digests_u64:
            wanted = [int.from_bytes(command.digests_u64[i : i + 8], "little") for i in range(0, 8 * len(blocks), 8)]
            bad = [b for b, mine, theirs in zip(blocks, sums, wanted, strict=True) if mine != theirs]
        event = m.TransferVerified(command.tag, to_i32(bad), 0, "", command.sender, to_u64(sums), self.info.rank)
        self.events.append(event)

    def apply(self, write: Write) -> bool:
        """Land a write; False when this runner refuses it."""
        if not self.host.alive:
            return False
        tag, sender = write.posted.tag, write.runner.info.identity
        if self.revocable and write.dst not in self.grants.get((sender, tag), ()):
            return False
        self.host.check_write(tag, write.dst)
        self.content[write.dst].update(write.values)
        return True


class PrefillRunner(Runner):
    """Sender. Writes of a push land one by one, in any order, whatever was reported of the push."""

    host: PrefillHost

    def __init__(self, host: PrefillHost, info: m.RankInfo) -> None:
        super().__init__(host, info)
        self.connected: set[str] = set()
        self.cancelled: set[tuple[str, int]] = set()
        self.posted: dict[int, Posted] = {}

    def obey(self, command: Any) -> None:
        if isinstance(command, m.TransferConnect):
            self._connect(command.peer)
        elif isinstance(command, m.TransferPush):
            self._push(command.push)
        elif isinstance(command, m.TransferCancel):
            self.cancelled.add((command.peer, command.tag))
        elif isinstance(command, m.TransferResetPeer):
            self._reset(command.peer)

    def _connect(self, peer: str) -> None:
        receiver = self.world.decode_runner(peer)
        if receiver is None or self.info.identity in receiver.shut or self.world.faulty(0.03):
            self.events.append(m.TransferPeerLost(peer, "no connection", self.info.rank))
        else:
            self.connected.add(peer)
            self.events.append(m.TransferConnected(peer, self.info.rank))

    def _push(self, push: m.Push) -> None:
        receiver = self.world.decode_runner(push.peer)
        heads = [h for h in self.heads() if receiver is None or h in receiver.heads()]
        if not heads:
            return  # another rank's business
        if push.peer not in self.connected or (push.peer, push.tag) in self.cancelled:
            self._failed(push.tag, push.index, push.peer, True)
            return
        if receiver is None or self.info.identity in receiver.shut:
            self._failed(push.tag, push.index, push.peer, self.world.chance(0.5))
            return
        src, dst = ints(push.src_i32), ints(push.dst_i32)
        posted = self.posted[push.index] = Posted(push.tag, push.index, push.peer, len(src))
        job = self.host.job_of(push.tag, push.peer)
        slow = self.world.now + self.world.random.uniform(0.5, 8.0) if self.world.faulty(0.25) else 0.0
        for s, d in zip(src, dst, strict=True):
            page = job.page_of(s)
            values = {h: value(job.prompt, page, h) for h in heads}
            if self.world.faulty(0.01):
                values[heads[0]] ^= 1
            self.world.writes.append(Write(self, receiver, posted, job, s, d, values, slow))

    def _failed(self, tag: int, index: int, peer: str, quiet: bool) -> None:
        self.events.append(m.TransferFailed(tag, index, "simulated", peer, quiet, self.info.rank))

    def _reset(self, peer: str) -> None:
        self.connected.discard(peer)
        if self.world.chance(0.5):  # a new connection knows nothing of what was cancelled on the old one
            self.cancelled = {pair for pair in self.cancelled if pair[0] != peer}
        for posted in [p for p in self.posted.values() if p.peer == peer]:
            del self.posted[posted.index]
            if not posted.broken and self.world.chance(0.5):
                self._failed(posted.tag, posted.index, peer, False)
        for write in self.world.writes:
            if write.runner is self and write.posted.peer == peer and self.world.chance(0.5):
                write.job, write.not_before = None, 0.0
                write.not_after = self.world.now + 0.7 * self.world.config.reset_linger
        self.world.drop_writes(lambda w: w.runner is self and w.posted.peer == peer and not w.not_after)
        self.events.append(m.TransferReset(peer, self.info.rank))

    def break_push(self, posted: Posted) -> None:
        """Report a failure; what is in flight stays so."""
        if not posted.broken and posted.index in self.posted:
            posted.broken = True
            self._failed(posted.tag, posted.index, posted.peer, False)

    def landed(self, write: Write, applied: bool) -> None:
        posted = write.posted
        if not applied:
            self.break_push(posted)
            return
        posted.left -= 1
        if posted.left == 0 and not posted.broken and posted.index in self.posted:
            del self.posted[posted.index]
            self.events.append(m.TransferPushed(posted.tag, posted.index, 64, posted.peer, self.info.rank))
