"""`direct` against peers that break its protocol: each loses its own connection and nothing else."""

import fcntl
import gc
import os
import socket
import struct
import threading
import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from pd.abc import BackendContext, host_region
from pd.errors import PeerLost, TransferError
from pd.testing.transfer_peer import HostMemory
from pd.transfer.direct import DirectBackend, DirectDescriptor
from pd.transfer.direct_wire import (
    ACK,
    DATA,
    HEADER,
    MAGIC,
    NONCE,
    PAYLOAD_LIMIT,
    POST,
    PULL,
    REFUSED,
    ClientHello,
    ServerHello,
    client_mac,
    send_hello,
    server_mac,
)

SIZE = 1 << 16
KEY = b"data-plane key"


class End:
    """A backend with one region."""

    def __init__(self, name, memory="auto", host="127.0.0.1", secret=KEY, shareable=True, **options):
        self.lines = []
        context = BackendContext(
            host=host,
            device="cpu",
            memory=HostMemory(),
            secret=secret,
            options={"transfer_memory": memory, **options},
            log=lambda event, **fields: self.lines.append((event, fields)),
        )
        self.backend = DirectBackend(context)
        self.backend.open(name)
        region = self.backend.allocate(SIZE, "cpu")
        if not shareable:
            region = host_region(np.zeros(SIZE, dtype=np.uint8).data)
        self.backend.register([replace(region, block_bytes=4096)])
        self.memory = np.frombuffer(region.buffer, dtype=np.uint8)
        self.descriptor = self.backend.descriptor()
        self.address = msgspec.msgpack.decode(self.descriptor, type=DirectDescriptor)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.backend.close()

    def grant(self, tag, sender, offset=0, length=SIZE):
        self.backend.grant(tag, np.array([[0, offset, 0, 0, length]], dtype=np.uint64), sender)


def row(source=0, target=0, length=SIZE, local=0, remote=0):
    return np.array([[local, source, remote, target, length]], dtype=np.uint64)


def outcome(end, ticket, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not end.backend.poll(ticket):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def works(sender, receiver, tag=1):
    peer = sender.backend.connect(receiver.descriptor)
    sender.memory[:] = tag
    receiver.grant(tag, sender.address.identity)
    outcome(sender, sender.backend.post(peer, row(), tag))
    assert (receiver.memory == tag).all()
    sender.backend.reset_peer(peer)


class Stranger:
    """A socket that speaks the protocol as far as a test wants."""

    def __init__(self, end, unix=False):
        family = socket.AF_UNIX if unix else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect("\0" + end.address.path if unix else (end.address.host, end.address.port))
        greeting = self.exactly(len(MAGIC) + NONCE)
        assert greeting.startswith(MAGIC)
        self.nonce = greeting[len(MAGIC) :]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def exactly(self, count):
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            assert part, "closed"
            data += part
        return data

    def hello(self, key=KEY, fds=(), **changes):
        """The receiver's answer."""
        fields = {"nonce": b"n" * 16, "identity": "P", "target": "D", "mode": "stream", "regions": [SIZE], **changes}
        hello = ClientHello(**fields)
        send_hello(self.sock, msgspec.structs.replace(hello, mac=client_mac(key, self.nonce, hello)), fds)
        size = int.from_bytes(self.exactly(4), "little")
        return msgspec.msgpack.decode(self.exactly(size), type=ServerHello)

    def frame(self, kind, a=0, b=0, c=0, payload=b"", size=None):
        self.sock.sendall(HEADER.pack(kind, len(payload) if size is None else size, a, b, c) + payload)

    def read_frame(self):
        kind, size, a, b, c = HEADER.unpack(self.exactly(HEADER.size))
        return kind, a, b, c, self.exactly(size)

    def is_closed(self):
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True


@pytest.fixture
def receiver():
    with End("D") as end:
        yield end


def assert_unharmed(receiver):
    assert not receiver.memory.any() and receiver.backend._failure is None
    with End("other") as sender:
        works(sender, receiver)


# --- the handshake ---


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, struct.pack("<I", 1 << 30), struct.pack("<I", 3) + b"abc", b"\0" * 4],
    ids=["http", "ones", "huge", "short", "empty"],
)
@pytest.mark.parametrize("unix", [False, True])
def test_garbage_instead_of_a_hello_closes_that_connection(receiver, data, unix):
    with Stranger(receiver, unix) as stranger:
        stranger.sock.sendall(data)
        assert stranger.is_closed()
    assert_unharmed(receiver)


