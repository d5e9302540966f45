"""What the conformance suite's tests stand on: sides, peers, spans and bounded waits."""

from __future__ import annotations

import os
import time
import unittest
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from pd.errors import TransferError
from pd.testing.transfer_peer import RemoteSide, Side, checksum, pattern

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
FIRST_TAG = 1 << 41
REUSED, MARK = 255, 0  # bytes that `pattern` never makes


#: Tests that need a capability: what to name in `exceptions`, with the reason, for a backend without it.
NOT_REVOCABLE = (
    "test_only_what_is_granted_lands",
    "test_after_a_revoke_nothing_of_the_hand_off_lands",
    "test_a_frozen_sender_does_not_hold_up_revoke_or_expel",
)
NO_DIGESTS = ("test_the_digests_of_a_landing_are_those_of_its_blocks",)
ONE_THREAD = ("test_threads_may_post_to_different_peers_at_the_same_time",)
NO_AUTHENTICATION = ("test_a_peer_without_the_secret_is_refused",)


class TransferHarness:
    """Settings and helpers of `pd.testing.TransferConformance`."""

    factory: ClassVar[str] = ""
    #: An end of a transfer; its module, run as a program, calls `pd.testing.transfer_peer.main` with it.
    side: ClassVar[type[Side]] = Side
    options: ClassVar[Mapping[str, str]] = {}
    #: Variables in the environment of both sides.
    environment: ClassVar[Mapping[str, str]] = {}
    host: ClassVar[str] = "127.0.0.1"
    secret: ClassVar[str] = ""
    #: The receiver fetches: after reset_peer it may still read, but reports nothing and writes only what is granted.
    receiver_driven: ClassVar[bool] = False
    #: Refuses peers that do not know the secret.
    authenticates: ClassVar[bool] = False
    region: ClassVar[int] = 32 * MIB
    #: Seconds within which a dead peer is noticed, and revoke, expel and reset_peer return.
    bound: ClassVar[float] = 6.0
    #: Share of a core that an idle peer may cost, and for how many seconds that is measured.
    idle_cpu: ClassVar[float] = 0.03
    idle_seconds: ClassVar[float] = 3.0
    #: After reset_peer, bytes that were handed to the network before may still land for this long.
    linger: ClassVar[float] = 1.0
    #: Tests that a backend's engine cannot pass -> why; each is explained in the backend's README.
    exceptions: ClassVar[Mapping[str, str]] = {}

    def setup_method(self, method: Any = None) -> None:
        unknown = [name for name in self.exceptions if not hasattr(self, name)]
        assert not unknown, f"exceptions that are no tests: {unknown}"
        self._remotes: list[RemoteSide] = []
        self._sides: list[Side] = []
        if reason := self.exceptions.get(getattr(method, "__name__", "")):
            raise unittest.SkipTest(reason)
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            self.here = self.local("here")
        except BaseException:
            self.teardown_method(method)
            raise

    def teardown_method(self, method: Any = None) -> None:
        for remote in self._remotes:
            remote.kill()
        for side in self._sides:
            side.close()
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

    # --- helpers, also for a backend's own tests ---

    def local(self, identity: str, regions: int = 1) -> Side:
        side = self.side(self.factory, self.host, self.secret, self.options)
        self._sides.append(side)
        side.open(identity, self.region, BLOCK, regions)
        return side

    def remote(self, identity: str, secret: str | None = None, regions: int = 1) -> RemoteSide:
        secret = self.secret if secret is None else secret
        remote = RemoteSide(self.factory, self.host, secret, self.options, module=self.side.__module__)
        self._remotes.append(remote)
        remote.identity = identity
        remote.call("open", identity, self.region, BLOCK, regions)
        return remote

    def sender(self, identity: str) -> RemoteSide:
        """A new peer process that is connected to this one, and whose memory is full of REUSED."""
        remote = self.remote(identity)
        remote.call("connect", self.here.descriptor())
        remote.call("fill", REUSED)
        return remote

    def writes(self, sender: RemoteSide, block: int = 0, tag: int = 1) -> None:
        """A sender's block gets here."""
        self.here.grant(tag, [[block * BLOCK, BLOCK]], sender.identity)
        ticket = sender.call("post", "here", self.rows([(0, block)]), tag)
        self.until(lambda: sender.call("poll", ticket))
        self.here.fence(sender.identity)
        assert (self.here.memory[block * BLOCK : (block + 1) * BLOCK] == REUSED).all()

    def connected(self, identity: str) -> RemoteSide:
        """A new peer process to which this process is connected as sender, and has written once."""
        remote = self.remote(identity)
        self.connect(remote)
        self.first_write(remote)
        return remote

    def first_write(self, remote: RemoteSide) -> None:
        """Bytes that change nothing: an engine may put off until then what connecting costs."""
        self.here.fill(MARK, 0, 8)
        self.grant_all(remote, FIRST_TAG)
        self.wait(self.here.post(remote.identity, [[0, 0, 0, 0, 8]], FIRST_TAG))
        if self.here.capabilities.returns_digests:
            remote.call("take_digests", FIRST_TAG, "here")

    def connect(self, remote: RemoteSide) -> None:
        assert self.here.connect(remote.call("descriptor")) == remote.identity

    def need(self, capability: bool, what: str) -> None:
        """Fails: only `exceptions` may leave a test out."""
        assert capability, f"{what}: name this test in `exceptions`, with the reason, and in the package's README"

    def until(self, done: Callable[[], bool], timeout: float = 20.0) -> None:
        """Poll `done`, driving the local backend, until it is true."""
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, f"not done within {timeout:g} s"
            for side in self._sides:
                side.drive()
            time.sleep(0.0005)

    def wait(self, ticket: int, timeout: float = 20.0) -> None:
        """Until a local ticket is applied. Raises what `poll` raises."""
        self.until(lambda: self.here.poll(ticket), timeout)

    def outcome(self, ticket: int, timeout: float) -> str:
        """ "applied", "failed", or "pending" after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                if self.here.poll(ticket):
                    return "applied"
            except TransferError:
                return "failed"
            time.sleep(0.001)
        return "pending"

    def bounded(self, what: str, call: Callable[[], Any]) -> Any:
        """The result of a call that must come within `bound` seconds."""
        start = time.monotonic()
        result = call()
        took = time.monotonic() - start
        assert took <= self.bound, f"{what} took {took:.1f} s"
        return result

    @staticmethod
    def rows(pairs: Sequence[tuple[int, int]], length: int = BLOCK) -> list[list[int]]:
        """Spans from (local block, remote block), sorted as the core sorts them."""
        return sorted(([0, a * length, 0, b * length, length] for a, b in pairs), key=lambda row: row[3])

    def everything(self) -> list[list[int]]:
        """The whole region, block by block in another order, so that no two spans merge."""
        count = self.region // BLOCK
        order = np.random.default_rng(9).permutation(count).tolist()
        return self.rows(list(zip(order, range(count), strict=True)))

    def grant_all(self, remote: RemoteSide, tag: int, sender: str = "here") -> None:
        remote.call("grant", tag, [[0, self.region]], sender)

    def post_all(self, remote: RemoteSide, rows: list[list[int]], tag: int) -> list[int]:
        """Tickets of as many posts as the spans need."""
        step = self.here.capabilities.max_spans_per_post
        return [self.here.post(remote.identity, rows[i : i + step], tag) for i in range(0, len(rows), step)]

    def expected(self, rows: list[list[int]], base: int = MARK) -> np.ndarray:
        """What the receiver's region holds after these spans, given that it held `base` before."""
        out, memory = np.full(self.region, base, dtype=np.uint8), self.here.memory
        for _, source, _, target, length in rows:
            out[target : target + length] = memory[source : source + length]
        return out

    def works(self, remote: RemoteSide, tag: int = 1 << 40) -> None:
        """One block gets there."""
        self.here.write(0, pattern(77, BLOCK))
        remote.call("fill", MARK)
        remote.call("grant", tag, [[BLOCK, BLOCK]], "here")
        rows = self.rows([(0, 1)])
        self.wait(self.here.post(remote.identity, rows, tag))
        remote.call("fence", "here")
        assert remote.call("checksum") == checksum(self.expected(rows))
