"""The connection that backends keep from sender to receiver, by itself: who gets in, who is noticed, what is left."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from pd.abc import BackendContext, Call, Caller, Door, doors, reachable_address
from pd.errors import BackendUnavailable, PeerLost, TransferError
from pd.testing.transfer_peer import HostMemory

SOON = 5.0


def until(done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SOON
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class House:
    """A door, who was admitted and who has left, and calls to it."""

    def __init__(self) -> None:
        self.log: list[dict[str, Any]] = []
        self.admitted: list[Caller] = []
        self.left: list[Caller] = []
        self.admit: Callable[[Caller], bytes] = lambda caller: b"come in"
        self.leave: Callable[[Caller], None] = lambda caller: None
        self._open: list[Door | Call] = []

    def context(self, secret: bytes | None = b"secret", host: str = "127.0.0.1") -> BackendContext:
        return BackendContext(host, "cpu", HostMemory(), secret, log=lambda what, **more: self.log.append(more))

    def door(self, host: str = "127.0.0.1", secret: bytes | None = b"secret") -> Door:
        def admit(caller: Caller) -> bytes:
            words = self.admit(caller)
            self.admitted.append(caller)
            return words

        def leave(caller: Caller) -> None:
            self.left.append(caller)
            self.leave(caller)

        door = Door(self.context(secret, host), "kind", "here", admit, leave)
        door.start()
        self._open.append(door)
        return door

    def call(self, door: Door, sender: str = "there", **other: Any) -> Call:
        told = {"secret": b"secret", "backend": "kind", "receiver": "here", "address": door.address, **other}
        call = Call(
            self.context(told["secret"]), told["backend"], sender, told["receiver"], told["address"], sender.encode()
        )
        self._open.append(call)
        return call

    def answered(self, door: Door, sender: str = "there") -> Call:
        call = self.call(door, sender)
        assert call.wait(SOON) and call.answered and call.end == ""
        return call

    def refused(self, door: Door, sender: str = "there", **other: Any) -> str:
        call = self.call(door, sender, **other)
        assert call.wait(SOON) and not call.answered
        return call.end

    def reasons(self) -> str:
        return "; ".join(str(one["reason"]) for one in list(self.log))

    def close(self) -> None:
        for one in reversed(self._open):
            one.close()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.close()


class Gate:
    """Holds a callback until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, caller: Caller) -> bytes:
        self.reached.set()
        assert self.opened.wait(SOON)
        return b""


# --- who gets in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_both_sides_learn_each_others_name_words_and_address(house: House, host: str) -> None:
    door = house.door(host)
    call = house.answered(door)
    (caller,) = door.callers()
    assert (call.words, caller.words, caller.identity) == (b"come in", b"there", "there")
    assert call.local_host == caller.host and caller.reached == door.address[0]
    assert door.callers("there") == [caller] and door.callers("another") == []


@pytest.mark.parametrize(("mine", "theirs"), [(b"secret", b"guess"), (b"secret", None), (None, b"secret")])
def test_a_secret_that_differs_on_either_side_lets_nobody_in(
    house: House, mine: bytes | None, theirs: bytes | None
) -> None:
    door = house.door(secret=mine)
    assert house.refused(door, secret=theirs) == "it does not know this cluster's secret"
    assert not house.admitted and not door.callers()


def test_a_sender_that_lies_about_its_proof_is_not_admitted(house: House) -> None:
    """It takes the challenge without looking at it."""
    door = house.door()
    hello = doors.Hello("kind", "there", "here", b"0" * doors.NONCE)
    with socket.create_connection(door.address, SOON) as sock:
        doors._send(sock, hello)
        challenge = doors._receive(sock, doors.Challenge)
        proof = doors._proof(b"guess", "sender", hello, challenge.nonce, b"words")
        doors._send(sock, doors.Introduction(b"words", proof))
        assert sock.recv(1) == b""
    until(lambda: "it does not know this cluster's secret" in house.reasons())
    assert not house.admitted


def test_a_proof_is_for_one_role_one_call_and_its_words(house: House) -> None:
    """What a receiver said, and what was said in an earlier call, opens nothing."""
    door = house.door()
    hello = doors.Hello("kind", "there", "here", b"0" * doors.NONCE)
    kept = b""
    for trial in range(4):
        with socket.create_connection(door.address, SOON) as sock:
            doors._send(sock, hello)
            challenge = doors._receive(sock, doors.Challenge)
            good = doors._proof(b"secret", "sender", hello, challenge.nonce, b"words")
            proof, words = [(good, b"words"), (challenge.proof, b""), (kept, b"words"), (good, b"others")][trial]
            doors._send(sock, doors.Introduction(words, proof))
            kept = good
            assert (sock.recv(4) == b"") == (trial > 0)
    assert len(house.admitted) == 1


