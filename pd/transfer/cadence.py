"""When a backend that must be driven is driven."""

from __future__ import annotations

from collections.abc import Callable

#: Seconds between calls of `progress` while something may be written, and while nothing is.
OFTEN, SELDOM = 1e-3, 20e-3

#: Seconds for which it goes on often when nothing is under way any more: hand-offs come one after the other.
LINGER = 0.1


class Cadence:
    """Calls `progress` when it is due. `active`: whether something may be written, to here or from here.

    Used by one thread, which calls `turn` when the time that it returned is over, and at once when `active` has become
    true: what begins after a long rest is not kept waiting.
    """

    def __init__(self, progress: Callable[[], None], active: Callable[[], bool]) -> None:
        self._progress, self._active = progress, active
        self._last = self._rest = float("-inf")

    def turn(self, now: float) -> float:
        """Seconds from `now`, on a monotonic clock, until progress is due again."""
        if self._active():
            self._rest = now + LINGER
        interval = OFTEN if now < self._rest else SELDOM
        if now >= self._last + interval:
            self._progress()
            self._last = now
        return self._last + interval - now
