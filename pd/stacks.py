"""A deep stack for a library that recurses in native code.

A chain of references in a grammar is a chain of calls in llguidance: 256 KiB of them overflow the usual 8 MiB, which
ends the process. 512 MiB hold the longest one; memory is used only as far as a call goes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

STACK_BYTES = 512 << 20

#: A thread's stack size is set for the whole process before the thread starts.
_one_starts = threading.Lock()


def call_deep(function: Callable[[], T]) -> T:
    """What `function` returns or raises, called on a thread of its own. Waits for it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised below, where it belongs
            errors.append(error)

    thread = threading.Thread(target=run, name="pd-deep")
    with _one_starts:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
