"""How long something takes on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def device_times(run: Callable[[], object], *, rounds: int, repeats: int, warm_up: int) -> list[float]:
    """Seconds of one call of `run` on the current device, each the mean of `rounds` calls in a row; `repeats` of them.

    `warm_up` calls before the first are not measured.
    """
    for _ in range(warm_up):
        run()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / rounds)
    return found
