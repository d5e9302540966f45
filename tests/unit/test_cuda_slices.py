"""How pulls share a GPU with steps: slices launched in order, few at a time, each as wide as the GPU is free."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from pd.kernels.spans import Form
from pd.runner.cuda_slices import AHEAD, Slices, Width, widths

WIDE, NARROW = Width(1000, Form(32, 4), 40), Width(6, Form(64, 8), 10)


class Device:
    """Runs what was launched on it one after the other, when told."""

    def __init__(self) -> None:
        self.launched: list[Slice] = []

    def finish(self, count: int = 1) -> None:
        for one in [one for one in self.launched if not one.query()][:count]:
            one.over.set()

    def rows(self) -> list[tuple[str, int, int, int]]:
        return [(one.name, one.first, one.last, one.width.programs) for one in self.launched]


class Slice:
    def __init__(self, name: str, first: int, last: int, width: Width) -> None:
        self.name, self.first, self.last, self.width = name, first, last, width
        self.over = threading.Event()

    def query(self) -> bool:
        return self.over.is_set()

    def synchronize(self) -> None:
        assert self.over.wait(10)


class Work:
    def __init__(self, device: Device, name: str, tiles: int, own: bool = True) -> None:
        self._device, self._name, self.tiles, self.own = device, name, tiles, own

    def launch(self, first: int, last: int, width: Width) -> Slice:
        made = Slice(self._name, first, last, width)
        self._device.launched.append(made)
        return made


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_no_more_than_a_few_slices_are_on_the_device_and_works_keep_their_order() -> None:
    device, slices = Device(), Slices(lambda own: NARROW)
    for name, tiles in (("a", 25), ("b", 10), ("c", 11)):
        slices.add(Work(device, name, tiles))
    expected = [("a", 0, 10), ("a", 10, 20), ("a", 20, 25), ("b", 0, 10), ("c", 0, 10), ("c", 10, 11)]
    for done in range(len(expected) + 1):
        assert [row[:3] for row in device.rows()] == expected[: done + AHEAD]
        device.finish()
        slices.go_on()


def test_each_slice_is_as_wide_as_the_gpu_is_free_when_it_is_launched() -> None:
    device, free = Device(), True
    slices = Slices(lambda own: WIDE if free else NARROW)
    slices.add(Work(device, "a", 200))
    assert device.rows() == [("a", 40 * i, 40 * i + 40, 1000) for i in range(AHEAD)]
    free = False  # a step begins
    device.finish(2)
    slices.go_on()
    assert device.rows()[AHEAD:] == [("a", 120, 130, 6), ("a", 130, 140, 6)]
    free = True
    device.finish(3)
    slices.go_on()
    assert device.rows()[AHEAD + 2 :] == [("a", 140, 180, 1000), ("a", 180, 200, 1000)]


def test_the_memory_that_is_read_decides_too() -> None:
    device, asked = Device(), []
    slices = Slices(lambda own: asked.append(own) or NARROW)  # type: ignore[func-returns-value]
    slices.add(Work(device, "a", 1, own=True))
    slices.add(Work(device, "b", 1, own=False))
    assert asked == [True, False]


def test_who_waits_for_a_work_launches_it_and_all_before_it() -> None:
    device, slices = Device(), Slices(lambda own: NARROW)
    works = [Work(device, name, 30) for name in "abc"]
    for work in works:
        slices.add(work)
    waited: list[str] = []
    threads = [
        threading.Thread(target=lambda one=one: (slices.launched(one), waited.append(one._name))) for one in works[1:]
    ]
    for thread in threads:
        thread.start()
    for done in range(6):
        eventually(lambda done=done: len(device.launched) == AHEAD + done)  # type: ignore[misc]
        assert waited == ([] if done < 3 else ["b"]) or done == 3
        device.finish()
    for thread in threads:
        thread.join(10)
    assert waited == ["b", "c"] and len(device.launched) == 9
    slices.launched(works[0])  # at once


@pytest.mark.parametrize("alone", [False, True])
def test_a_slice_ends_within_a_millisecond(alone: bool) -> None:
    """By what was measured: GB/s of the memory within one H200 and of its link, alone and beside steps."""
    rates = {(True, True): 1900e9, (True, False): 340e9, (False, True): 219e9, (False, False): 340e9}
    for (free, own), width in widths(132).items():
        assert width.tiles * 16384 / rates[free, own] < 1e-3
    assert widths(132)[alone, False].programs < widths(132)[True, True].programs
