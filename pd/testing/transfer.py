"""The conformance suite for transfer backends. A backend's own test file:

    from pd.testing import TransferConformance

    class TestMyBackend(TransferConformance):
        factory = "my_backend.plugin:make"     # (BackendContext) -> TransferBackend
        options = {"ib_device": "mlx5_0"}
        environment = {"UCX_TLS": "tcp"}

Every test starts real processes of its own. Only what the class lists in `exceptions`, with a reason, is left out:

    exceptions = dict.fromkeys(NOT_REVOCABLE, "the engine knows no hand-offs") | {"test_…": "why"}
"""

from __future__ import annotations

import threading
import time

import numpy as np

from pd.errors import PeerLost, TransferError
from pd.testing.transfer_faults import TransferFaults
from pd.testing.transfer_harness import BLOCK, KIB, MARK, MIB
from pd.testing.transfer_peer import RemoteSide, checksum, pattern
from pd.transfer.digest import digest_span


class TransferConformance(TransferFaults):
    """Subclass it and set `factory`; see the module.

    `receiver_driven`, `authenticates` and the bounds are described in `TransferHarness`.
    """

    # --- moving bytes ---

    def test_scattered_writes_of_all_sizes_arrive_whole_and_nothing_else_changes(self) -> None:
        remote = self.connected("there")
        self.here.pattern(1)
        rows, at = [], 0
        sizes = [8, 24, 1 * KIB, 4 * KIB, 8 + 16 * KIB, BLOCK, 256 * KIB, MIB]
        for i in range(48):
            length = sizes[i % len(sizes)]
            rows.append([0, (self.region - (i + 1) * MIB // 2) // 8 * 8 % (self.region - MIB), 0, at, length])
            at += length + 8 * (i % 5)
        self.grant_all(remote, 5)
        for ticket in self.post_all(remote, rows, 5):
            self.wait(ticket)
        remote.call("fence", "here")
        assert remote.call("checksum") == checksum(self.expected(rows))

    def test_a_whole_pool_in_one_post_of_many_spans_arrives(self) -> None:
        remote = self.connected("there")
        self.here.pattern(2)
        rows = self.everything()
        self.grant_all(remote, 6)
        for ticket in self.post_all(remote, rows, 6):
            self.wait(ticket)
        remote.call("fence", "here")
        assert remote.call("checksum") == checksum(self.expected(rows))

    def test_another_process_writes_here(self) -> None:
        remote = self.remote("there")
        remote.call("connect", self.here.descriptor())
        remote.call("pattern", 3)
        rows = self.everything()
        self.here.grant(7, [[0, self.region]], "there")
        step = self.here.capabilities.max_spans_per_post
        for i in range(0, len(rows), step):
            ticket = remote.call("post", "here", rows[i : i + step], 7)
            self.until(lambda ticket=ticket: remote.call("poll", ticket))  # type: ignore[misc]
        self.here.fence("there")
        source = pattern(3, self.region)
        order = [row[1] // BLOCK for row in rows]
        assert np.array_equal(self.here.memory, source.reshape(-1, BLOCK)[order].reshape(-1))

    def test_several_posts_to_one_peer_may_be_under_way(self) -> None:
        remote = self.connected("there")
        self.here.pattern(4)
        rows = self.everything()
        for tag in range(8):
            self.grant_all(remote, tag)
        tickets = [self.here.post(remote.identity, rows[tag::8][:64], tag) for tag in range(8)]
        for ticket in reversed(tickets):
            self.wait(ticket)
        remote.call("fence", "here")
        wanted = [row for tag in range(8) for row in rows[tag::8][:64]]
        assert remote.call("checksum") == checksum(self.expected(wanted))

    def test_many_peers_at_once_each_get_their_own_bytes(self) -> None:
        remotes = [self.connected(f"there-{i}") for i in range(3)]
        self.here.pattern(5)
        tickets, rows = [], {}
        for i, remote in enumerate(remotes):
            rows[remote.identity] = self.rows([(i * 16 + j, 3 * j + i) for j in range(16)])
            self.grant_all(remote, i)
            tickets += self.post_all(remote, rows[remote.identity], i)
        for ticket in tickets:
            self.wait(ticket)
        for remote in remotes:
            remote.call("fence", "here")
            assert remote.call("checksum") == checksum(self.expected(rows[remote.identity]))

    def test_threads_may_post_to_different_peers_at_the_same_time(self) -> None:
        self.need(self.here.capabilities.concurrent_posts, "this backend is driven by one thread")
        remotes = [self.connected(f"there-{i}") for i in range(2)]
        self.here.pattern(6)
        rows = self.rows([(j, 2 * j) for j in range(64)])
        errors: list[BaseException] = []

        def drive(remote: RemoteSide) -> None:
            try:
                for tag in range(4):
                    ticket = self.here.backend.post(
                        self.here._peers[remote.identity], np.array(rows, dtype=np.uint64), tag
                    )
                    deadline = time.monotonic() + 20
                    while not self.here.backend.poll(ticket):
                        assert time.monotonic() < deadline
                        time.sleep(0.0005)
            except BaseException as error:
                errors.append(error)

        for remote in remotes:
            for tag in range(4):
                self.grant_all(remote, tag)
        threads = [threading.Thread(target=drive, args=(remote,)) for remote in remotes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        for remote in remotes:
            remote.call("fence", "here")
            assert remote.call("checksum") == checksum(self.expected(rows))

    def test_the_digests_of_a_landing_are_those_of_its_blocks(self) -> None:
        self.need(self.here.capabilities.returns_digests, "this backend returns no digests")
        remote = self.connected("there")
        self.here.pattern(7)
        # One span over two and a half blocks, one inside a block.
        rows = [[0, 0, 0, BLOCK, 2 * BLOCK + BLOCK // 2], [0, 5 * BLOCK + 64, 0, 8 * BLOCK + 128, 4096]]
        self.grant_all(remote, 9)
        self.wait(self.here.post(remote.identity, rows, 9))
        remote.call("fence", "here")
        memory = self.here.memory
        expected = [
            [0, BLOCK, BLOCK, digest_span(memory[:BLOCK], 0)],
            [0, 2 * BLOCK, BLOCK, digest_span(memory[BLOCK : 2 * BLOCK], 0)],
            [0, 3 * BLOCK, BLOCK // 2, digest_span(memory[2 * BLOCK : 2 * BLOCK + BLOCK // 2], 0)],
            [0, 8 * BLOCK + 128, 4096, digest_span(memory[5 * BLOCK + 64 : 5 * BLOCK + 64 + 4096], 128 // 8)],
        ]
        assert remote.call("take_digests", 9, "here") == expected
        assert remote.call("take_digests", 9, "here") == []

    def test_every_region_is_moved_as_its_own(self) -> None:
        here, remote = self.local("with two", regions=2), self.remote("there", regions=2)
        here.connect(remote.call("descriptor"))
        sources = [pattern(18 + region, self.region) for region in (0, 1)]
        for region in (0, 1):
            here.write(0, sources[region], region)
            remote.call("grant", 1, [[0, self.region]], "with two", region)
        rows = [[i % 2, (5 * i + region) * BLOCK, region, i * BLOCK, BLOCK] for region in (0, 1) for i in range(8)]
        ticket = here.post("there", rows, 1)
        self.until(lambda: here.poll(ticket))
        remote.call("fence", "with two")
        for region in (0, 1):
            expected = np.full(self.region, MARK, dtype=np.uint8)
            for source, offset, target, at, length in rows:
                if target == region:
                    expected[at : at + length] = sources[source][offset : offset + length]
            assert remote.call("checksum", region) == checksum(expected)

    # --- what must be refused ---

    def test_a_damaged_descriptor_is_refused_and_a_good_one_still_works(self) -> None:
        remote = self.remote("there")
        good = bytes.fromhex(remote.call("descriptor"))
        for bad in (b"", b"\x00", good[: len(good) // 2], good[:-1], b"\xff" * 200, b"x" + good):
            try:
                self.here.backend.connect(bad)
            except TransferError:
                continue
            raise AssertionError(f"accepted {bad!r}")
        self.connect(remote)
        self.works(remote)

    def test_an_address_outside_a_region_is_refused_and_touches_nothing(self) -> None:
        remote = self.connected("there")
        self.here.pattern(8)
        huge = (1 << 64) - BLOCK
        for tag, row in enumerate(
            (
                [0, self.region - 8, 0, 0, BLOCK],
                [0, 0, 0, self.region - 8, BLOCK],
                [0, self.region, 0, 0, 8],
                [0, 0, 0, huge, 2 * BLOCK],
                [0, huge, 0, 0, 2 * BLOCK],
                [1, 0, 0, 0, BLOCK],
                [0, 0, 1, 0, BLOCK],
            )
        ):
            self.grant_all(remote, tag)
            try:
                outcome = self.outcome(self.here.post(remote.identity, [row], tag), 10.0)
            except TransferError:
                outcome = "failed"
            assert outcome == "failed", row
        assert remote.call("count", MARK) == self.region
        if self.here.capabilities.quiet_errors:
            self.works(remote)

    def test_only_what_is_granted_lands(self) -> None:
        self.need(self.here.capabilities.revocable, "this backend grants nothing by hand-off")
        remote = self.connected("there")
        self.here.pattern(10)
        remote.call("grant", 1, [[4 * BLOCK, 2 * BLOCK]], "here")
        remote.call("grant", 2, [[0, self.region]], "somebody else")
        for tag, block, length in ((1, 3, BLOCK), (1, 5, 2 * BLOCK), (1, 6, BLOCK), (2, 4, BLOCK), (3, 4, BLOCK)):
            ticket = self.here.post(remote.identity, [[0, 0, 0, block * BLOCK, length]], tag)
            assert self.outcome(ticket, 10.0) == "failed", (tag, block)
        # One span that is not granted spoils its whole post.
        ticket = self.here.post(remote.identity, self.rows([(0, 4), (1, 9)]), 1)
        assert self.outcome(ticket, 10.0) == "failed"
        assert remote.call("count", MARK) == self.region
        rows = self.rows([(0, 4), (1, 5)])
        self.wait(self.here.post(remote.identity, rows, 1))
        assert remote.call("checksum") == checksum(self.expected(rows))

    def test_a_peer_without_the_secret_is_refused(self) -> None:
        self.need(self.authenticates, "this backend does not authenticate peers")
        stranger = self.remote("there", secret="not the secret")
        try:
            self.here.connect(stranger.call("descriptor"))
        except PeerLost:
            return
        raise AssertionError("connected to a peer that does not know the secret")

    def test_nothing_listens_beyond_the_configured_host(self) -> None:
        remote = self.connected("there")
        self.works(remote)
        assert set(remote.call("listeners")) <= {self.host}

    # --- cost ---

    def test_an_idle_peer_costs_no_cpu(self) -> None:
        remote = self.connected("there")
        self.works(remote)
        remote.call("over", "here")
        used: list[float] = []  # on a machine that is busy with other things the same work costs more at times
        while len(used) < 3 and min(used, default=1.0) > self.idle_cpu:
            used.append(self._idle(remote, self.idle_seconds))
        assert min(used) <= self.idle_cpu, f"{min(used):.1%} of a core while idle, at most {self.idle_cpu:.1%}"

    def _idle(self, remote: RemoteSide, seconds: float) -> float:
        """Share of a core that the busier side uses, driven as the core drives it."""
        there, here = remote.call("cpu_seconds"), time.process_time()
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            due = self.here.drive()
            time.sleep(left if due is None else min(left, due))
        return float(max(remote.call("cpu_seconds") - there, time.process_time() - here)) / seconds
