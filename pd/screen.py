"""What the user sees while an instance starts: log lines, and in a terminal a bar below them that says how far it is.

Only the process that the user has started shows progress; those below it hand on what their children report.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.filesize import decimal

from pd.logs import LogSettings, Stream, get_logger

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: What an instance goes through at start-up. Weights are counted in bytes, a total of 0 is not known.
WEIGHTS, KV_POOL, KERNELS, GRAPHS = "weights", "KV pool", "kernels", "CUDA graphs"

#: (stage, done, total)
Report = Callable[[str, int, int], None]

#: Seconds between two lines of progress, where there is no bar.
INTERVAL = 2.0


class Screen(Protocol):
    """`stream` is where this process's own lines go."""

    @property
    def stream(self) -> Stream: ...

    def lines(self, text: bytes) -> None:
        """Whole lines of a child's output."""

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        """How far `who`, a member of a cluster or "", has come."""

    def started(self, who: str) -> None:
        """There is no more progress of it: it is up, or has failed."""


def open_screen(settings: LogSettings, stream: TextIO) -> Screen:
    """A bar where `stream` is a terminal that can be drawn on, unless the logs are to be JSON; else lines."""
    if settings.log_format != "json" and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return BarScreen(stream)
    return LineScreen(stream)


class LineScreen:
    def __init__(self, stream: TextIO, interval: float = INTERVAL) -> None:
        self.stream: Stream = stream
        self._interval = interval
        self._said: dict[str, float] = {}

    def lines(self, text: bytes) -> None:
        write_lines(text)

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said.setdefault(who, now) < self._interval:
            return
        self._said[who] = now
        get_logger(**({"member": who} if who else {})).info("starting", stage=stage, done=amount(stage, done, total))

    def started(self, who: str) -> None:
        self._said.pop(who, None)


class Relay(LineScreen):
    """Of a child: its parent is told of the progress."""

    def __init__(self, stream: TextIO, report: Report) -> None:
        super().__init__(stream)
        self._report = report

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        self._report(stage, done, total)


class BarScreen:
    """One bar for each who that starts. Lines are written above them; bars disappear when all have started."""

    def __init__(self, stream: TextIO) -> None:
        self._terminal = stream
        self.stream: Stream = self
        self._bars: Progress | None = None
        self._tasks: dict[str, tuple[TaskID, str]] = {}

    # --- the stream of this process's lines ---

    def write(self, text: str, /) -> int:
        if self._bars is None:
            self._terminal.write(text)
        else:
            from rich.text import Text

            self._bars.console.print(Text.from_ansi(text.removesuffix("\n")), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return True

    # --- the children's ---

    def lines(self, text: bytes) -> None:
        if self._bars is None:
            write_lines(text)
        elif text:
            self.write(text.decode(errors="replace"))

    def progress(self, who: str, stage: str, done: int, total: int) -> None:
        bars, label, said = self._shown(), f"{who} {stage}".lstrip(), amount(stage, done, total)
        if who not in self._tasks:
            task = bars.add_task(label, total=total or None, completed=done, amount=said)
            self._tasks[who] = task, stage
            return
        task, before = self._tasks[who]
        if stage != before:
            bars.reset(task, description=label)
            self._tasks[who] = task, stage
        next(one for one in bars.tasks if one.id == task).total = total or None  # `update` does not take it back
        bars.update(task, completed=done, amount=said, refresh=stage != before)

    def started(self, who: str) -> None:
        task, _ = self._tasks.pop(who, (None, ""))
        if self._bars is None or task is None:
            return
        if self._tasks:
            self._bars.remove_task(task)
        else:
            self._bars.stop()
            self._bars = None

    def _shown(self) -> Progress:
        if self._bars is None:
            from rich.console import Console  # not needed, and slow to import, where there is no terminal
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")
            console = Console(file=self._terminal)
            self._bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
            self._bars.start()
            console.show_cursor(True)  # or it stays hidden in the terminal of who is killed
        return self._bars


def write_lines(text: bytes) -> None:
    """To stderr, past Python's buffers."""
    view = memoryview(text)
    while view:
        view = view[os.write(2, view) :]


def amount(stage: str, done: int, total: int) -> str:
    """ "3.2 GB/16.1 GB" of weights, "12/35" of others; without a total that is not known."""
    show = decimal if stage == WEIGHTS else str
    return f"{show(done)}/{show(total)}" if total else show(done)


class Stage:
    """Reports a stage of start-up: when it begins, when its total is known, every `interval` seconds, when it ends."""

    def __init__(self, report: Report, name: str, total: int = 0, interval: float = 0.1) -> None:
        self._report, self._name, self._interval = report, name, interval
        self._last = 0, total
        self._say()

    def __call__(self, done: int, total: int) -> None:
        known = total != self._last[1]  # only now
        self._last = done, total
        if known or done == total or time.monotonic() - self._at >= self._interval:
            self._say()

    def end(self) -> None:
        """All that was to be done is, whether or not it was counted."""
        done, total = self._last
        self._last = max(done, total), total
        self._say()

    def _say(self) -> None:
        self._at = time.monotonic()
        self._report(self._name, *self._last)
