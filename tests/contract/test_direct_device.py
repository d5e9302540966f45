"""`direct` between processes of one host whose pools are device memory: mapped, and staged where that is impossible."""

import itertools
import threading
import time
from dataclasses import replace
from typing import ClassVar

import msgspec
import numpy as np
import pytest

from pd.abc import BackendContext, Region
from pd.errors import PeerLost, TransferError
from pd.testing import TransferConformance
from pd.testing.transfer_peer import HostMemory, pattern
from pd.transfer.digest import digest_span
from pd.transfer.direct import DirectBackend, DirectDescriptor
from tests.shared_device import DeviceSide, SharedDevice, contents
from tests.suite_kit import SHORT_REVOCABLE, in_short, run_alone
from tests.unmappable_device import UnmappableSide

KIB = 1 << 10
BLOCK, SIZE = 4 * KIB, 256 * KIB


class Direct(TransferConformance):
    factory = "pd.transfer.plugin:make_direct"
    secret = "cluster secret"
    receiver_driven = True
    authenticates = True


@pytest.mark.slow
class TestDirectDevice(Direct):
    side = DeviceSide

    def test_bytes_go_by_the_devices_way(self) -> None:
        self.connected("there")
        assert self.here.ways() == {"device": 1}  # type: ignore[attr-defined]


@pytest.mark.slow
class TestDirectStaged(Direct):
    """No memory can be mapped."""

    side = UnmappableSide

    def test_bytes_are_served_over_the_connection(self) -> None:
        self.connected("there")
        assert self.here.ways() == {"stream": 1}  # type: ignore[attr-defined]


@pytest.mark.slow
class TestDirectStagedTcp(TestDirectStaged):
    options: ClassVar = {"transfer_memory": "tcp"}
    side = DeviceSide


@in_short(
    {
        TestDirectDevice: (
            *SHORT_REVOCABLE,
            "test_bytes_go_by_the_devices_way",
            "test_a_frozen_receiver_holds_up_nobody_else",
            "test_threads_may_post_to_different_peers_at_the_same_time",
            "test_an_idle_peer_costs_no_cpu",
        ),
        TestDirectStaged: (*SHORT_REVOCABLE, "test_bytes_are_served_over_the_connection"),
    }
)
def test_in_short(kind: type[TransferConformance], name: str) -> None:
    run_alone(kind, name)


class End:
    """A backend with regions of a device's memory, or of the host's."""

    def __init__(self, name, device=None, memory="auto", sizes=(SIZE,)):
        self.device, self.lines = device, []
        kind = device if device is not None else HostMemory()
        context = BackendContext(
            "127.0.0.1",
            kind.device,
            kind,
            b"key",
            {"transfer_memory": memory},
            log=lambda event, **fields: self.lines.append((event, fields)),
        )
        self.backend = DirectBackend(context)
        self.backend.open(name)
        made = [device.allocate(n) if device is not None else self.backend.allocate(n, "cpu") for n in sizes]
        self.regions = [replace(one, index=i, block_bytes=BLOCK) for i, one in enumerate(made)]
        self.backend.register(self.regions)
        self.identity = name

    def memory(self, index=0):
        region = self.regions[index]
        return contents(region) if self.device is not None else np.frombuffer(region.buffer, np.uint8)

    def grant(self, tag, sender="P"):
        rows = [[i, 0, 0, 0, region.nbytes] for i, region in enumerate(self.regions)]
        self.backend.grant(tag, np.array(rows, dtype=np.uint64), sender)

    def notes(self):
        return [fields["note"] for event, fields in self.lines if event == "connected"]


@pytest.fixture
def ends():
    made = []

    def make(*args, **kwargs):
        made.append(End(*args, **kwargs))
        return made[-1]

    yield make
    for end in made:
        end.backend.close()
        assert end.backend._failure is None


def device(**changes):
    made = SharedDevice()
    vars(made).update(changes)
    return made


def rows(*some):
    return np.array(some, dtype=np.uint64)


