"""The transfer engine as a runner uses it: over a real ZMQ pair, around `direct`."""

import time

import numpy as np
import pytest
import zmq

from pd.abc import BackendContext
from pd.ipc.channel import SyncChannel
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkOptions, Sockets
from pd.messages import (
    Push,
    TransferCommand,
    TransferConnect,
    TransferConnected,
    TransferEvent,
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
    TransferVerify,
)
from pd.transfer.digest import digest_blocks
from pd.transfer.direct import DirectBackend
from pd.transfer.engine import EngineConfig, TransferEngine
from pd.transfer.port import ChannelPort
from pd.transfer.spans import Pool
from pd.types import BlockShape
from tests.shared_device import SharedDevice
from tests.transfer_kit import NoDevice, i32, timeless, u64

BLOCKS = 64


class Rank:
    """One rank's engine, and the scheduler's end of its transfer socket."""

    def __init__(self, sockets, name, heads=(0, 4), memory="auto", timeout=10.0):
        self.name, self.heads = name, heads
        self.shape = BlockShape(tokens=8, kv_heads=heads[1] - heads[0], layers=2, head_dim=32, itemsize=2)
        device = SharedDevice() if memory == "device" else NoDevice()
        options = {"transfer_memory": "auto" if memory == "device" else memory}
        self.backend = DirectBackend(BackendContext("127.0.0.1", device.device, device, b"key", options))
        self.backend.open(name)
        nbytes = BLOCKS * self.shape.nbytes
        region = device.allocate(nbytes) if memory == "device" else self.backend.allocate(nbytes, "cpu")
        self.pool = Pool(region, self.shape, heads[0])
        self.memory = np.frombuffer(region.owner.buffer, np.uint8).reshape(BLOCKS, self.shape.nbytes)
        self.failures = []
        config = EngineConfig(threads=2, queues=2, timeout=timeout)
        self.engine = TransferEngine(self.backend, [self.pool], device, config, self.failures.append)
        self.engine.register()
        options = LinkOptions(heartbeat=0)
        here = sockets.listen(zmq.PAIR, f"inproc://{name}", options)
        there = sockets.dial(zmq.PAIR, f"inproc://{name}", options)
        commands, events = Codec(TransferCommand), Codec(TransferEvent)
        self.channel = SyncChannel(here, commands, events, name)
        self.engine.start(ChannelPort(SyncChannel(there, events, commands, name)))

    def ask(self, command):
        self.channel.send(command, 5.0)
        return self.next()

    def next(self):
        event = self.channel.recv(10.0)
        assert event is not None, "no answer"
        return timeless(event)

    def connect(self, other):
        assert self.ask(TransferConnect(other.name, other.engine.descriptor(), other.heads)) == TransferConnected(
            other.name
        )

    def digests(self, blocks, tokens):
        return digest_blocks(self.pool.region.owner.buffer, self.shape.nbytes, blocks, tokens, self.pool.geometry)


@pytest.fixture
def sockets():
    made = Sockets()
    yield made
    made.close()


@pytest.fixture
def ranks(sockets):
    made = []

    def make(*args, **kwargs):
        made.append(Rank(sockets, *args, **kwargs))
        return made[-1]

    yield make
    for rank in made:
        rank.engine.close()
        rank.channel.close()
        assert rank.failures == []


@pytest.mark.parametrize("memory", ["shm", "tcp", "device"])
def test_a_hand_off_lands_is_verified_and_its_grant_ends(ranks, memory):
    sender, receiver = ranks("P", memory=memory), ranks("D", memory=memory)
    sender.memory[:] = np.random.default_rng(0).integers(0, 256, sender.memory.shape, dtype=np.uint8)
    sender.connect(receiver)
    source, target = [5, 6, 7, 20, 3], [10, 11, 40, 41, 2]
    tokens = [8, 8, 8, 8, 5]
    receiver.channel.send(TransferGrant("P", 7, i32(*target)))
    size = sender.shape.nbytes
    assert sender.ask(TransferPush(Push("D", 7, 0, i32(*source[:2]), i32(*target[:2])))) == TransferPushed(
        7, 0, 2 * size, "D"
    )
    sender.engine.push(Push("D", 7, 1, i32(*source[2:]), i32(*target[2:])))
    assert sender.next() == TransferPushed(7, 1, 3 * size, "D")
    verified = receiver.ask(
        TransferVerify("P", 7, i32(*target), i32(*tokens), u64(*sender.digests(source, tokens).tolist()))
    )
    assert (verified.bad_i32, verified.error, verified.nbytes) == (b"", "", 5 * size)
    assert np.array_equal(receiver.memory[target], sender.memory[source])
    assert receiver.memory.any(axis=1).sum() == 5
    refused = sender.ask(TransferPush(Push("D", 7, 2, i32(1), i32(target[0]))))
    assert isinstance(refused, TransferFailed) and refused.quiet and "not granted" in refused.reason
    assert receiver.ask(TransferRevoke("P", 7)) == TransferRevoked(7, True, "P")


