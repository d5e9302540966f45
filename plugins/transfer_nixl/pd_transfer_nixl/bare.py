"""NIXL as its own users drive it, for `pd bench transfer`: one agent a side, prepared lists, one request."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pd.abc import Spans
from pd_transfer_nixl.agents import Memory, Nixl
from pd_transfer_nixl.vendor import load


def receive(address: int, nbytes: int) -> tuple[bytes, Callable[[], object], Callable[[], None]]:
    agent = Nixl(load("cpu")).agent("bare-receiver", [Memory(address, nbytes, "DRAM", 0, 0)])
    return address.to_bytes(8, "little") + agent.get_agent_metadata(), agent.get_new_notifs, lambda: None


def send(address: int, nbytes: int, descriptor: bytes) -> tuple[Callable[[Spans], None], Callable[[], None]]:
    agent = Nixl(load("cpu")).agent("bare-sender", [Memory(address, nbytes, "DRAM", 0, 0)])
    peer = agent.add_remote_agent(descriptor[8:]).decode()
    ends = ("", address), (peer, int.from_bytes(descriptor[:8], "little"))
    lists: dict[int, list[object]] = {}

    def write(spans: Spans) -> None:
        n = int(spans[0, 4])
        if n not in lists:
            grids = [(who, np.array([[at, n, 0, n, nbytes // n]], np.uint64)) for who, at in ends]
            lists[n] = [agent.prep_xfer_dlist(who, grid, "DRAM") for who, grid in grids]
        here, there = ((spans[:, column] // spans[0, 4]).astype(np.int32) for column in (1, 3))
        request = agent.make_prepped_xfer("WRITE", lists[n][0], here, lists[n][1], there)
        state = agent.transfer(request)
        while state == "PROC":
            state = agent.check_xfer_state(request)
        request.release()
        assert state == "DONE"

    return write, lambda: None
