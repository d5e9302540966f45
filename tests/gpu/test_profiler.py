"""The runner's profiler where there is a GPU: kernels are in the trace, of launches and of a replayed graph."""

from __future__ import annotations

import gzip
import json
import select
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pd.messages import ProfileAnswer, ProfileWish, RunnerToScheduler, StartProfile, StepOrder, StopProfile
from pd.runner.profiler import Profiler


def order(step: int, count: int) -> StepOrder:
    return StepOrder(step, np.array([1]).tobytes(), np.array([count], dtype=np.int32).tobytes(), b"\1")


@pytest.mark.parametrize("activities", [(), ("GPU",)])
def test_kernels_are_in_the_trace(tmp_path: Path, activities: tuple[str, ...]) -> None:
    weights = torch.randn(512, 512, device="cuda")
    out = torch.empty_like(weights)
    torch.mm(weights, weights, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(weights, weights, out=out)
    said: list[RunnerToScheduler] = []
    profiler = Profiler("one-decode-rank0", str(tmp_path), said.append)
    profiler.command(StartProfile(1, ProfileWish(activities, num_steps=4)))
    for step in range(6):
        profiler.before(order(step, 1))
        graph.replay() if step % 2 else torch.mm(weights, weights, out=out)
        profiler.after()
    profiler.command(StopProfile(2))
    while not isinstance(said[-1], ProfileAnswer) or said[-1].token != 2:
        assert select.select([profiler.written_fd], [], [], 60)[0]
        profiler.written()
    answer = said[-1]
    profiler.close()
    assert not answer.problem
    (name,) = answer.files
    with gzip.open(name) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) >= 4
    spans = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert activities or len([span for span in spans if span.startswith("pd step")]) == 4