def outcome(end, ticket):
    deadline = time.monotonic() + 10
    while not end.backend.poll(ticket):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def works(sender, receiver, way):
    peer = sender.backend.connect(receiver.backend.descriptor())
    assert dict(sender.backend.ways) == {way: 1}
    sender.memory()[:] = pattern(1, SIZE)
    receiver.grant(1)
    spans = rows([0, 0, 0, BLOCK, 3 * BLOCK], [0, 8 * BLOCK + 8, 0, 10 * BLOCK + 16, 1000])
    outcome(sender, sender.backend.post(peer, spans, 1))
    expected = np.zeros(SIZE, np.uint8)
    for _, source, _, target, length in spans.tolist():
        expected[target : target + length] = sender.memory()[source : source + length]
    assert np.array_equal(receiver.memory(), expected)
    digests = {row[1]: row[2:] for row in receiver.backend.take_digests(1, "P").tolist()}
    assert digests == {
        **{BLOCK * (i + 1): [BLOCK, digest_span(pattern(1, SIZE)[i * BLOCK : (i + 1) * BLOCK], 0)] for i in range(3)},
        10 * BLOCK + 16: [1000, digest_span(pattern(1, SIZE)[8 * BLOCK + 8 : 8 * BLOCK + 1008], 2)],
    }


# --- which way the bytes go ---


@pytest.mark.parametrize(
    ("sender", "receiver", "way", "note"),
    [
        (device(), device(), "device", ""),
        (device(), device(mappable=False), "stream", "no handle can be opened here"),
        (device(exports=False), device(), "stream", ""),
        (device(), None, "stream", ""),
        (None, device(), "stream", ""),
        (None, None, "shm", ""),
    ],
    ids=["device", "not mappable", "no handles", "to the host", "from the host", "host"],
)
def test_memory_is_mapped_where_that_is_possible_and_staged_elsewhere(ends, sender, receiver, way, note):
    one, other = ends("P", sender), ends("D", receiver)
    works(one, other, way)
    assert one.notes() == [note]


@pytest.mark.parametrize(("one", "other", "way"), [("shm", "shm", "device"), ("tcp", "auto", "stream")])
def test_the_setting_shm_stands_for_all_memory_of_a_host_and_tcp_for_none(ends, one, other, way):
    works(ends("P", device(), memory=one), ends("D", device(), memory=other), way)


def test_a_sender_on_another_host_is_served_by_tcp(ends):
    sender, receiver = ends("P", device()), ends("D", device())
    there = msgspec.msgpack.decode(receiver.backend.descriptor(), type=DirectDescriptor)
    moved = msgspec.msgpack.encode(msgspec.structs.replace(there, machine="elsewhere"))
    receiver.backend.descriptor = lambda: moved
    works(sender, receiver, "stream")


def test_a_device_that_pd_knows_no_way_to_map_is_staged(ends):
    class Plain:
        """No `SharedDeviceMemory`."""

        def __init__(self, whole):
            self.device, self.allocate, self.copy, self.digest = whole.device, whole.allocate, whole.copy, whole.digest
            self.enter, self.fence = whole.enter, whole.fence

    works(ends("P", Plain(device())), ends("D", device()), "stream")


def test_a_handle_that_does_not_fit_is_no_way(ends):
    sender, receiver = ends("P", device(export=lambda regions: msgspec.msgpack.encode([(1, 0)]))), ends("D", device())
    works(sender, receiver, "stream")
    assert "cannot be opened" in sender.notes()[0]


def test_memory_of_another_device_is_refused_at_once():
    backend = DirectBackend(BackendContext("127.0.0.1", "cpu", HostMemory()))
    with pytest.raises(TransferError, match="a region of fake:0 in a backend for cpu"):
        backend.register([device().allocate(SIZE)])
    with pytest.raises(TransferError, match="a region of cpu in a backend for fake:0"):
        DirectBackend(BackendContext("127.0.0.1", "fake:0", device())).register([Region(0, 0, 8, "cpu", None)])


# --- pulls ---


@pytest.fixture
def pair(ends):
    sender, receiver = ends("P", device(), sizes=(SIZE, SIZE)), ends("D", device(), sizes=(SIZE, SIZE))
    for i in range(2):
        sender.memory(i)[:] = pattern(i, SIZE)
    return sender, receiver, sender.backend.connect(receiver.backend.descriptor())


