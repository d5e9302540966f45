"""What the parents of processes share: signals, and running a coroutine until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator

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
