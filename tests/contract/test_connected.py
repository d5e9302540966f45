"""What a backend that keeps connections gets from its base class, over an engine that does nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pd.abc import BackendContext, Caller, ConnectedBackend, Receiver, host_region
from pd.errors import TransferError
from pd.testing.transfer_peer import HostMemory

SIZE = 4096


class Fenced(HostMemory):
    def __init__(self) -> None:
        self.fences = 0

    def fence(self) -> None:
        self.fences += 1


class Backend(ConnectedBackend[Receiver]):
    name = "kind"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self.admitted: list[tuple[str, int]] = []

    def admit(self, caller: Caller) -> bytes:
        self.admitted.append((caller.identity, len(self.regions)))
        return b"come in"


@pytest.fixture
def make() -> Iterator[Callable[..., Backend]]:
    made: list[Backend] = []

    def make(identity: str, device: str = "cpu") -> Backend:
        made.append(Backend(BackendContext("127.0.0.1", device, Fenced(), b"secret")))
        made[-1].open(identity)
        return made[-1]

    yield make
    for one in made:
        one.close()


def regions(count: int = 2) -> list[Any]:
    return [host_region(np.zeros(SIZE, dtype=np.uint8).data) for _ in range(count)]


def test_nobody_is_answered_before_the_memory_is_registered(make: Callable[..., Backend]) -> None:
    here, there = make("here"), make("there")
    early = there.call("here", here.door.address)
    assert early.wait(5.0) and not early.answered and not here.admitted
    here.register(regions())
    call = there.call("here", here.door.address)
    assert call.answer() == b"come in" and here.admitted == [("there", 2)]
    call.close()


def test_spans_are_placed_by_the_tables_of_both_sides_and_refused_outside_either(make: Callable[..., Backend]) -> None:
    here = make("here")
    here.register(regions())
    remote = [(1 << 40, SIZE)]
    spans = np.array([[1, 8, 0, 16, 24], [0, SIZE - 8, 0, 64, 8]], dtype=np.uint64)
    sources, targets = here.ends(spans, remote)
    assert sources.tolist() == [here.table[1][0] + 8, here.table[0][0] + SIZE - 8]
    assert targets.tolist() == [(1 << 40) + 16, (1 << 40) + 64]
    huge = (1 << 64) - 8
    for row, what in (
        ([2, 0, 0, 0, 8], "local"),
        ([0, 0, 1, 0, 8], "remote"),
        ([0, SIZE - 8, 0, 0, 16], "local"),
        ([0, 0, 0, SIZE - 8, 16], "remote"),
        ([0, huge, 0, 0, 16], "local"),
        ([0, 0, 0, huge, 16], "remote"),
        ([0, 0, 0, 0, huge], "local"),
        ([0, 0, 0, 0, 0], "local"),
    ):
        with pytest.raises(TransferError, match=f"outside the {what} regions"):
            here.ends(np.array([*spans.tolist(), row], dtype=np.uint64), remote)
    assert here.ends(spans[:0], remote)[0].size == 0


@pytest.mark.parametrize("end", ["reset_peer", "close"])
def test_the_receiver_learns_of_a_reset_and_of_a_close(make: Callable[..., Backend], end: str) -> None:
    here, there = make("here"), make("there")
    here.register(regions())
    call = there.call("here", here.door.address)
    call.answer()
    peer = Receiver("here", call)
    there.receivers.add(peer)
    assert not here.door.expel("there")
    if end == "close":
        there.close()
    else:
        there.reset_peer(peer)
    assert not there.receivers
    deadline = time.monotonic() + 5.0
    while not here.door.expel("there"):
        assert time.monotonic() < deadline


def test_without_notion_of_hand_offs_nothing_is_called_quiet_and_nothing_digested(make: Callable[..., Backend]) -> None:
    here = make("here")
    assert here.revoke(1, "there") is False
    assert here.take_digests(1, "there").shape == (0, 4)
    assert here.allocate(SIZE, "cpu") is None


@pytest.mark.parametrize(("device", "fences"), [("cpu", 0), ("cuda:0", 1), ("npu:0", 1)])
def test_a_device_is_told_of_what_has_landed(make: Callable[..., Backend], device: str, fences: int) -> None:
    here = make("here", device)
    here.fence("there")
    assert here.context.memory.fences == fences  # type: ignore[attr-defined]
