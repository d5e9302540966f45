"""A runner whose transfer threads hang is noticed by the command that it does not answer."""

from __future__ import annotations

import pytest

from pd import messages as m
from pd.scheduler.transfer_watch import TransferWatch

PAIRS = [
    (m.TransferConnect("d", b""), m.TransferConnected("d")),
    (m.TransferConnect("d", b""), m.TransferPeerLost("d", "refused")),
    (m.TransferResetPeer("d"), m.TransferReset("d")),
    (m.TransferRevoke("p", 7), m.TransferRevoked(7, False, "p")),
    (m.TransferRevoke("p", 7, over=True), m.TransferRevoked(7, True, "p")),
    (m.TransferVerify("p", 7, b"", b"", b""), m.TransferVerified(7, b"", 0, sender="p")),
    (m.TransferExpel("p"), m.TransferExpelled("p", False)),
]


def watch(ranks: tuple[int, ...] = (0,)) -> TransferWatch:
    return TransferWatch(ranks, 60.0)


@pytest.mark.parametrize(("command", "answer"), PAIRS)
def test_a_command_without_its_answer_is_a_hung_runner(command: m.TransferCommand, answer: m.TransferEvent) -> None:
    w = watch()
    w.sent(10.0, command)
    assert w.problem(70.0) == ""
    assert w.problem(70.1).startswith(f"the transfer thread has not answered {type(command).__name__} of ")
    assert w.problem(70.1).endswith(" for 60 s")
    w.answered(70.2, answer)
    assert w.problem(1e9) == "" and len(w) == 0


@pytest.mark.parametrize(
    "command",
    [
        m.TransferPush(m.Push("d", 7, 0, b"", b"")),  # waits for its peer, by a deadline of its own
        m.TransferGrant("p", 7, b""),
        m.TransferCancel("d", 7),
    ],
)
def test_what_may_take_its_time_or_has_no_answer_is_not_awaited(command: m.TransferCommand) -> None:
    w = watch()
    w.sent(0.0, command)
    assert len(w) == 0


def test_every_command_is_either_awaited_or_known_not_to_be() -> None:
    unanswered = {m.TransferPush, m.TransferGrant, m.TransferCancel}
    assert {type(command) for command, _ in PAIRS} | unanswered == set(m.TransferCommand.__args__)


def test_the_answer_about_another_hand_off_or_peer_is_not_the_awaited_one() -> None:
    w = watch()
    w.sent(0.0, m.TransferRevoke("p", 7))
    for event in (m.TransferRevoked(8, True, "p"), m.TransferRevoked(7, True, "q"), m.TransferReset("p")):
        w.answered(1.0, event)
    assert w.problem(60.1)


def test_a_command_waits_from_the_answer_to_those_before_it() -> None:
    w = watch()
    for tag in range(4):
        w.sent(0.0, m.TransferRevoke("p", tag))
    for tag in range(3):
        w.answered(40.0 * (tag + 1), m.TransferRevoked(tag, True, "p"))
        assert w.problem(40.0 * (tag + 1) + 39.0) == ""
    assert w.problem(180.1)


def test_answers_to_younger_commands_of_another_thread_do_not_hide_one_that_hangs() -> None:
    w = watch()
    w.sent(0.0, m.TransferResetPeer("d0"))
    for second in range(60):
        w.sent(second, m.TransferConnect("d1", b""))
        w.answered(second + 0.1, m.TransferConnected("d1"))
    assert w.problem(60.1)


def test_a_repeated_command_waits_as_long_as_the_first() -> None:
    w = watch()
    w.sent(0.0, m.TransferRevoke("p", 7))
    w.sent(50.0, m.TransferRevoke("p", 7, over=True))
    assert w.problem(60.1)


def test_all_ranks_must_answer() -> None:
    w = watch((0, 1))
    w.sent(0.0, m.TransferResetPeer("d"))
    w.answered(1.0, m.TransferReset("d", 1))
    w.answered(1.0, m.TransferReset("d", 1))
    assert w.problem(60.1)
    w.answered(61.0, m.TransferReset("d", 0))
    assert w.problem(1e9) == ""