def test_a_door_of_another_backend_or_identity_is_not_taken_for_ours(house: House) -> None:
    door = house.door()
    assert house.refused(door, backend="other") == "it ended the connection"
    assert house.refused(door, receiver="here#2") == "it ended the connection"
    assert house.refused(door, sender="") == "it ended the connection"
    until(lambda: len(house.log) == 3)
    assert "looks for other of here" in house.reasons() and "looks for kind of here#2" in house.reasons()
    assert not house.admitted


GOOD = ("kind", "there", "here", b"0" * 16)
NESTED = b"\x96\xa9pd-door/1" + b"".join(map(msgspec.msgpack.encode, GOOD)) + b"\x91" * 200_000


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a message of 1195725856 bytes"),
        (struct.pack("!I", (1 << 20) + 1), "a message of 1048577 bytes"),
        (struct.pack("!I", 4) + b"\x93abc", "Expected `array` of at least length"),
        (struct.pack("!I", 13) + b"\x95\xa9pd-door/1\xa1\xff", "codec can't decode"),
        (struct.pack("!I", len(NESTED)) + NESTED, "recursion"),
        (struct.pack("!I", 9), "it ended the connection"),
        (b"", "it ended the connection"),
    ],
)
def test_garbage_ends_its_connection_and_nothing_else(house: House, sent: bytes, said: str) -> None:
    door = house.door()
    with socket.create_connection(door.address, SOON) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # it did not read all
            assert sock.recv(1) == b""
    until(lambda: house.log)
    assert said in house.reasons()
    house.answered(door)


def test_silence_and_a_trickle_end_in_time_on_both_sides(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "HANDSHAKE_TIMEOUT", 0.2)
    door = house.door()
    began = time.monotonic()
    with socket.create_connection(door.address) as silent, socket.create_connection(door.address) as slow:
        slow.sendall(struct.pack("!I", 1000))
        with contextlib.suppress(OSError):
            for _ in range(100):
                slow.sendall(b"x")
                time.sleep(0.01)
        assert silent.recv(1) == b"" and time.monotonic() - began < 0.9
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert house.refused(door, address=mute.getsockname()) == "timed out"
    until(lambda: house.reasons().count("timed out") == 2)
    house.answered(door)


def test_callers_without_proof_are_limited_and_one_that_goes_makes_room(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "UNPROVEN_LIMIT", 3)
    door = house.door()
    house.answered(door, "proven")
    strangers = [socket.create_connection(door.address) for _ in range(3)]
    until(lambda: len(door._callers) == 4)
    assert house.refused(door) != ""
    assert [one.identity for one in door.callers()] == ["proven"]
    strangers.pop().close()
    until(lambda: len(door._callers) == 3)
    house.answered(door)
    for one in strangers:
        one.close()


def test_a_refusal_reaches_the_sender_in_its_own_words_and_keeps_nothing(house: House) -> None:
    def admit(caller: Caller) -> bytes:
        raise TransferError("it moves KV by tcp, not rdma")

    house.admit = admit
    door = house.door()
    assert house.refused(door) == "it moves KV by tcp, not rdma"
    until(lambda: not door.callers())
    assert not house.left and door.expel("there")


def test_an_answer_that_does_not_come_in_time_loses_the_peer_and_ends_the_call(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, gate = house.door(), Gate()
    assert house.call(door).answer() == b"come in"
    house.admit = gate
    monkeypatch.setattr(doors, "HANDSHAKE_TIMEOUT", 0.2)
    with pytest.raises(PeerLost, match="here"):
        house.call(door, "late").answer()
    gate.opened.set()
    until(lambda: not door.callers("late"))
    with pytest.raises(PeerLost, match="it ended the connection"):
        house.call(door, "lost", receiver="elsewhere").answer()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_admit_that_breaks_ends_its_call_and_no_other(house: House) -> None:
    def admit(caller: Caller) -> bytes:
        raise KeyError("a mistake")

    door = house.door()
    house.answered(door, "first")
    house.admit = admit
    assert house.refused(door) == "it ended the connection"
    house.admit = lambda caller: b""
    house.answered(door, "third")
    assert [one.identity for one in door.callers()] == ["first", "third"] and not house.left


@pytest.mark.parametrize("host", ["no\udc80name", "a" * 100, "..", "127.0.0.1"])
def test_an_address_that_is_none_is_a_failure_like_others(house: House, host: str) -> None:
    door = house.door()
    assert house.refused(door, address=(host, 1 << 20)) not in ("", "it closed the connection")


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "nowhere.invalid"])
def test_an_address_that_is_not_here_cannot_be_bound(house: House, host: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"cannot bind to {host}.*--control-host must be"):
        Door(house.context(host=host), "kind", "here", lambda caller: b"")


