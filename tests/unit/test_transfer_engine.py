"""The transfer core around a scripted backend: every push and command ends, and failed never means quiet."""

import numpy as np
import pytest

from pd.errors import PeerLost, TransferError
from pd.messages import (
    Push,
    TransferCancel,
    TransferConnect,
    TransferConnected,
    TransferExpel,
    TransferExpelled,
    TransferFailed,
    TransferGrant,
    TransferPeerLost,
    TransferPush,
    TransferPushed,
    TransferReset,
    TransferResetPeer,
    TransferRevoke,
    TransferRevoked,
    TransferVerified,
    TransferVerify,
)
from pd.transfer.digest import DigestGeometry, digest_block
from pd.transfer.engine import seal
from pd.transfer.landing import Receiving
from pd.transfer.queues import POSTS_IN_FLIGHT, PushQueue
from pd.transfer.spans import Pool, push_spans
from pd.transfer.staging import Staging
from pd.types import BlockShape
from tests.transfer_kit import (
    SHAPE,
    Engine,
    FakeDevice,
    NoDevice,
    ScriptedBackend,
    capabilities,
    contents,
    i32,
    pool,
    u64,
)

SIZE = SHAPE.nbytes


def push(index=0, peer="D", tag=7, src=(1,), dst=(2,), group=0):
    return Push(peer, tag, index, i32(*src), i32(*dst), 0, group)


class Sender:
    """A push queue without threads, with its peers and everything that it reported."""

    def __init__(self, peers=("D",), timeout=30.0, automatic=True, **changes):
        self.network = {}
        self.backend = ScriptedBackend(self.network, capabilities(**changes), automatic)
        self.backend.open("P")
        self.pool = pool(8, 5)
        contents(self.pool)[:] = np.random.default_rng(0).integers(0, 256, (8, SIZE), dtype=np.uint8)
        self.backend.register([self.pool.region])
        self.events = []
        staging = Staging(self.backend, [self.pool], NoDevice())
        self.queue = PushQueue(self.backend, [self.pool], staging, self.events.append, timeout, clock=lambda: 0.0)
        self.peers = {}
        for name in peers:
            there = ScriptedBackend(self.network)
            there.open(name)
            self.peers[name] = pool(8)
            there.register([self.peers[name].region])
            self.queue.connect(name, name.encode(), (0, 0))

    def run(self, now=0.0):
        while self.queue.step(now):
            pass
        events, self.events[:] = list(self.events), []
        return events


# --- spans ---


def test_runs_that_continue_on_both_sides_become_one_span():
    one = pool(8)
    spans = push_spans(one, 0, np.array([1, 2, 3, 7]), np.array([4, 5, 6, 0]), (0, 0))
    assert spans.tolist() == [[0, 7 * SIZE, 0, 0, SIZE], [0, SIZE, 0, 4 * SIZE, 3 * SIZE]]


