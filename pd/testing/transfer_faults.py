"""The conformance suite, second part: peers that die, freeze or come back, and memory that is taken back from them."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from pd.errors import PeerLost, TransferError
from pd.testing.transfer_harness import BLOCK, MARK, REUSED, TransferHarness
from pd.testing.transfer_peer import RemoteSide, checksum, pattern
from pd.transfer.digest import digest_span


class TransferFaults(TransferHarness):
    """Tests of `pd.testing.TransferConformance`."""

    # --- peers that die, freeze, come back ---

    def test_a_killed_receiver_is_noticed_quickly_and_others_go_on(self) -> None:
        victim, other = self.connected("victim"), self.connected("other")
        self.here.pattern(11)
        self.grant_all(victim, 1)
        rows = self.everything()
        victim.kill()
        start = time.monotonic()
        try:
            tickets = self.post_all(victim, rows, 1)
        except TransferError:
            tickets = []
        assert not [ticket for ticket in tickets if self.outcome(ticket, self.bound) != "failed"]
        assert time.monotonic() - start <= self.bound
        assert not [ticket for ticket in tickets if self.outcome(ticket, self.bound) != "failed"], "it stays so"
        self.works(other)
        self.bounded("reset_peer", lambda: self.here.reset_peer("victim"))

    def test_a_receiver_killed_in_the_middle_is_noticed_quickly(self) -> None:
        victim = self.connected("victim")
        self.here.pattern(12)
        self.grant_all(victim, 1)
        victim.freeze()
        try:
            tickets = self.post_all(victim, self.everything(), 1)
        except TransferError:
            tickets = []
        victim.kill()
        for ticket in tickets:
            assert self.outcome(ticket, self.bound) in ("failed", "applied")
        self.bounded("reset_peer", lambda: self.here.reset_peer("victim"))

    def test_a_frozen_receiver_holds_up_nobody_else(self) -> None:
        frozen, other = self.connected("frozen"), self.connected("other")
        self.here.pattern(13)
        self.grant_all(frozen, 1)
        frozen.freeze()
        tickets = self.bounded("post", lambda: self.post_all(frozen, self.everything(), 1))
        for ticket in tickets:
            self.bounded("poll", lambda ticket=ticket: self.here.poll(ticket))  # type: ignore[misc]
        self.works(other)
        frozen.thaw()
        for ticket in tickets:
            self.wait(ticket)

    def test_a_receiver_that_is_frozen_at_first_contact_holds_up_nobody_else(self) -> None:
        other, frozen = self.connected("other"), self.remote("frozen")
        descriptor = frozen.call("descriptor")
        self.grant_all(frozen, 1)
        frozen.freeze()
        self.here.pattern(17)
        rows = self.everything()
        try:
            self.bounded("connect", lambda: self.here.connect(descriptor))
        except PeerLost:
            self.works(other)
            return
        tickets = self.bounded("post", lambda: self.post_all(frozen, rows, 1))
        for ticket in tickets:
            self.bounded("poll", lambda ticket=ticket: self.here.poll(ticket))  # type: ignore[misc]
        source = self.here.memory.copy()
        self.works(other)
        self.bounded("reset_peer", lambda: self.here.reset_peer("frozen"))
        self.here.write(0, source)
        frozen.thaw()
        self.connect(frozen)
        self.works(frozen)

    def test_after_reset_no_reused_source_byte_reaches_a_frozen_receiver(self) -> None:
        remote = self.connected("there")
        source = pattern(14, self.region)
        self.here.write(0, source)
        self.grant_all(remote, 1)
        remote.freeze()
        tickets = self.post_all(remote, self.everything(), 1)
        self._reset_and_check(remote, tickets, source, thaw=True)

    def test_after_reset_no_reused_source_byte_arrives(self) -> None:
        remote = self.connected("there")
        source = pattern(15, self.region)
        for attempt in range(5):
            self.here.write(0, source)
            remote.call("fill", MARK)
            self.grant_all(remote, attempt)
            tickets = self.post_all(remote, self.everything(), attempt)
            time.sleep(0.001 * attempt)
            self._reset_and_check(remote, tickets, source, thaw=False, tag=attempt)
            self.connect(remote)
        self._quiet_after_linger(remote)

    def _quiet_after_linger(self, remote: RemoteSide) -> None:
        """The receiver may use its memory again: nothing that was sent before a reset still lands."""
        time.sleep(self.linger)
        remote.call("fill", MARK)
        time.sleep(0.3)
        assert remote.call("count", MARK) == self.region

    def _reset_and_check(
        self, remote: RemoteSide, tickets: list[int], source: np.ndarray, thaw: bool, tag: int = 1
    ) -> None:
        """Reset while a transfer of all of `source` is under way, reuse it at once, look at what got there."""
        states = [self._applied(ticket) for ticket in tickets]
        self.bounded("reset_peer", lambda: self.here.reset_peer(remote.identity))
        self.here.fill(REUSED)
        if thaw:
            remote.thaw()
        reported = [before or self._applied(ticket) for before, ticket in zip(states, tickets, strict=True)]
        time.sleep(0.3)
        # What was not reported by the time of the reset is never reported.
        assert [before or self._applied(ticket) for before, ticket in zip(states, tickets, strict=True)] == reported
        step = self.here.capabilities.max_spans_per_post
        landed = [row for i, row in enumerate(self.everything()) if reported[i // step]]
        arrived = remote.call("checksums", [[row[3], row[4]] for row in landed])
        assert arrived == [checksum(source[row[1] : row[1] + row[4]]) for row in landed], "reported, but not there"
        self._no_reused_byte(remote, tag)
        if thaw and not self.receiver_driven:
            self._quiet_after_linger(remote)

    def _no_reused_byte(self, remote: RemoteSide, tag: int) -> None:
        """None has come, or none is taken for a landing and none can come any more."""
        if not self.receiver_driven:
            assert remote.call("count", REUSED) == 0
            return
        reused = digest_span(np.full(BLOCK, REUSED, dtype=np.uint8), 0)
        digests = remote.call("take_digests", tag, "here")
        assert not [row for row in digests if row[3] == reused], "reused bytes were taken for a landing"
        assert remote.call("revoke", tag, "here")
        remote.call("fill", MARK)
        time.sleep(0.3)
        assert remote.call("count", MARK) == self.region

    def _applied(self, ticket: int) -> bool:
        try:
            return self.here.poll(ticket)
        except TransferError:
            return False

    def test_a_restarted_receiver_is_a_new_peer(self) -> None:
        first = self.connected("there#1")
        self.works(first)
        old = first.call("descriptor")
        first.kill()
        second = self.remote("there#2")
        try:
            self.here.connect(old)
        except PeerLost:
            pass
        else:
            raise AssertionError("connected to an incarnation that is dead")
        self.connect(second)
        self.works(second)

    def restart(self, remote: RemoteSide, identity: str) -> RemoteSide:
        """A receiver after `remote`, which was killed. A backend whose address can be chosen gives it the same one."""
        return self.remote(identity)

    def test_what_was_sent_to_a_receiver_never_lands_in_the_one_restarted_in_its_place(self) -> None:
        first = self.connected("there#1")
        self.here.fill(REUSED)
        self.grant_all(first, 1)
        first.freeze()
        try:
            tickets = self.post_all(first, self.everything(), 1)
        except TransferError:
            tickets = []
        first.kill()
        second = self.restart(first, "there#2")
        self.grant_all(second, 1)
        self.connect(second)
        self.first_write(second)
        for ticket in tickets:
            assert self.outcome(ticket, self.bound) in ("failed", "applied")
        assert second.call("count", REUSED) == 0
        self.bounded("reset_peer", lambda: self.here.reset_peer("there#1"))
        self.works(second)

    def test_the_same_peer_can_be_connected_again_after_a_reset_and_others_go_on(self) -> None:
        remote, other = self.connected("there"), self.connected("other")
        self.works(remote, 1)
        self.here.reset_peer("there")
        self.works(other)
        self.connect(remote)
        self.works(remote, 2)

    # --- close ---

    def test_after_close_no_reused_source_byte_reaches_a_frozen_receiver(self) -> None:
        remote = self.connected("there")
        self.here.pattern(16)
        self.grant_all(remote, 1)
        remote.freeze()
        self.post_all(remote, self.everything(), 1)
        self._sides.remove(self.here)
        self.bounded("close", self.here.close)
        self.here.fill(REUSED)
        remote.thaw()
        time.sleep(0.3)
        self._no_reused_byte(remote, 1)

    def test_a_sender_that_has_closed_can_be_expelled(self) -> None:
        sender = self.sender("there")
        self.writes(sender)
        sender.call("close")
        self.until(lambda: self.here.expel("there"))

    def test_a_receiver_that_has_closed_is_noticed_quickly_and_takes_nothing_more(self) -> None:
        sender = self.sender("there")
        self.writes(sender)
        self.here.grant(2, [[0, self.region]], "there")
        self._sides.remove(self.here)
        self.bounded("close", self.here.close)
        self.here.fill(MARK)
        with contextlib.suppress(TransferError):
            ticket = sender.call("post", "here", self.rows([(0, 0)]), 2)
            deadline = time.monotonic() + self.bound
            while not sender.call("poll", ticket):
                assert time.monotonic() < deadline
            raise AssertionError("written to a receiver that has closed")
        assert not self.here.count(REUSED)

    # --- revoke and expel ---

    def test_after_a_revoke_nothing_of_the_hand_off_lands(self) -> None:
        self.need(self.here.capabilities.revocable, "this backend cannot revoke")
        remote = self.sender("there")
        rows = self.everything()[: self.here.capabilities.max_spans_per_post]
        for tag in range(1, 9):
            self.here.fill(MARK)
            self.here.grant(tag, [[0, self.region]], "there")
            # The same bytes several times over, so that the revoke comes in the middle.
            tickets = [remote.call("post", "here", rows, tag) for _ in range(6)]
            time.sleep(0.0005 * tag)
            assert self.bounded("revoke", lambda tag=tag: self.here.revoke(tag, "there"))  # type: ignore[misc]
            self.here.fill(MARK)
            self.until(lambda tickets=tickets: all(self._ended(remote, ticket) for ticket in tickets))  # type: ignore[misc]
            assert not self.here.count(REUSED), "bytes landed after revoke"
        # The hand-off that is not revoked is not harmed.
        self.here.grant(99, [[0, BLOCK]], "there")
        ticket = remote.call("post", "here", self.rows([(0, 0)]), 99)
        self.until(lambda: remote.call("poll", ticket))
        assert self.here.count(REUSED) == BLOCK

    @staticmethod
    def _ended(remote: RemoteSide, ticket: int) -> bool:
        try:
            return bool(remote.call("poll", ticket))
        except TransferError:
            return True

    def test_a_frozen_sender_does_not_hold_up_revoke_or_expel(self) -> None:
        self.need(self.here.capabilities.revocable, "this backend cannot revoke")
        remote = self.sender("there")
        rows = self.everything()[: self.here.capabilities.max_spans_per_post]
        tags = range(1, 9)
        for tag in tags:
            self.here.grant(tag, [[0, self.region]], "there")
        for tag in tags:  # more than goes through before the freeze
            remote.call("post", "here", rows, tag)
        remote.freeze()
        time.sleep(0.3)  # what was on its way arrives; the receiver now waits in the middle
        for tag in tags[:-1]:
            assert self.bounded("revoke", lambda tag=tag: self.here.revoke(tag, "there"))  # type: ignore[misc]
        assert self.bounded("expel", lambda: self.here.expel("there"))
        self.here.fill(MARK)
        remote.thaw()
        time.sleep(0.5)
        assert not self.here.count(REUSED)

    def test_an_expelled_sender_writes_nothing_any_more(self) -> None:
        remote = self.sender("there")
        self.here.grant(1, [[0, self.region]], "there")
        remote.call("post", "here", self.everything()[: self.here.capabilities.max_spans_per_post], 1)
        if not self.here.capabilities.revocable:
            assert not self.here.revoke(1, "there"), "it cannot know that"
        quiet = self.bounded("expel", lambda: self.here.expel("there"))
        assert quiet or not self.here.capabilities.revocable
        if not quiet:
            return
        self.here.fill(MARK)
        try:
            remote.call("connect", self.here.descriptor())
            remote.call("post", "here", self.rows([(0, 0)]), 2)
        except TransferError:
            pass
        time.sleep(0.3)
        assert not self.here.count(REUSED)

    def test_expelling_a_sender_leaves_others_alone(self) -> None:
        expelled, other = self.sender("there"), self.sender("there-too")
        for tag, sender in enumerate((expelled, other)):
            self.writes(sender, tag, tag)
        self.bounded("expel", lambda: self.here.expel("there"))
        self.writes(other, 2, 2)

    def test_a_dead_sender_can_be_expelled(self) -> None:
        remote = self.sender("there")
        self.here.grant(1, [[0, self.region]], "there")
        remote.call("post", "here", self.everything()[: self.here.capabilities.max_spans_per_post], 1)
        remote.kill()

        def quiet() -> bool:
            return self.bounded("expel", lambda: self.here.expel("there"))

        self.until(quiet, 20.0)
        self.here.fill(MARK)
        time.sleep(0.3)
        assert not self.here.count(REUSED)
        self.writes(self.sender("there#2"), 0, 2)
        assert self.here.count(REUSED) == BLOCK
