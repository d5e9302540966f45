"""How the runner's loop learns that the device is done with a step."""

from __future__ import annotations

import select
import threading

from pd.runner.ends import StepEnds


class Event:
    """A device's event: reached when the test says so, or failed."""

    def __init__(self, error: str = "") -> None:
        self.reached, self._error = threading.Event(), error

    def synchronize(self) -> None:
        assert self.reached.wait(10)
        if self._error:
            raise RuntimeError(self._error)


def wait_for(ends: StepEnds, seconds: float) -> bool:
    return bool(select.select([ends.fd], [], [], seconds)[0])


def test_each_step_is_taken_once_in_order_and_only_when_it_has_ended() -> None:
    ends = StepEnds(lambda error: None)
    first, second = Event(), Event()
    ends.launched(first)
    ends.launched(second)
    second.reached.set()
    assert not wait_for(ends, 0.05) and not ends.take(), "the first one still runs"
    first.reached.set()
    assert wait_for(ends, 5) and ends.take()
    assert wait_for(ends, 5) and ends.take()
    assert not ends.take()
    ends.close()


def test_a_step_that_has_ended_already_needs_no_thread() -> None:
    ends = StepEnds(lambda error: None)
    ends.launched(None)
    ends.launched(None)
    assert ends.take() and ends.take() and not ends.take()
    ends.close()


def test_a_device_that_fails_is_told_of_and_ends_nothing() -> None:
    told: list[BaseException] = []
    ends = StepEnds(told.append)
    broken, later = Event("an illegal memory access"), Event()
    for event in (broken, later):
        event.reached.set()
        ends.launched(event)
    deadline = threading.Event()
    while not told and not deadline.wait(0.01):
        pass
    assert str(told[0]) == "an illegal memory access"
    assert not ends.take()
    ends.close()
