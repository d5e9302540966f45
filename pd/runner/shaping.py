"""What is done to a step's logits before they are sampled, as the arrays that the device takes it in.

Everything here is known before the step's own tokens are: only the counts that penalties need change with the token of
the step before, and those are kept where it is drawn. `min_tokens` is a bias of -inf for as long as a request has too
few, which the host knows without knowing which they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pd.runner.inputs import Int32, Request
from pd.runner.logprobs import wants_logprobs
from pd.runner.sampler import is_penalised, restricts
from pd.types import SamplingParams

Float32 = npt.NDArray[np.float32]

_NEVER = 1 << 62


@dataclass(frozen=True)
class Bias:
    """Added to the logits of these tokens int32[n], each of which is there once: values float32[n]."""

    tokens: Int32
    values: Float32

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Bias:
        return cls(np.array(list(values), dtype=np.int32), np.array(list(values.values()), dtype=np.float32))


@dataclass(frozen=True)
class Biases:
    """`early` while the request may not end yet, `later` after that."""

    early: Bias
    later: Bias

    @classmethod
    def of(cls, request: Request) -> Biases:
        sampling = request.sampling
        later = Bias.of(sampling.logit_bias)
        if not sampling.min_tokens:
            return cls(later, later)
        return cls(Bias.of({**sampling.logit_bias, **dict.fromkeys(sampling.stop_token_ids, -np.inf)}), later)


def plain_from(sampling: SamplingParams, prompt_len: int) -> int:
    """How many tokens a request has when its next one is just the best, or drawn from all; _NEVER if it never is."""
    if (
        restricts(sampling)
        or wants_logprobs(sampling)
        or sampling.grammar
        or sampling.logit_bias
        or is_penalised(sampling)
    ):
        return _NEVER
    return prompt_len + sampling.min_tokens if sampling.stop_token_ids else 0


def asks_more(request: Request) -> bool:
    """More than a token that is the best, or drawn from all. Of a request that a device has admitted."""
    return request.choices > 1 or len(request.tokens) < request.plain_from


def shaping_arrays(requests: Sequence[Request], allowed: Mapping[int, Int32]) -> dict[str, Int32]:
    """Arrays by name, those of each kind only if a request asks for it; `allowed` as `Grammars.allowed` makes it.

    `slot` (-1: no penalties), `repetition`, `frequency`, `presence`: [S], the last three bits of float32. `bias_row`,
    `bias_token`, `bias_value` (bits of float32): [n], no row and token twice. `mask_row` [m] and `mask` [m, words].
    """
    arrays: dict[str, Int32] = {}
    if any(is_penalised(request.sampling) for request in requests):
        arrays |= _penalties(requests)
    biased = list(_biased(requests, allowed))
    if biased:
        arrays["bias_row"] = np.concatenate([np.full(len(bias.tokens), row, dtype=np.int32) for row, bias in biased])
        arrays["bias_token"] = np.concatenate([bias.tokens for _, bias in biased])
        arrays["bias_value"] = np.concatenate([bias.values for _, bias in biased]).view(np.int32)
    if allowed:
        arrays["mask_row"] = np.array(list(allowed), dtype=np.int32)
        arrays["mask"] = np.stack(list(allowed.values()))
    return arrays


def _penalties(requests: Sequence[Request]) -> dict[str, Int32]:
    slots = [request.slot if is_penalised(request.sampling) else -1 for request in requests]
    rates = [
        (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        for sampling in (request.sampling for request in requests)
    ]
    columns = np.array(rates, dtype=np.float32).T.copy().view(np.int32)
    names = ("repetition", "frequency", "presence")
    return {"slot": np.array(slots, dtype=np.int32)} | dict(zip(names, columns, strict=True))


def _biased(requests: Sequence[Request], allowed: Mapping[int, Int32]) -> Iterator[tuple[int, Bias]]:
    """(row, its bias) of the rows that have one. Masks regard `min_tokens` by themselves."""
    for row, request in enumerate(requests):
        early = request.too_short and row not in allowed
        if request.sampling.logit_bias or (early and request.sampling.stop_token_ids):
            if request.biases is None:
                request.biases = Biases.of(request)
            yield row, request.biases.early if early else request.biases.later