def test_a_wildcard_is_dialled_at_an_address_of_this_machine(house: House) -> None:
    door = house.door("0.0.0.0")
    assert door.host == "0.0.0.0" and door.address[0] == reachable_address("") != "0.0.0.0"
    assert house.answered(door).local_host == door.address[0]


# --- who goes -------------------------------------------------------------------------------------------------------


def test_a_sender_that_closes_leaves_once(house: House) -> None:
    door = house.door()
    call = house.answered(door)
    call.close()
    until(lambda: house.left)
    assert call.end == "it closed the connection"
    door.cut("there")
    door.close()
    assert house.left == house.admitted


def test_a_killed_sender_is_noticed(house: House) -> None:
    door = house.door()
    code = (
        "import sys, time; from pd.abc import BackendContext, Call\n"
        "call = Call(BackendContext('127.0.0.1', 'cpu', None, b'secret'), 'kind', 'there', 'here',"
        " ('127.0.0.1', int(sys.argv[1])), b'')\n"
        "assert call.wait(5) and call.answered, call.end\n"
        "print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(door.address[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(one or "." for one in sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        assert not door.expel("there")
        process.kill()
        until(lambda: door.expel("there"))
    assert len(house.left) == 1


def test_a_call_knows_that_the_receiver_has_gone(house: House) -> None:
    door = house.door()
    call = house.answered(door)
    door.close()
    assert call.end == "it closed the connection" and len(house.left) == 1
    assert house.refused(door) != ""


def test_expel_is_true_when_the_sender_has_ended_it_itself_and_final(house: House) -> None:
    door = house.door()
    assert door.expel("nobody who ever came")
    call, other = house.answered(door), house.answered(door, "other")
    assert not door.expel("there") and not house.left
    assert call.end == "it closed the connection", "it is asked to"
    assert not door.expel("there")
    call.close()
    until(lambda: door.expel("there"))
    assert house.left == house.admitted[:1]
    assert house.refused(door) == "it takes nothing from this sender any more"
    assert other.end == ""


@pytest.mark.parametrize(
    ("number", "quiet"), [(errno.ETIMEDOUT, False), (errno.EHOSTUNREACH, False), (errno.ECONNRESET, True)]
)
def test_a_host_that_does_not_answer_never_counts_as_ended(
    house: House, monkeypatch: pytest.MonkeyPatch, number: int, quiet: bool
) -> None:
    """Whatever the kernel calls it; a reset comes from a machine that lives, or lives again."""

    def watch(sock: socket.socket) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Door, "_watch", staticmethod(watch))
    door = house.door()
    assert house.call(door).wait(SOON)
    until(lambda: house.left)
    until(lambda: not door.callers())
    assert door.expel("there") is quiet


# --- cut off while it comes in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "expel", "close"])
def test_who_is_ended_while_it_comes_in_is_not_admitted_and_leaves_once(house: House, how: str) -> None:
    gate = house.admit = Gate()
    door = house.door()
    call = house.call(door)
    assert gate.reached.wait(SOON)
    if how == "close":
        threading.Timer(0.05, gate.opened.set).start()
        door.close()
    else:
        assert door.cut("there") is None if how == "cut" else door.expel("there") is False
        assert not house.left
    gate.opened.set()
    assert call.wait(SOON) and not call.answered
    until(lambda: house.left)
    until(lambda: not door.callers())
    assert house.left == house.admitted and not house.admitted[0].admitted
    assert how == "close" or door.expel("there")


def test_a_later_call_of_the_same_sender_cuts_the_earlier_and_never_the_other_way(house: House) -> None:
    door = house.door()
    gates = {"old": Gate(), "new": Gate()}
    turn = iter(gates.values())

    def admit(caller: Caller) -> bytes:
        next(turn)(caller)
        door.cut("there", before=caller)
        return b""

    house.admit = admit
    old = house.call(door)
    assert gates["old"].reached.wait(SOON)
    new = house.call(door)
    assert gates["new"].reached.wait(SOON)
    gates["new"].opened.set()
    assert new.wait(SOON) and new.answered
    gates["old"].opened.set()  # it was cut, and cuts nobody
    assert old.wait(SOON) and not old.answered
    until(lambda: house.left)
    assert new.end == "" and len(door.callers("there")) == len(house.left) == 1


def test_cut_waits_for_a_leave_that_is_under_way(house: House) -> None:
    door = house.door()
    gate = Gate()
    house.leave = gate  # type: ignore[assignment]
    house.answered(door).close()
    assert gate.reached.wait(SOON)
    over: list[str] = []
    threads = [threading.Thread(target=lambda: (door.cut("there"), over.append("cut")))]
    threads += [threading.Thread(target=lambda: over.append(f"expel {door.expel('there')}"))]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not over
    gate.opened.set()
    for thread in threads:
        thread.join(SOON)
    assert sorted(over) == ["cut", "expel True"] and len(house.left) == 1


