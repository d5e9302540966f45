"""Where a GPU's time goes, read from a trace of the runner's steps (Chrome's format, as torch's profiler writes it)."""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

#: What occupies the device.
_BUSY = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


@dataclass(frozen=True)
class Shares:
    """`idle` of the time from the first kernel's begin to the last one's end; `kernels` in seconds, longest first."""

    seconds: float
    idle: float
    kernels: list[tuple[str, float, int]]


class _Event(msgspec.Struct):
    name: str = ""
    cat: str = ""
    ts: float = 0.0  # microseconds
    dur: float = 0.0


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]


def read_shares(path: Path) -> Shares:
    """Raises ValueError for a trace without a kernel."""
    decode: Any = msgspec.json.Decoder(_Trace, strict=False).decode
    events = [event for event in decode(gzip.decompress(path.read_bytes())).traceEvents if event.cat in _BUSY]
    if not events:
        raise ValueError(f"{path}: no kernel was recorded")
    events.sort(key=lambda event: event.ts)
    busy, end = 0.0, events[0].ts
    for event in events:
        begin, over = max(event.ts, end), event.ts + event.dur
        busy += max(0.0, over - begin)
        end = max(end, over)
    wall = end - events[0].ts
    time: defaultdict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for event in events:
        name = _short(event.name)
        time[name] += event.dur
        count[name] += 1
    kernels = sorted(((name, spent / 1e6, count[name]) for name, spent in time.items()), key=lambda one: -one[1])
    return Shares(wall / 1e6, 1 - busy / wall, kernels)


def _short(name: str) -> str:
    """Without template arguments and parameters, which fill lines."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0].strip()[:48] or name[:48]