def test_a_connection_that_says_nothing_is_closed(receiver):
    with Stranger(receiver) as stranger:
        start = time.monotonic()
        assert stranger.is_closed()
        assert time.monotonic() - start < 6
    assert_unharmed(receiver)


@pytest.mark.parametrize("key", [b"", b"another key"])
@pytest.mark.parametrize("unix", [False, True])
def test_a_sender_with_another_token_is_refused(receiver, key, unix):
    with Stranger(receiver, unix) as stranger:
        assert "token" in stranger.hello(key).problem
        assert stranger.is_closed()
    assert_unharmed(receiver)


def test_a_token_cannot_be_used_twice(receiver):
    """It answers one connection's nonce."""
    with Stranger(receiver) as first, Stranger(receiver) as second:
        assert first.hello().problem == ""
        second.nonce = first.nonce
        assert "token" in second.hello().problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"target": "D#1"}, "this is D, not D#1"),
        ({"mode": "shm"}, "mode shm"),
        ({"mode": "magic"}, "mode magic"),
        ({"regions": [0]}, "region sizes"),
        ({"regions": [1 << 48]}, "region sizes"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused_with_its_reason(receiver, changes, problem):
    with Stranger(receiver) as stranger:
        assert stranger.hello(**changes).problem == problem
        assert stranger.is_closed()
    assert_unharmed(receiver)


def memfd(nbytes, seal):
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize("case", ["unsealed", "too small", "no memory", "none", "one missing", "page too small"])
def test_memory_that_could_kill_a_reader_is_refused(receiver, case):
    def fds():
        good, page = memfd(SIZE, True), memfd(4096, True)
        return {
            "unsealed": [memfd(SIZE, False), page],
            "too small": [memfd(SIZE - 4096, True), page],
            "no memory": [os.open("/dev/null", os.O_RDONLY), page],
            "none": [],
            "one missing": [good],
            "page too small": [good, memfd(8, True)],
        }[case]

    held = fds()
    try:
        with Stranger(receiver, unix=True) as stranger:
            with pytest.raises((AssertionError, ConnectionError)):  # closed without an answer
                stranger.hello(mode="shm", fds=held)
        assert_unharmed(receiver)
    finally:
        for fd in held:
            os.close(fd)


def test_descriptors_that_came_with_a_refused_hello_are_not_kept(receiver):
    fd, page = memfd(SIZE, True), memfd(4096, True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with Stranger(receiver, unix=True) as stranger:
            stranger.hello(b"wrong", mode="shm", fds=[fd, page])
            assert stranger.is_closed()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(fd)
    os.close(page)


# --- frames ---


@pytest.mark.parametrize(
    "frame",
    [
        (99, 0, 0, 0, b"", None),
        (ACK, 1, 0, 0, b"", None),
        (PULL, 1, 0, 8, b"", None),
        (DATA, 1, 0, 8, b"", None),
        (POST, 1, 1, 0, b"x" * 39, None),
        (POST, 1, 1, 0, b"", None),
        (POST, 1, 1, 0, b"", PAYLOAD_LIMIT + 40),
    ],
    ids=["unknown", "ack", "pull", "data", "odd post", "empty post", "huge post"],
)
def test_a_frame_out_of_place_closes_that_connection(receiver, frame):
    kind, a, b, c, payload, size = frame
    with Stranger(receiver) as stranger:
        assert stranger.hello().problem == ""
        stranger.frame(kind, a, b, c, payload, size)
        assert stranger.is_closed()
    assert_unharmed(receiver)


@pytest.mark.parametrize(
    "spans",
    [
        row(target=SIZE - 8, length=16),
        row(source=SIZE - 8, length=16),
        row(local=1),
        row(remote=1),
        row(length=0),
        row(target=2**64 - 8, length=16),
        np.concatenate([row(length=8), row(target=2**63)]),
    ],
    ids=["target end", "source end", "source region", "target region", "nothing", "overflow", "second"],
)
def test_spans_outside_the_regions_are_refused_and_nothing_is_asked_for(receiver, spans):
    receiver.grant(5, "P")
    with Stranger(receiver) as stranger:
        stranger.hello()
        stranger.frame(POST, 3, 5, payload=spans.tobytes())
        kind, ticket, status, _, reason = stranger.read_frame()
        assert (kind, ticket, status) == (ACK, 3, REFUSED) and b"outside" in reason
    assert_unharmed(receiver)


def test_bytes_that_were_not_asked_for_close_the_connection(receiver):
    receiver.grant(5, "P")
    with Stranger(receiver) as stranger:
        stranger.hello()
        stranger.frame(POST, 3, 5, payload=row().tobytes())
        assert stranger.read_frame() == (PULL, 3, 0, SIZE, b"")
        stranger.frame(DATA, 3, 0, SIZE + 8)
        stranger.sock.sendall(b"y" * 64)
        assert stranger.is_closed()
    assert_unharmed(receiver)


def test_a_sender_that_dies_in_the_middle_leaves_a_receiver_that_works(receiver):
    receiver.grant(5, "P")
    with Stranger(receiver) as stranger:
        stranger.hello()
        stranger.frame(POST, 3, 5, payload=row().tobytes())
        stranger.read_frame()
        stranger.frame(DATA, 3, 0, SIZE)
        stranger.sock.sendall(b"y" * 1000)
    assert receiver.backend.expel("P")
    receiver.memory[:] = 0
    assert_unharmed(receiver)


class FakeReceiver:
    """A listener that answers the handshake and then what a test wants."""

    def __init__(self, key=KEY):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(10)
        port = self.listener.getsockname()[1]
        self.descriptor = msgspec.msgpack.encode(DirectDescriptor("D", "", "", "127.0.0.1", port, [SIZE]))
        self._key = key

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()

    def answer(self, then):
        sock, _ = self.listener.accept()
        with sock:
            sock.settimeout(10)
            sock.sendall(MAGIC + b"s" * NONCE)
            size = int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "little")
            hello = msgspec.msgpack.decode(sock.recv(size, socket.MSG_WAITALL), type=ClientHello)
            send_hello(sock, ServerHello("", server_mac(self._key, b"s" * NONCE, hello, "stream")))
            then(sock)

    def run(self, then):
        thread = threading.Thread(target=self.answer, args=(then,), daemon=True)
        thread.start()
        return thread


def test_memory_is_served_to_nobody_who_does_not_prove_the_key():
    with End("P") as sender, FakeReceiver(b"another key") as fake:
        thread = fake.run(lambda sock: None)
        with pytest.raises(PeerLost, match="token"):
            sender.backend.connect(fake.descriptor)
        thread.join(10)


@pytest.mark.parametrize(
    "frame",
    [(PULL, 1, 8, 8), (PULL, 1, 0, SIZE + 1), (PULL, 1, 0, 0), (PULL, 2, 0, 8), (ACK, 2, 0, 0), (POST, 1, 0, 0)],
    ids=["not next", "beyond", "nothing", "unknown post", "unknown ack", "post"],
)
def test_a_receiver_that_asks_for_what_it_may_not_have_loses_the_connection(frame):
    got = []

    def then(sock):
        sock.recv(HEADER.size + 40, socket.MSG_WAITALL)
        sock.sendall(HEADER.pack(frame[0], 0, *frame[1:]))
        got.append(sock.recv(1 << 20))

    with End("P") as sender, FakeReceiver() as fake:
        thread = fake.run(then)
        peer = sender.backend.connect(fake.descriptor)
        ticket = sender.backend.post(peer, row(), 1)
        with pytest.raises(PeerLost):
            outcome(sender, ticket)
        thread.join(10)
        assert got == [b""]
        assert sender.backend._failure is None


# --- ways to connect ---


def test_memory_that_cannot_be_shared_goes_over_the_unix_socket():
    with End("P", shareable=False) as sender, End("D", memory="shm") as receiver:
        works(sender, receiver)


def test_without_a_unix_socket_in_reach_auto_falls_back_to_tcp():
    with End("P") as sender, End("D", memory="tcp") as receiver:
        works(sender, receiver)
    with End("P") as sender, End("D") as receiver:
        moved = msgspec.structs.replace(receiver.address, path="pd-direct-elsewhere")
        receiver.descriptor = msgspec.msgpack.encode(moved)
        works(sender, receiver, tag=2)


@pytest.mark.parametrize(("sender_memory", "receiver_memory"), [("shm", "tcp"), ("tcp", "shm")])
def test_settings_that_leave_no_way_are_a_lost_peer(sender_memory, receiver_memory):
    with End("P", memory=sender_memory) as sender, End("D", memory=receiver_memory) as receiver:
        with pytest.raises(PeerLost):
            sender.backend.connect(receiver.descriptor)


def test_another_incarnation_on_the_same_address_is_not_the_peer():
    with End("P") as sender, End("D#2") as receiver:
        old = msgspec.msgpack.encode(msgspec.structs.replace(receiver.address, identity="D#1"))
        for memory in ("shm", "tcp"):
            with End(f"P-{memory}", memory=memory) as other, pytest.raises(PeerLost, match="this is D#2, not D#1"):
                other.backend.connect(old)
        works(sender, receiver)


def test_without_a_secret_only_loopback_is_bound_unless_told_otherwise():
    with End("A", memory="tcp", host="0.0.0.0", secret=None) as end:
        assert end.backend._listeners[0].getsockname()[0] == "127.0.0.1"
        assert end.address.host == "127.0.0.1"


@pytest.mark.parametrize("nbytes", [1, 4095, 1 << 20])
def test_allocated_memory_is_zero_and_sealed(nbytes):
    with End("A") as end:
        region = end.backend.allocate(nbytes, "cpu")
        assert region.nbytes == nbytes and not np.frombuffer(region.buffer, np.uint8).any()
        assert fcntl.fcntl(region.owner.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        assert end.backend.allocate(nbytes, "cuda:0") is None


def test_local_misuse_is_an_error_before_anything_is_sent():
    with End("P") as sender, End("D") as receiver:
        peer = sender.backend.connect(receiver.descriptor)
        with pytest.raises(TransferError, match="local regions"):
            sender.backend.post(peer, row(source=8), 1)
        with pytest.raises(TransferError, match="peer's regions"):
            sender.backend.post(peer, row(target=8), 1)
        assert sender.backend.poll(sender.backend.post(peer, np.zeros((0, 5), np.uint64), 1))
        sender.backend.reset_peer(peer)
        with pytest.raises(PeerLost):
            sender.backend.post(peer, row(), 1)


def test_close_leaves_no_descriptor_and_no_thread_behind():
    def state():
        with End("P") as sender, End("D") as receiver:
            works(sender, receiver)
            sender.backend.connect(receiver.descriptor)
        del sender, receiver
        gc.collect()  # of mappings that earlier failures' tracebacks kept
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    first = state()
    assert [state() for _ in range(3)] == [first] * 3