def test_a_run_that_continues_on_one_side_only_stays_two_spans():
    spans = push_spans(pool(8), 0, np.array([1, 2]), np.array([4, 6]), (0, 0))
    assert len(spans) == 2


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ((0, 4), (2, 4), [SIZE + SIZE // 2, 3 * SIZE // 2, SIZE // 2]),  # their half of my block
        ((2, 4), (0, 4), [SIZE // 2, 3 * SIZE + SIZE // 2, SIZE // 2]),  # my half of theirs
        ((0, 2), (1, 4), [3 * SIZE // 4, 9 * SIZE // 4, SIZE // 4]),
    ],
)
def test_tensor_parallel_slices_go_to_their_place(mine, theirs, expected):
    shape = BlockShape(SHAPE.tokens, mine[1] - mine[0], SHAPE.layers, SHAPE.head_dim, SHAPE.itemsize)
    spans = push_spans(pool(8, shape=shape, first_head=mine[0]), 0, np.array([1]), np.array([3]), theirs)
    assert spans[:, [1, 3, 4]].tolist() == [expected]


def test_ranks_without_a_common_head_push_nothing_and_say_pushed():
    sender = Sender()
    sender.queue.connections["D"].kv_heads = (4, 8)
    sender.queue.add(push(), 0.0)
    assert sender.run() == [TransferPushed(7, 0, 0, "D")]
    assert sender.backend.tickets == []


# --- pushes ---


def test_pushed_blocks_arrive_and_are_counted():
    sender = Sender()
    sender.queue.add(push(3, src=(1, 5), dst=(6, 2)), 0.0)
    assert sender.run() == [TransferPushed(7, 3, 2 * SIZE, "D")]
    assert np.array_equal(contents(sender.peers["D"])[[6, 2]], contents(sender.pool)[[1, 5]])


def test_a_push_is_cut_to_what_one_post_may_carry():
    sender = Sender(max_spans_per_post=2)
    sender.queue.add(push(src=(0, 2, 4, 6, 1), dst=(0, 2, 4, 6, 1)[::-1]), 0.0)
    assert [call[3] for call in sender.backend.calls if call[0] == "post"] == []
    sender.run()
    assert [call[3] for call in sender.backend.calls if call[0] == "post"] == [2, 2, 1]


def test_pushes_to_a_peer_begin_in_the_order_they_came():
    sender = Sender(automatic=False)
    for index in range(4):
        sender.queue.add(push(index, tag=index), 0.0)
    sender.run()
    assert [ticket.tag for ticket in sender.backend.tickets] == [0, 1, 2, 3]


def test_one_queue_serves_all_peers_first_come_first_served():
    sender = Sender(peers=("D", "E", "F"), automatic=False)
    arrivals = ["D", "E", "E", "F", "D", "F"]
    for index, peer in enumerate(arrivals):
        sender.queue.add(push(index, peer), 0.0)
    sender.run()
    assert [ticket.peer.identity for ticket in sender.backend.tickets] == arrivals


def test_several_queues_share_what_one_thread_can_post():
    sender, blocks = Sender(peers=("D",), max_spans_per_post=1, automatic=False), range(0, 8, 2)
    other = Sender(peers=("E",), max_spans_per_post=1, automatic=False)
    other.queue._backend = sender.backend  # one engine, another queue
    for index in range(8):
        sender.queue.add(push(index, "D", src=blocks, dst=blocks), 0.0)
        other.queue.add(push(index, "E", src=blocks, dst=blocks), 0.0)
    posted = []
    while sender.queue.busy or other.queue.busy:  # as a thread that has both goes round
        sender.queue.step(0.0)
        other.queue.step(0.0)
        new = sender.backend.tickets[len(posted) :]
        posted += [ticket.peer.identity for ticket in new]
        for ticket in new:
            sender.backend.apply(ticket)
    assert len(posted) == 64
    for seen in range(16, 64, 16):
        assert abs(posted[:seen].count("D") - seen / 2) <= POSTS_IN_FLIGHT / 2, posted


def test_a_peer_that_does_not_take_its_posts_does_not_hold_up_another():
    sender = Sender(peers=("D", "E"), automatic=False)
    for index in range(POSTS_IN_FLIGHT + 5):
        sender.queue.add(push(index, "D"), 0.0)
    sender.queue.add(push(99, "E"), 0.0)
    sender.run()
    posted = [ticket.peer.identity for ticket in sender.backend.tickets]
    assert posted == ["D"] * POSTS_IN_FLIGHT + ["E"]


@pytest.mark.parametrize(
    "bad",
    [
        push(src=(8,)),
        push(src=(-1,)),
        push(dst=(-2,)),
        push(src=(1, 2)),
        push(group=1),
        Push("D", 7, 0, b"abc", i32(1)),
    ],
)
def test_indices_outside_the_pool_fail_before_any_memory_is_touched(bad):
    sender = Sender()
    sender.queue.add(bad, 0.0)
    (event,) = sender.run()
    assert isinstance(event, TransferFailed) and event.quiet
    assert sender.backend.tickets == []


def test_a_push_to_an_unknown_peer_fails_quietly():
    sender = Sender()
    sender.queue.add(push(peer="X"), 0.0)
    assert sender.run() == [TransferFailed(7, 0, "the peer is not connected", "X", True)]


def test_a_cancelled_hand_off_posts_nothing_more_and_what_is_under_way_ends_by_itself():
    sender = Sender(automatic=False, max_spans_per_post=1)
    blocks = range(0, 8, 2)
    sender.queue.add(push(0, src=blocks, dst=blocks), 0.0)
    for index in range(1, POSTS_IN_FLIGHT):
        sender.queue.add(push(index, src=blocks, dst=blocks), 0.0)
    sender.run()
    posted = len(sender.backend.tickets)
    sender.queue.cancel("D", 7)
    waiting = sender.run()
    assert waiting and all(event.quiet and event.reason == "cancelled" for event in waiting)
    for ticket in sender.backend.tickets:
        sender.backend.apply(ticket)
    ended = sender.run()
    assert len(sender.backend.tickets) == posted
    assert len(waiting) + len(ended) == POSTS_IN_FLIGHT
    # A push that was posted whole went through; one that was cut short failed, and nothing of it is in flight.
    assert any(isinstance(event, TransferPushed) for event in ended)
    assert all(event.quiet for event in ended if isinstance(event, TransferFailed))


def test_a_push_that_comes_after_its_cancel_fails_until_the_peer_is_reset():
    sender = Sender()
    sender.queue.cancel("D", 7)
    sender.queue.add(push(), 0.0)
    assert sender.run() == [TransferFailed(7, 0, "cancelled", "D", True)]
    sender.queue.reset("D")
    sender.queue.connect("D", b"D", (0, 0))
    sender.queue.add(push(), 0.0)
    assert sender.run() == [TransferPushed(7, 0, SIZE, "D")]


def test_a_push_beyond_its_deadline_fails_not_quiet_and_the_peer_takes_nothing_before_a_reset():
    sender = Sender(automatic=False, timeout=30.0)
    sender.queue.add(push(0), 0.0)
    sender.run()
    assert sender.run(29.9) == []
    (late,) = sender.run(30.0)
    assert (late.index, late.quiet) == (0, False) and "30 s" in late.reason
    sender.queue.add(push(1, tag=8), 31.0)
    (refused,) = sender.run(31.0)
    assert refused.quiet and refused.index == 1
    assert len(sender.backend.tickets) == 1
    sender.queue.reset("D")
    assert ("reset", "D") in sender.backend.calls
    assert sender.run(32.0) == []


def test_a_lost_peer_is_reported_once_and_its_pushes_fail_not_quiet():
    sender = Sender(automatic=False)
    for index in range(2):
        sender.queue.add(push(index), 0.0)
    sender.run()
    for ticket in sender.backend.tickets:
        ticket.error = PeerLost("D", "gone")
    events = sender.run()
    assert [type(event) for event in events].count(TransferPeerLost) == 1
    failed = [event for event in events if isinstance(event, TransferFailed)]
    assert [event.index for event in failed] == [0, 1] and not any(event.quiet for event in failed)


@pytest.mark.parametrize("quiet_errors", [False, True])
def test_an_error_is_quiet_only_where_the_backend_says_so(quiet_errors):
    sender = Sender(automatic=False, quiet_errors=quiet_errors)
    sender.queue.add(push(), 0.0)
    sender.run()
    sender.backend.tickets[0].error = TransferError("refused")
    assert sender.run() == [TransferFailed(7, 0, "refused", "D", quiet_errors)]
    sender.queue.add(push(1), 0.0)  # one refused hand-off does not end the others of this peer
    sender.run()
    assert len(sender.backend.tickets) == 2


def test_an_error_of_a_post_may_have_begun_and_is_not_quiet():
    sender = Sender()
    sender.backend.post_error = TransferError("half posted")
    sender.queue.add(push(), 0.0)
    assert sender.run() == [TransferFailed(7, 0, "half posted", "D", False)]


def test_a_reset_ends_every_push_of_its_peer_and_of_no_other():
    sender = Sender(peers=("D", "E"), automatic=False)
    for index in range(POSTS_IN_FLIGHT + 2):
        sender.queue.add(push(index, "D"), 0.0)
    sender.queue.add(push(0, "E"), 0.0)
    sender.run()
    sender.queue.reset("D")
    events = sender.run()
    assert sorted(event.index for event in events) == list(range(POSTS_IN_FLIGHT + 2))
    assert [event.quiet for event in sorted(events, key=lambda event: event.index)] == [False] * 8 + [True] * 2
    sender.backend.apply(sender.backend.tickets[-1])
    assert sender.run() == [TransferPushed(7, 0, SIZE, "E")]


def test_a_descriptor_of_another_incarnation_is_refused():
    sender = Sender()
    with pytest.raises(PeerLost, match="is of D"):
        sender.queue.connect("D#2", b"D", (0, 0))
    assert "D#2" not in sender.queue.connections


# --- landing ---


class Receiver:
    def __init__(self, the_pool=None, **changes):
        self.backend = ScriptedBackend({}, capabilities(**changes))
        self.backend.open("D")
        self.pool = the_pool or pool(8)
        contents(self.pool)[:] = np.random.default_rng(1).integers(0, 256, contents(self.pool).shape, dtype=np.uint8)
        staging = Staging(self.backend, [self.pool], NoDevice())
        self.backend.register(staging.regions())
        self.receiving = Receiving(self.backend, [self.pool], staging, NoDevice())

    def digest(self, block, tokens=SHAPE.tokens):
        return digest_block(contents(self.pool)[block], tokens, self.pool.geometry)

    def verify(self, command):
        check = self.receiving.begin_verify(command)
        return check if isinstance(check, TransferVerified) else self.receiving.check(check)


def test_verify_ends_the_grant_then_fences_then_names_the_blocks_that_differ():
    receiver = Receiver(revocable=True)
    receiver.receiving.grant(TransferGrant("P", 7, i32(1, 2, 5)))
    digests = u64(receiver.digest(1), receiver.digest(2) ^ 1, receiver.digest(5, 3))
    answer = receiver.verify(TransferVerify("P", 7, i32(1, 2, 5), i32(4, 4, 3), digests))
    assert [call[0] for call in receiver.backend.calls] == ["grant", "revoke", "fence"]
    assert (answer.bad_i32, answer.error, answer.nbytes) == (i32(2), "", 3 * SIZE)


def test_a_grant_is_whole_blocks_merged():
    receiver = Receiver(revocable=True)
    receiver.receiving.grant(TransferGrant("P", 7, i32(5, 1, 2)))
    (call,) = receiver.backend.calls
    assert [row[1::3] for row in call[3]] == [[SIZE, 2 * SIZE], [5 * SIZE, SIZE]]


def test_digests_that_came_with_the_landing_are_used_for_whole_blocks_only():
    receiver = Receiver(revocable=True, returns_digests=True)
    receiver.receiving.grant(TransferGrant("P", 7, i32(1, 2, 3)))
    receiver.backend.digests[7, "P"] = {
        (0, SIZE): (SIZE, 11),
        (0, 2 * SIZE): (SIZE // 2, 5),  # only half of block 2
        (0, 3 * SIZE): (SIZE // 2, 20),
        (0, 3 * SIZE + SIZE // 2): (SIZE // 2, 2**64 - 1),  # two pieces add up
    }
    answer = receiver.verify(TransferVerify("P", 7, i32(1, 2, 3), i32(4, 4, 4), b""))
    assert answer.digests_u64 == u64(11, receiver.digest(2), 19)


def test_a_partial_block_is_digested_here_whatever_the_backend_says():
    receiver = Receiver(revocable=True, returns_digests=True)
    receiver.receiving.grant(TransferGrant("P", 7, i32(1)))
    receiver.backend.digests[7, "P"] = {(0, SIZE): (SIZE, 11)}
    answer = receiver.verify(TransferVerify("P", 7, i32(1), i32(2), u64(receiver.digest(1, 2))))
    assert answer.bad_i32 == b""


def test_the_slices_of_two_senders_are_verified_as_one_sum():
    receiver = Receiver(revocable=True, returns_digests=True)
    for rank in ("P0", "P1"):
        receiver.receiving.grant(TransferGrant(rank, 7, i32(1)))
    receiver.backend.digests[7, "P0"] = {(0, SIZE): (SIZE // 2, 30)}
    receiver.backend.digests[7, "P1"] = {(0, SIZE + SIZE // 2): (SIZE // 2, 12)}
    first = receiver.verify(TransferVerify("P0", 7, b"", b"", b""))
    assert (first.error, first.sender, first.nbytes) == ("", "P0", 0)
    assert receiver.verify(TransferVerify("P1", 7, i32(1), i32(4), u64(42))).bad_i32 == b""


def test_one_senders_slice_can_be_verified_alone():
    receiver = Receiver()
    want = digest_block(contents(receiver.pool)[1], 4, DigestGeometry(SHAPE), (2, 4))
    answer = receiver.verify(TransferVerify("P", 7, i32(1), i32(4), u64(want), kv_heads=(2, 4)))
    assert (answer.bad_i32, answer.nbytes) == (b"", SIZE // 2)


def test_a_grant_outside_the_pool_reaches_no_backend_and_fails_the_verify():
    receiver = Receiver(revocable=True)
    receiver.receiving.grant(TransferGrant("P", 7, i32(8)))
    assert receiver.backend.calls == []
    with pytest.raises(TransferError, match="outside"):
        receiver.receiving.begin_verify(TransferVerify("P", 7, i32(1), i32(4), b""))


@pytest.mark.parametrize("tokens", [0, 5])
def test_valid_tokens_outside_a_block_are_refused(tokens):
    from pd.errors import ProtocolError

    with pytest.raises(ProtocolError, match=r"outside 1\.\.4"):
        Receiver().receiving.begin_verify(TransferVerify("P", 7, i32(1), i32(tokens), b""))


def test_without_revoke_nothing_is_quiet_before_it_was_verified():
    receiver = Receiver()
    receiver.receiving.grant(TransferGrant("P", 7, i32(1)))
    assert receiver.receiving.revoke(TransferRevoke("P", 7)) == TransferRevoked(7, False, "P")
    receiver.verify(TransferVerify("P", 7, i32(1), i32(4), b""))
    assert receiver.receiving.revoke(TransferRevoke("P", 7)) == TransferRevoked(7, True, "P")
    assert not receiver.receiving.busy
    assert receiver.backend.calls == [("fence", "P")]


def test_an_expelled_sender_leaves_nothing_behind():
    receiver = Receiver(revocable=True)
    receiver.receiving.grant(TransferGrant("P", 7, i32(1)))
    receiver.backend.quiet = False
    assert receiver.receiving.expel(TransferExpel("P")) == TransferExpelled("P", False)
    assert receiver.receiving.busy
    receiver.backend.quiet = True
    assert receiver.receiving.expel(TransferExpel("P")) == TransferExpelled("P", True)
    assert not receiver.receiving.busy


# --- staging ---


def test_device_memory_goes_through_host_mirrors_and_their_pages_are_given_back():
    shape = BlockShape(tokens=4, kv_heads=4, layers=8, head_dim=64, itemsize=2)  # blocks of whole pages
    network, sides = {}, {}
    for name in ("P", "D"):
        device = FakeDevice(8 * shape.nbytes)
        backend = ScriptedBackend(network)
        backend.open(name)
        pools = [Pool(device.region(), shape)]
        staging = Staging(backend, pools, device)
        backend.register(staging.regions())
        sides[name] = device, backend, pools, staging
    device, backend, pools, staging = sides["P"]
    device.memory[:] = np.random.default_rng(2).integers(0, 256, device.memory.size, dtype=np.uint8)
    events = []
    queue = PushQueue(backend, pools, staging, events.append, 30.0, clock=lambda: 0.001)
    queue.connect("D", b"D", (0, 0))
    there, other, their_pools, their_staging = sides["D"]
    receiving = Receiving(other, their_pools, their_staging, there)
    receiving.grant(TransferGrant("P", 7, i32(3, 6)))
    queue.add(push(src=(1, 2), dst=(6, 3)), 0.0)
    while queue.step(0.0):
        pass
    assert events == [TransferPushed(7, 0, 2 * shape.nbytes, "D", micros=1000)]
    blocks = device.memory.reshape(8, -1)
    digests = u64(*(digest_block(blocks[b], 4, pools[0].geometry) for b in (1, 2)))
    answer = receiving.check(receiving.begin_verify(TransferVerify("P", 7, i32(6, 3), i32(4, 4), digests)))
    assert (answer.bad_i32, answer.error) == (b"", "")
    landed = there.memory.reshape(8, -1)
    assert np.array_equal(landed[[6, 3]], blocks[[1, 2]]) and not landed[[0, 1, 2, 4, 5, 7]].any()
    assert there.fences == 1
    receiving.revoke(TransferRevoke("P", 7))
    for side in (backend, other):
        assert not np.frombuffer(side.regions[0].buffer, np.uint8).any()


# --- the engine, with its threads ---


@pytest.mark.parametrize("concurrent", [False, True])
def test_every_command_gets_its_answer(concurrent):
    network = {}
    changes = {"concurrent_posts": concurrent, "revocable": True}
    with Engine("D", network, **changes) as there, Engine("P", network, **changes) as here:
        descriptor = there.engine.descriptor()
        assert here.ask(TransferConnect("D", descriptor)) == TransferConnected("D")
        there.port.give(TransferGrant("P", 7, i32(2)))
        assert here.ask(TransferPush(push())) == TransferPushed(7, 0, SIZE, "D")
        here.engine.push(push(1))
        assert here.port.next() == TransferPushed(7, 1, SIZE, "D")
        digest = digest_block(contents(here.pool)[1], 4, here.pool.geometry)
        assert there.ask(TransferVerify("P", 7, i32(2), i32(4), u64(digest))).bad_i32 == b""
        assert there.ask(TransferRevoke("P", 7)) == TransferRevoked(7, True, "P")
        assert there.ask(TransferExpel("P")) == TransferExpelled("P", True)
        here.port.give(TransferCancel("D", 7))
        assert here.ask(TransferPush(push(2))) == TransferFailed(7, 2, "cancelled", "D", True)
        assert here.ask(TransferResetPeer("D")) == TransferReset("D")
        assert here.ask(TransferResetPeer("nobody")) == TransferReset("nobody")
        assert not here.failures and not there.failures


def test_a_damaged_descriptor_never_reaches_the_backend():
    with Engine() as here:
        for descriptor in (b"", seal(b"D")[:-1], seal(b"D") + b"x", b"garbage"):
            answer = here.ask(TransferConnect("D", descriptor))
            assert answer == TransferPeerLost("D", "the descriptor is damaged")
        assert isinstance(here.ask(TransferConnect("D", seal(b"D"))), TransferPeerLost)


def test_a_wrong_verify_is_answered_with_its_error():
    with Engine() as here:
        assert "blocks_i32" in here.ask(TransferVerify("X", 7, i32(99), i32(4), b"")).error
        assert "group" in here.ask(TransferVerify("X", 8, i32(1), i32(4), b"", group=3)).error


def test_what_a_backend_should_never_raise_reaches_the_owner():
    network = {}
    with Engine("D", network) as there, Engine("P", network) as here:
        here.ask(TransferConnect("D", there.engine.descriptor()))
        here.backend.crash = ZeroDivisionError("defect")
        here.port.give(TransferPush(push()))
        assert here.failed.wait(10.0)
        assert [type(error) for error in here.failures] == [ZeroDivisionError]
        assert not there.failures


def test_a_closed_engine_has_closed_its_backend_and_port():
    with Engine() as here:
        pass
    assert here.backend.calls == [("close",)] and here.port.closed