def test_others_come_in_and_are_cut_from_admit_while_somebody_leaves(house: House) -> None:
    """`leave` takes a lock that others hold while they come in."""
    door = house.door()
    lock, gate = threading.Lock(), Gate()

    def admit(caller: Caller) -> bytes:
        with lock:
            pass
        door.cut(caller.identity, before=caller)
        return b""

    def leave(caller: Caller) -> None:
        with lock:
            if caller.identity == "slow":
                gate(caller)

    house.admit, house.leave = admit, leave
    slow, first = house.answered(door, "slow"), house.answered(door)
    slow.close()
    assert gate.reached.wait(SOON)
    again = house.call(door)
    threading.Timer(0.05, gate.opened.set).start()
    assert again.wait(SOON) and again.answered
    assert first.end == "it closed the connection" and again.end == ""


def test_a_leave_that_fails_keeps_the_sender_known_until_it_succeeds(house: House) -> None:
    door = house.door()

    def leave(caller: Caller) -> None:
        raise TransferError("it still writes")

    house.leave = leave
    house.answered(door).close()
    until(lambda: "it still writes" in house.reasons())
    assert not door.expel("there")
    with pytest.raises(TransferError, match="it still writes"):
        door.cut("there")
    assert not door.expel("there")
    house.leave = lambda caller: None
    door.cut("there")
    assert door.expel("there")
    count = len(house.left)
    door.cut("there")
    assert len(house.left) == count


def test_close_is_bounded_with_callers_at_every_stage(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "HANDSHAKE_TIMEOUT", 0.3)
    door = house.door()
    house.answered(door)
    gates = [Gate() for _ in range(3)]
    for i, gate in enumerate(gates):
        house.admit = gate
        house.call(door, f"stuck-{i}")
        assert gate.reached.wait(SOON)
    strangers = [socket.create_connection(door.address) for _ in range(8)]
    until(lambda: len(door._callers) == 12)
    began = time.monotonic()
    door.close()
    assert time.monotonic() - began < 0.9
    for gate in gates:
        gate.opened.set()
    for one in strangers:
        one.close()
    until(lambda: len(house.left) == 4)


def test_a_door_that_never_opened_closes(house: House) -> None:
    door = Door(house.context(), "kind", "here", lambda caller: b"")
    assert house.refused(door) != ""
    door.close()
    door.close()


# --- what is left ---------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def ours() -> int:
    return sum(thread.name.startswith("pd-kind") for thread in threading.enumerate())


def test_a_call_that_is_closed_while_it_dials_leaves_no_socket(house: House) -> None:
    door = house.door()
    before = descriptors()
    gate = house.admit = Gate()
    call = house.call(door)
    assert gate.reached.wait(SOON)
    call.close()
    gate.opened.set()
    assert call.wait(SOON) and call.end == "it closed the connection"
    until(lambda: descriptors() == before and not door.callers())
    assert len(house.left) == 1


def test_two_hundred_calls_leave_no_thread_and_no_descriptor(house: House) -> None:
    door = house.door()
    house.answered(door).close()
    until(lambda: not door._callers)
    gc.collect()
    files, threads = descriptors(), ours()
    for i in range(200):
        sender = f"there-{i % 7}"
        if i % 5 == 4:
            house.refused(door, sender, secret=b"guess")
        else:
            house.answered(door, sender).close()
    until(lambda: not door._callers and ours() == threads)
    assert descriptors() == files and len(door._threads) < 20
    assert len(house.left) == len(house.admitted) == 161


def test_calls_cuts_and_expels_at_once_leave_everybody_once(house: House) -> None:
    door = house.door()
    house.admit = lambda caller: door.cut(caller.identity, before=caller) or b""
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            door.cut("there-0")
            door.expel("there-1")

    def come(sender: str) -> None:
        for _ in range(25):
            call = house.call(door, sender)
            assert call.wait(SOON)
            call.close()

    threads = [threading.Thread(target=come, args=(f"there-{i % 3}",)) for i in range(4)]
    threads.append(threading.Thread(target=disturb))
    for thread in threads:
        thread.start()
    for thread in threads[:-1]:
        thread.join(4 * SOON)
    stop.set()
    threads[-1].join(SOON)
    assert not any(thread.is_alive() for thread in threads)
    until(lambda: not door._callers)
    until(lambda: len(house.left) == len(house.admitted))
    assert set(house.left) == set(house.admitted)
    house.answered(door, "another")
