"""Mooncake's engine with nothing around it, on the same spans: what `pd bench transfer` compares the backend with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from pd.abc import Spans
from pd_transfer_mooncake.plugin import PROTOCOL, load

#: Seconds between looks at writes under way, growing: looking often takes time from the engine's own thread.
POLL_FIRST, POLL_LAST = 50e-6, 1e-3


def _engine(address: int, nbytes: int, device: str) -> Any:
    """With this memory registered; by the protocol that the backend would take."""
    protocol = os.environ.get(PROTOCOL) or "tcp"
    engine = load(protocol).TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", protocol, "") != 0:
        raise RuntimeError("Mooncake did not start")
    if engine.register_memory(address, nbytes, "*" if device == "cpu" else device) != 0:
        raise RuntimeError("Mooncake cannot register the region")
    return engine


def receive(address: int, nbytes: int, device: str) -> tuple[bytes, Callable[[], None], Callable[[], None]]:
    """(descriptor, progress, close) of an engine that owns this memory. It has threads of its own."""
    engines = [_engine(address, nbytes, device)]
    return msgspec.msgpack.encode((engines[0].get_rpc_port(), address)), lambda: None, engines.clear


def send(
    address: int, nbytes: int, device: str, descriptor: bytes
) -> tuple[Callable[[Spans], None], Callable[[], None]]:
    """(write, close). `write` posts every span at once and returns when all are applied."""
    port, there = msgspec.msgpack.decode(descriptor, type=tuple[int, int])
    engines, session = [_engine(address, nbytes, device)], f"127.0.0.1:{port}"

    def write(spans: Spans) -> None:
        submit, check = engines[0].transfer_submit_write, engines[0].transfer_check_status
        waiting = [submit(session, address + row[1], there + row[3], row[4]) for row in spans.tolist()]
        position, pause = 0, POLL_FIRST
        while position < len(waiting):
            status = check(waiting[position]) if waiting[position] else -1
            if status == 1:
                position += 1
            elif status == 0:
                time.sleep(pause)
                pause = min(pause * 1.5, POLL_LAST)
            else:
                raise RuntimeError(f"a write failed: {status}")

    return write, engines.clear
