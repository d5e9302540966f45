"""Samples the next token of each row that asks for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from pd.kernels.philox import DrawKeys
from pd.kernels.sampling import DrawParams, add_bias, draw, forbid, greedy, penalise
from pd.messages import TokenLogprobs
from pd.runner.inputs import Request
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
    requests: list[Request], logits: torch.Tensor, forbidden: Mapping[int, torch.Tensor] = MappingProxyType({})
) -> list[Sampled]:
    """`logits` float32[S, V] are of the requests' last known tokens; rows are changed in place. Reads the requests.

    On any device; on a GPU it waits for what it computes.

    `forbidden[i]` bool[V] are the tokens that request i cannot have; never all.
    """
    raw = {
        index: logits[index].log_softmax(-1)
        for index, request in enumerate(requests)
        if wants_logprobs(request.sampling)
    }
    for index, request in enumerate(requests):
        _shape(request, logits[index], forbidden.get(index))
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


def _shape(request: Request, row: torch.Tensor, forbidden: torch.Tensor | None) -> None:
    """One row's logits after penalties, bias and masks, in place."""
    sampling = request.sampling
    if _is_penalised(sampling):
        tokens = torch.from_numpy(request.tokens.view.astype(np.int64)).to(row.device)
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
    if forbidden is not None:
        row.masked_fill_(forbidden.to(row.device), float("-inf"))
    if _too_short(request) and (forbidden is None or not _leaves_only(forbidden, sampling.stop_token_ids)):
        forbid(row, sampling.stop_token_ids)


def needs_host(request: Request) -> bool:
    """Its next token depends on more than its logits and a few numbers, or more is asked for than the token."""
    sampling = request.sampling
    return bool(
        request.choices > 1
        or sampling.grammar
        or sampling.logit_bias
        or sampling.top_logprobs > 0
        or sampling.token_ids_logprob
        or sampling.min_tokens > 0
        or _is_penalised(sampling)
    )


def restricts(sampling: SamplingParams) -> bool:
    """It draws from a part of the vocabulary."""
    drawn = sampling.temperature >= _COLDEST
    return drawn and (sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def wants_logprob(sampling: SamplingParams) -> bool:
    """Of the sampled token."""
    return sampling.logprobs


def _is_penalised(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0


def _leaves_only(forbidden: torch.Tensor, stops: tuple[int, ...]) -> bool:
    """What a grammar wants comes before `min_tokens`: where only stop tokens are left, the output is complete."""
    more = forbidden.clone()
    more[torch.tensor([token for token in stops if 0 <= token < len(more)], dtype=torch.int64)] = True
    return bool(more.all())


def _too_short(request: Request) -> bool:
    """Fewer tokens emitted than `min_tokens`, counted from the original prompt's end."""
    return len(request.tokens) - request.prompt_len < request.sampling.min_tokens


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
    device = logits.device
    params = DrawParams(
        temperature=torch.tensor([sampling.temperature for sampling in samplings], device=device),
        top_k=torch.tensor([max(0, sampling.top_k) for sampling in samplings], device=device),
        top_p=torch.tensor([sampling.top_p for sampling in samplings], device=device),
        min_p=torch.tensor([sampling.min_p for sampling in samplings], device=device),
        restricted=torch.tensor(restricted, dtype=torch.int64, device=device),
    )
    rows = logits if len(owners) == logits.shape[0] == len(warm) else logits[torch.tensor(owners, device=device)]
    return [int(token) for token in draw(rows, params, keys).tolist()]
