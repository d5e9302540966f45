"""NIXL as its own users drive it, for `pd bench transfer`: one agent a side, prepared lists, one request."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pd.abc import Region, Spans
from pd_transfer_nixl.agents import Memory, Nixl
from pd_transfer_nixl.vendor import load


def receive(address: int, nbytes: int, device: str) -> tuple[bytes, Callable[[], object], Callable[[], None]]:
    memory = Memory.of(Region(0, address, nbytes, device))
    agent = Nixl(load(device)).agent("bare-receiver", [memory])
    words = address.to_bytes(8, "little") + memory.ordinal.to_bytes(8, "little")
    return words + agent.get_agent_metadata(), agent.get_new_notifs, lambda: None


def send(
    address: int, nbytes: int, device: str, descriptor: bytes
) -> tuple[Callable[[Spans], None], Callable[[], None]]:
    memory = Memory.of(Region(0, address, nbytes, device))
    agent = Nixl(load(device)).agent("bare-sender", [memory])
    base, ordinal = (int.from_bytes(descriptor[i : i + 8], "little") for i in (0, 8))
    peer = agent.add_remote_agent(descriptor[16:]).decode()
    ends = ("", address, memory.ordinal), (peer, base, ordinal)
    lists: dict[int, list[object]] = {}

    def write(spans: Spans) -> None:
        offsets, lengths = spans[:, [1, 3]].astype(np.int64), spans[:, 4].astype(np.int64)
        n = int(np.gcd.reduce(np.append(offsets, lengths)))  # the coarsest grid that all of it fits
        if n not in lists:
            grids = [(who, np.array([[at, n, gpu, n, nbytes // n]], np.uint64)) for who, at, gpu in ends]
            lists[n] = [agent.prep_xfer_dlist(who, grid, memory.kind) for who, grid in grids]
        counts = lengths // n
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        here, there = ((np.repeat(offsets[:, i] // n, counts) + inside).astype(np.int32) for i in (0, 1))
        request = agent.make_prepped_xfer("WRITE", lists[n][0], here, lists[n][1], there)
        state = agent.transfer(request)
        while state == "PROC":
            state = agent.check_xfer_state(request)
        request.release()
        assert state == "DONE"

    return write, lambda: None