def test_a_post_of_more_spans_than_a_pull_takes_and_of_several_regions_lands_whole(pair):
    sender, receiver, peer = pair
    receiver.grant(1)
    count = SIZE // 2 // 512
    places = itertools.product(range(2), range(count))
    spans = rows(*([i % 2, (i // 2) * 1024 % SIZE, there, i * 512, 512] for there, i in places))
    outcome(sender, sender.backend.post(peer, spans, 1))
    for source, at, target, to, length in spans.tolist():
        assert np.array_equal(receiver.memory(target)[to : to + length], sender.memory(source)[at : at + length])
    digests = receiver.backend.take_digests(1, "P")
    assert len(digests) == len(spans)
    for region, at, length, digest in digests.tolist():
        assert digest == digest_span(receiver.memory(region)[at : at + length], at % BLOCK // 8)
    assert receiver.device.lanes._value == 3, "every pull was given back"


@pytest.mark.parametrize("row", [[0, 4, 0, 0, 64], [0, 0, 0, 12, 64], [0, 0, 0, 0, 63]])
def test_spans_that_are_no_whole_words_are_refused(pair, row):
    sender, receiver, peer = pair
    receiver.grant(1)
    with pytest.raises(TransferError, match="whole words"):
        sender.backend.post(peer, rows(row), 1)
    with pytest.raises(TransferError, match="words of 8 bytes"):  # a peer that does not check
        outcome(sender, peer.post(rows(row), 1))


class Gate:
    """A device whose pulls wait, once started, until they are let go."""

    def __init__(self, made):
        self.started, self.go = threading.Semaphore(0), threading.Event()
        prepare = made.prepare

        def prepare_gated(*args):
            pull = prepare(*args)
            start, finish = pull.start, pull.finish

            def gated_finish():
                assert self.go.wait(10)
                return finish()

            pull.start = lambda: (start(), self.started.release())
            pull.finish = gated_finish
            return pull

        made.prepare = prepare_gated


def test_a_revoke_waits_for_the_pull_that_runs_and_cuts_short_what_comes_after(pair):
    sender, receiver, peer = pair
    gate = Gate(receiver.device)
    receiver.grant(1)
    first = sender.backend.post(peer, rows([0, 0, 0, 0, BLOCK]), 1)
    assert gate.started.acquire(timeout=10)
    second = sender.backend.post(peer, rows([0, 0, 0, BLOCK, BLOCK]), 1)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(receiver.backend.revoke(1, "P")))
    thread.start()
    time.sleep(0.1)
    assert not answers, "quiet is not said while the device writes"
    gate.go.set()
    thread.join(10)
    assert answers == [True]
    outcome(sender, first)
    with pytest.raises(TransferError, match=r"revoked|not granted"):
        outcome(sender, second)
    assert not receiver.memory()[BLOCK:].any()


def test_what_is_read_after_the_senders_end_is_not_reported(pair):
    sender, receiver, peer = pair
    gate = Gate(receiver.device)
    receiver.grant(1)
    ticket = sender.backend.post(peer, rows([0, 0, 0, 0, BLOCK]), 1)
    assert gate.started.acquire(timeout=10)
    sender.backend.reset_peer(peer)
    gate.go.set()
    with pytest.raises(PeerLost):
        outcome(sender, ticket)
    assert receiver.backend.revoke(1, "P")
    assert len(receiver.backend.take_digests(1, "P")) == 0


def test_expel_waits_until_nothing_is_pulled_and_unmaps(pair):
    sender, receiver, peer = pair
    opened = []
    gate = Gate(receiver.device)
    open_ = receiver.device.open
    receiver.device.open = lambda *args: opened.append(open_(*args)) or opened[-1]
    peer = sender.backend.connect(receiver.backend.descriptor())
    receiver.grant(1)
    sender.backend.post(peer, rows([0, 0, 0, 0, BLOCK]), 1)
    assert gate.started.acquire(timeout=10)
    threading.Timer(0.2, gate.go.set).start()
    start = time.monotonic()
    assert receiver.backend.expel("P")
    assert time.monotonic() - start > 0.1
    assert all(one.fd == -1 for one in opened[0].memory), "unmapped"


def test_a_device_that_fails_is_a_defect_of_this_runner_and_no_refusal(ends):
    sender, receiver = ends("P", device()), ends("D", device())
    peer = sender.backend.connect(receiver.backend.descriptor())
    receiver.device.prepare = lambda *args: exec("raise RuntimeError('CUDA error')")
    receiver.grant(1)
    with pytest.raises(PeerLost):
        outcome(sender, sender.backend.post(peer, rows([0, 0, 0, 0, BLOCK]), 1))
    with pytest.raises(RuntimeError, match="failed"):
        receiver.backend.progress()
    receiver.backend._failure = None