def test_a_wrong_digest_names_its_block(ranks):
    sender, receiver = ranks("P"), ranks("D")
    sender.memory[:] = np.random.default_rng(0).integers(0, 256, sender.memory.shape, dtype=np.uint8)
    sender.connect(receiver)
    receiver.channel.send(TransferGrant("P", 7, i32(1, 2)))
    assert isinstance(sender.ask(TransferPush(Push("D", 7, 0, i32(1, 2), i32(1, 2)))), TransferPushed)
    receiver.memory[2, 100] ^= 1
    digests = sender.digests([1, 2], [8, 3]).tolist()
    assert receiver.ask(TransferVerify("P", 7, i32(1, 2), i32(8, 3), u64(*digests))).bad_i32 == i32(2)


def test_two_ranks_fill_the_blocks_of_one_and_their_digests_add_up(ranks):
    senders = [ranks("P0", (0, 2)), ranks("P1", (2, 4))]
    receiver = ranks("D")
    sums = np.zeros(2, np.uint64)
    for seed, sender in enumerate(senders):
        sender.memory[:] = np.random.default_rng(seed).integers(0, 256, sender.memory.shape, dtype=np.uint8)
        sender.connect(receiver)
        receiver.channel.send(TransferGrant(sender.name, 7, i32(8, 9)))
        assert isinstance(sender.ask(TransferPush(Push("D", 7, 0, i32(4, 2), i32(8, 9)))), TransferPushed)
        sums += sender.digests([4, 2], [8, 8])
    assert receiver.ask(TransferVerify("P0", 7, b"", b"", b"")).error == ""
    verified = receiver.ask(TransferVerify("P1", 7, i32(8, 9), i32(8, 8), u64(*sums.tolist())))
    assert (verified.bad_i32, verified.error) == (b"", "")
    assert np.array_equal(receiver.memory[[8, 9]], np.hstack([sender.memory[[4, 2]] for sender in senders]))


def test_one_rank_fills_the_blocks_of_two(ranks):
    sender = ranks("P")
    sender.memory[:] = np.random.default_rng(0).integers(0, 256, sender.memory.shape, dtype=np.uint8)
    total = np.zeros(1, np.uint64)
    half = sender.shape.nbytes // 2
    for index, heads in enumerate(((0, 2), (2, 4))):
        receiver = ranks(f"D{index}", heads)
        sender.connect(receiver)
        receiver.channel.send(TransferGrant("P", 7, i32(5)))
        pushed = sender.ask(TransferPush(Push(receiver.name, 7, index, i32(9), i32(5))))
        assert pushed == TransferPushed(7, index, half, receiver.name)
        total += np.frombuffer(receiver.ask(TransferVerify("P", 7, i32(5), i32(8), b"")).digests_u64, "<u8")
        assert np.array_equal(receiver.memory[5], sender.memory[9, index * half : (index + 1) * half])
    assert total == sender.digests([9], [8])


def test_a_peer_that_is_gone_is_lost_and_can_be_reset_and_expelled(ranks):
    sender, receiver = ranks("P"), ranks("D")
    sender.connect(receiver)
    receiver.engine.close()
    start = time.monotonic()
    events = [sender.ask(TransferPush(Push("D", 7, 0, i32(1), i32(1)))), sender.next()]
    assert {type(event) for event in events} == {TransferPeerLost, TransferFailed}
    assert time.monotonic() - start < 5
    assert sender.ask(TransferResetPeer("D")) == TransferReset("D")
    lost = sender.ask(TransferConnect("D", receiver.engine.descriptor()))
    assert isinstance(lost, TransferPeerLost)
    assert sender.ask(TransferExpel("D")) == TransferExpelled("D", True)


def test_an_idle_engine_costs_no_cpu(ranks):
    sender, receiver = ranks("P"), ranks("D")
    sender.connect(receiver)
    receiver.channel.send(TransferGrant("P", 7, i32(1)))
    before = time.process_time()
    time.sleep(2.0)
    assert time.process_time() - before < 0.06
