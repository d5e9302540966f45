"""A one-line progress bar and a gauge of the client's own delays.

The bar is written by hand: it is drawn on the loop that stamps arrivals, where one of rich's costs 0.5 ms (measured)
and this one some microseconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from dataclasses import dataclass, field

_TICK = 0.05  # seconds between two looks at the loop
_DRAW_EVERY = 0.5  # seconds between two drawings
_WIDTH = 24  # characters of the bar


@dataclass
class Counters:
    """What happened so far in a run."""

    total: int
    sent: int = 0
    done: int = 0
    failed: int = 0
    peak: int = 0  # most requests in flight
    held: int = 0  # requests that waited for --max-concurrency
    loop_lag: array[float] = field(default_factory=lambda: array("d"))  # seconds each tick came late

    @property
    def in_flight(self) -> int:
        return self.sent - self.done


def bar(label: str, counters: Counters, elapsed: float) -> str:
    """The line: share done, counts, seconds."""
    filled = _WIDTH * counters.done // max(1, counters.total)
    failed = f", {counters.failed} failed" if counters.failed else ""
    return (
        f"{label} [{'#' * filled}{'.' * (_WIDTH - filled)}] {counters.done}/{counters.total} done, "
        f"{counters.in_flight} in flight{failed}, {elapsed:.0f} s"
    )


async def watch(label: str, counters: Counters, show: bool) -> None:
    """Until cancelled: measure how late the loop wakes up, and draw the bar on stderr when it is a terminal."""
    show = show and sys.stderr.isatty()
    start = drawn = time.perf_counter()
    try:
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            now = time.perf_counter()
            counters.loop_lag.append(max(0.0, now - due))
            if show and now - drawn >= _DRAW_EVERY:
                drawn = now
                sys.stderr.write("\r" + bar(label, counters, now - start) + "\x1b[K")
                sys.stderr.flush()
    finally:
        if show:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
