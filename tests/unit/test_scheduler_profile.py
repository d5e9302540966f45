"""Profiles on the pure scheduler: who is answered, and when the runner's silence counts."""

from __future__ import annotations

import pytest

from pd import messages as m
from pd.scheduler import events as ev
from pd.scheduler.actions import Exit, Profile, Reply
from pd.scheduler.profile import BUSY_BOUND
from pd.scheduler.state import Scheduler
from pd.scheduler.transfer_watch import TransferWatch
from pd.testing.instance import Instance, settings


def test_each_worker_gets_the_answer_to_its_own_question() -> None:
    instance = Instance()
    wish = m.ProfileWish(num_steps=3)
    (first,) = instance.handle(ev.ProfileAsked(0.0, 1, m.StartProfile(7, wish)))
    (second,) = instance.handle(ev.ProfileAsked(0.0, 2, m.StopProfile(7)))
    assert isinstance(first, Profile) and isinstance(second, Profile)
    assert isinstance(first.message, m.StartProfile) and first.message.wish == wish
    assert isinstance(second.message, m.StopProfile) and first.message.token != second.message.token
    for worker, profile, said in (
        (2, second, m.ProfileAnswer(second.message.token, files=["/t"])),
        (1, first, m.ProfileAnswer(first.message.token, "no", "num_steps")),
    ):
        answers = [a for a in instance.handle(ev.ProfileSaid(1.0, said)) if isinstance(a, Reply)]
        data: dict[str, object] = {"problem": said.problem, "param": said.param, "files": said.files, "status": 400}
        assert answers == [Reply(worker, m.Answer(7, data))], profile


def test_before_the_runner_is_up_there_is_nobody_to_ask() -> None:
    (reply,) = Scheduler(settings()).handle(ev.ProfileAsked(0.0, 1, m.StopProfile(7)))
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Answer)
    assert reply.message.data["status"] == 503


@pytest.mark.parametrize("busy", [False, True])
def test_a_step_may_take_longer_while_the_runner_ends_a_recording(busy: bool) -> None:
    instance = Instance(settings(step_timeout=3.0))
    instance.submit(1, [5, 6, 7], 4)
    if busy:
        instance.handle(ev.ProfileSaid(1.0, m.ProfileBusy(True)))
    exits = [a for a in instance.handle(ev.Tick(5.0)) if isinstance(a, Exit)]
    assert bool(exits) is not busy
    if busy:
        instance.handle(ev.ProfileSaid(20.0, m.ProfileBusy(False)))
        assert not any(isinstance(a, Exit) for a in instance.handle(ev.Tick(22.9))), "counted from there on"
        assert any(isinstance(a, Exit) for a in instance.handle(ev.Tick(23.1)))


def test_no_recording_takes_for_ever_to_end() -> None:
    instance = Instance(settings(step_timeout=3.0))
    instance.submit(1, [5, 6, 7], 4)
    instance.handle(ev.ProfileSaid(1.0, m.ProfileBusy(True)))
    assert not any(isinstance(a, Exit) for a in instance.handle(ev.Tick(BUSY_BOUND)))
    assert any(isinstance(a, Exit) for a in instance.handle(ev.Tick(BUSY_BOUND + 2)))


def test_the_transfer_threads_cannot_answer_then_either() -> None:
    watch = TransferWatch([0], 3.0)
    watch.sent(0.0, m.TransferResetPeer("p"))
    assert watch.problem(4.0) and not watch.problem(4.0, 2.0)
