"""What the parents of processes share: signals, running a coroutine until it is told to stop, a folder for sockets."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import uvloop


def run_until_signalled(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run `main(stop)` on uvloop. SIGTERM or SIGINT sets `stop`; a second one kills this process and its children."""

    async def supervised() -> int:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def on_signal(number: int) -> None:
            if stop.is_set():  # children die with their parent
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        return await main(stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, unwrapped():
        return runner.run(supervised())


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """A TaskGroup wraps what went wrong; the one error in it is what the user should see."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


@contextlib.contextmanager
def socket_folder(root: Path | None = None) -> Iterator[Path]:
    """A folder in `root` (that for temporary files) that only this user can enter, removed at the end. What killed
    processes have left goes first.

    Its owner holds a lock on a file in it, which the kernel releases however the owner ends.
    """
    root = root or Path(tempfile.gettempdir())
    for path in root.glob("pd-*/lock"):
        _remove_if_unowned(path)
    folder = Path(tempfile.mkdtemp(prefix="pd-", dir=root))
    with (folder / "unlocked").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, folder / "lock")  # only now may others judge by it
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_unowned(lock: Path) -> None:
    try:
        with lock.open() as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    except OSError:  # somebody's who lives or whom we may not touch, or gone meanwhile
        pass
