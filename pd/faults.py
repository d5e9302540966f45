"""Named points at which a test can hold a process, to kill or freeze one exactly there. Unset in service.

A test arms a point by creating the file `PREFIX.POINT`. The process that comes to it renames the file to
`PREFIX.POINT.reached`, with its pid inside, and blocks until `PREFIX.POINT.go` exists.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

#: Seconds that a process stands at a point at most: a test that dies leaves nothing hanging.
HOLD = 1.0

_POLL = 0.002


def fault_prefix(folder: str, instance: str, process: str) -> str:
    """What the files of one process begin with; "" (no fault points) when no folder is set."""
    return str(Path(folder).absolute() / f"{instance}.{process}") if folder else ""


class FaultPoints:
    """The points of one process. `prefix` as `fault_prefix` makes it."""

    def __init__(self, prefix: str, hold: float = HOLD) -> None:
        self._prefix, self._hold = prefix, hold

    @classmethod
    def of(cls, prefix: str) -> FaultPoints | None:
        """None, so that callers pay for a comparison only, without a prefix."""
        return cls(prefix) if prefix else None

    def reached(self, point: str) -> None:
        """Stand here, at most `hold` seconds, if the point is armed. Blocks the caller's thread."""
        armed = Path(f"{self._prefix}.{point}")
        if not armed.exists():
            return
        armed.write_text(str(os.getpid()))
        armed.rename(f"{armed}.reached")
        go, until = Path(f"{armed}.go"), time.monotonic() + self._hold
        while not go.exists() and time.monotonic() < until:
            time.sleep(_POLL)
