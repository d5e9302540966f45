"""Samples the next token of each row that asks for one, on the CPU. What `pd.runner.device_sampler` is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from pd.kernels.philox import DrawKeys
from pd.kernels.sampling import DrawParams, add_bias, draw, forbid, greedy, penalise
from pd.kernels.shaping import forbid_rows
from pd.messages import TokenLogprobs
from pd.runner.inputs import Int32, Request
from pd.runner.logprobs import token_logprobs, wants_logprobs
from pd.types import SamplingParams

#: A temperature below this is greedy: dividing by it would leave one token anyway, or overflow.
_COLDEST = 1e-5


@dataclass(frozen=True)
class Sampled:
    """One request's tokens of this step: one, or one per choice at its first sampled position."""

    tokens: list[int]
    logprobs: TokenLogprobs | None


def sample(
    requests: list[Request], logits: torch.Tensor, allowed: Mapping[int, Int32] = MappingProxyType({})
) -> list[Sampled]:
    """`logits` float32[S, V] are of the requests' last known tokens; rows are changed in place. Reads the requests.

    `allowed[i]` are the tokens that request i can have, at least one; see `Grammars.allowed`.
    """
    raw = {
        index: logits[index].log_softmax(-1)
        for index, request in enumerate(requests)
        if wants_logprobs(request.sampling)
    }
    for index, request in enumerate(requests):
        _shape(request, logits[index], allowed.get(index))
    best = greedy(logits).tolist()
    tokens: list[list[int]] = [[token] * request.choices for token, request in zip(best, requests, strict=True)]
    warm = [index for index, request in enumerate(requests) if request.sampling.temperature >= _COLDEST]
    if warm:
        drawn = iter(_drawn(requests, logits, warm))
        for index in warm:
            tokens[index] = [next(drawn) for _ in range(requests[index].choices)]
    return [
        Sampled(tokens[index], token_logprobs(raw[index], tokens[index], request.sampling) if index in raw else None)
        for index, request in enumerate(requests)
    ]


def _shape(request: Request, row: torch.Tensor, allowed: Int32 | None) -> None:
    """One row's logits after penalties, bias and masks, in place."""
    sampling = request.sampling
    if is_penalised(sampling):
        tokens = torch.from_numpy(request.tokens.view.astype(np.int64))
        penalise(
            row,
            tokens,
            tokens[request.prompt_len :],
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
        )
    if sampling.logit_bias:
        add_bias(row, sampling.logit_bias)
    if allowed is not None:
        forbid_rows(row[None], torch.zeros(1, dtype=torch.int32), torch.from_numpy(allowed)[None])
    elif request.too_short:
        forbid(row, sampling.stop_token_ids)


def restricts(sampling: SamplingParams) -> bool:
    """It draws from a part of the vocabulary."""
    drawn = sampling.temperature >= _COLDEST
    return drawn and (sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def is_penalised(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0


def _drawn(requests: list[Request], logits: torch.Tensor, warm: list[int]) -> list[int]:
    """One token per choice of each warm request, in order. Choices of one request share its logits, not its noise."""
    owners = [index for index in warm for _ in range(requests[index].choices)]
    offsets = [choice for index in warm for choice in range(requests[index].choices)]
    samplings: list[SamplingParams] = [requests[index].sampling for index in owners]
    keys = DrawKeys(
        seeds=tuple(sampling.seed for sampling in samplings),
        choices=tuple(sampling.choice + offset for sampling, offset in zip(samplings, offsets, strict=True)),
        positions=tuple(len(requests[index].tokens) for index in owners),
    )
    restricted = [row for row, sampling in enumerate(samplings) if restricts(sampling)]
    params = DrawParams(
        temperature=torch.tensor([sampling.temperature for sampling in samplings]),
        top_k=torch.tensor([max(0, sampling.top_k) for sampling in samplings]),
        top_p=torch.tensor([sampling.top_p for sampling in samplings]),
        min_p=torch.tensor([sampling.min_p for sampling in samplings]),
        restricted=torch.tensor(restricted, dtype=torch.int64),
    )
    rows = logits if len(owners) == logits.shape[0] == len(warm) else logits[torch.tensor(owners)]
    return [int(token) for token in draw(rows, params, keys).tolist()]
