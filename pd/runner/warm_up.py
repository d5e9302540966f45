"""The first steps, which are slow, taken before anybody waits for them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pd.messages import Admit, StepDone, StepOrder
from pd.types import SamplingParams

#: Sampling that goes different ways through the sampler.
_SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, logprobs=True),
    SamplingParams(temperature=1.0, top_p=0.9, logprobs=True),
)


class Steps(Protocol):
    def step(self, order: StepOrder) -> StepDone: ...


def warm_up(worker: Steps, prompt: int, prefix: int = 0) -> None:
    """Prompts of `prompt` tokens behind `prefix` computed ones, a token after each, then all of them at once.

    Touches the scratch block only.
    """
    keys = list(range(-len(_SAMPLINGS), 0))
    admits = [
        Admit(key, 0, np.zeros(prefix + prompt, dtype=np.int32).tobytes(), prefix + prompt, prefix, b"", sampling)
        for key, sampling in zip(keys, _SAMPLINGS, strict=True)
    ]
    for admit in admits:
        worker.step(_order([admit.key], prompt, admit=[admit]))
        worker.step(_order([admit.key], 1))
    worker.step(_order(keys, 1))
    worker.step(StepOrder(0, b"", b"", b"", release=keys))


def _order(keys: list[int], count: int, admit: list[Admit] | None = None) -> StepOrder:
    rows = np.array(keys, dtype=np.int64).tobytes()
    counts = np.full(len(keys), count, dtype=np.int32).tobytes()
    return StepOrder(0, rows, counts, b"\1" * len(keys), admit=admit or [])
