"""When pulls run on the GPU, and how wide: their kernels are launched in slices, each as wide as the GPU is free.

A decode step and a copy within one GPU live on the same bandwidth: every byte copied is read and written, so a copy of
214 GB/s costs a step that reads 4.3 TB/s a tenth of it, whatever the kernel. Over a link to another GPU, which is
slower than memory, a copy costs the step multiprocessors more than bandwidth. So beside steps a slice has few programs
(`widths`), and where no step is under way it takes all that there is. A slice is short and AHEAD of them are on the
device: that is how long a step that begins waits, and how soon a pull takes what became free.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pd.kernels.spans import RUN, TILE_ROWS, WORD, Form

MIB = 1 << 20

#: Slices on the device: one runs while the host is told of the one before it and launches another.
AHEAD = 3

_TILE_BYTES = TILE_ROWS * RUN * WORD


@dataclass(frozen=True)
class Width:
    """How much of the GPU a slice takes, and for how long: so many programs, and tiles of all of them at most."""

    programs: int
    form: Form
    tiles: int


def widths(multiprocessors: int) -> Mapping[tuple[bool, bool], Width]:
    """By whether the GPU is free, and whether the memory that is read is its own."""
    return {
        # All of the memory's bandwidth: programs that are short, so that none runs on when the others are done.
        (True, True): Width(48 * multiprocessors, Form(64, 8), 256 * MIB // _TILE_BYTES),
        # All of a link's, with a latency of 2 to 3 us: 1 MiB on its way would do.
        (True, False): Width(multiprocessors, Form(32, 4), 256 * MIB // _TILE_BYTES),
        # Nothing but their number bounds what programs take of the bandwidth that the step lives on.
        (False, True): Width(6, Form(64, 8), 64 * MIB // _TILE_BYTES),
        (False, False): Width(32, Form(64, 8), 128 * MIB // _TILE_BYTES),
    }


class Done(Protocol):
    """An event on the device."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Sliced(Protocol):
    """Work of so many tiles, reading memory of this GPU or of another one."""

    @property
    def tiles(self) -> int: ...

    @property
    def own(self) -> bool: ...

    def launch(self, first: int, last: int, width: Width) -> Done:
        """Tiles [first, last), behind what was launched before; the first begins at 0, the last ends at `tiles`."""


class Slices:
    """The works of one GPU, launched in the order in which they came. Thread-safe."""

    def __init__(self, width: Callable[[bool], Width]) -> None:
        """`width` says how wide the next slice may be, given whether it reads the GPU's own memory."""
        self._width = width
        self._lock = threading.Lock()
        self._waiting: collections.deque[Sliced] = collections.deque()
        self._at = 0  # of the first one: its tiles that are launched
        self._ahead: collections.deque[Done] = collections.deque()

    def add(self, work: Sliced) -> None:
        """Take on a work of at least one tile; it is launched now or while somebody waits."""
        with self._lock:
            self._waiting.append(work)
            self._launch()

    def launched(self, work: Sliced) -> None:
        """Wait until all of a work is launched, launching what comes before it, too."""
        while True:
            with self._lock:
                if all(one is not work for one in self._waiting):
                    return
                oldest = self._ahead[0]
            oldest.synchronize()
            self.go_on()

    def go_on(self) -> None:
        """Launch what there is room for. To be called when a work is done: others may wait for that alone."""
        with self._lock:
            self._launch()

    def _launch(self) -> None:
        while self._ahead and self._ahead[0].query():
            self._ahead.popleft()
        while self._waiting and len(self._ahead) < AHEAD:
            work = self._waiting[0]
            width = self._width(work.own)
            last = min(self._at + width.tiles, work.tiles)
            self._ahead.append(work.launch(self._at, last, width))
            self._at = last
            if last == work.tiles:
                self._waiting.popleft()
                self._at = 0
