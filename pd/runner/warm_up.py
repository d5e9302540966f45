"""The first steps, which are slow, taken before anybody waits for them."""

from __future__ import annotations

import itertools
from typing import Protocol

import msgspec
import numpy as np
import torch

from pd.kernels.shaping import token_bits
from pd.messages import Admit, StepDone, StepOrder
from pd.runner.device_sampler import DeviceSampler
from pd.runner.device_state import upload
from pd.runner.graphs import Outcome
from pd.runner.inputs import Growing, Request
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


def warm_sampler(sampler: DeviceSampler, logits: torch.Tensor) -> None:
    """Every way through a GPU's sampler, in batches of S rows; `logits` [S, V] as the model makes them.

    S of the slots must be free.
    """
    (rows, vocab), state = logits.shape, sampler.state
    for restricted, told, shaped in itertools.product((False, True), repeat=3):
        plain = SamplingParams(top_p=0.9 if restricted else 1.0, logprobs=told, top_logprobs=int(told))
        more = msgspec.structs.replace(plain, repetition_penalty=1.1, logit_bias={0: 1.0}) if shaped else plain
        requests = [_request(more if row == 0 else plain) for row in range(rows)]
        state.admit(requests)
        slots = upload(np.array([request.slot for request in requests], dtype=np.int32), logits.device)
        allowed = {0: token_bits(range(vocab), vocab)} if shaped else {}
        sampler.sample(requests, Outcome(logits, slots, torch.ones_like(slots)), allowed)
        for request in reversed(requests):
            state.release(request)


def _request(sampling: SamplingParams) -> Request:
    tokens, blocks = Growing(np.zeros(1, dtype=np.int32)), Growing(np.empty(0, dtype=np.int32))
    return Request(-1, 0, 1, 0, tokens, blocks, sampling, choices=2, logprob_start=-1, prompt_top_logprobs=0)


def _order(keys: list[int], count: int, admit: list[Admit] | None = None) -> StepOrder:
    rows = np.array(keys, dtype=np.int64).tobytes()
    counts = np.full(len(keys), count, dtype=np.int32).tobytes()
    return StepOrder(0, rows, counts, b"\1" * len(keys), admit=admit or [])
