"""Sampling where the logits are, without a host synchronisation: what a captured decode step calls.

Tokens are those of `pd.kernels.sampling` up to ties of float32 scores: the two compute a score up to two units in the
last place apart, so where a row's best scores are within about 1e-6 of each other either may win.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from pd.kernels import sampling as reference
from pd.kernels.philox import DrawKeys

#: A temperature below this is greedy: dividing by it would leave one token anyway, or overflow.
COLDEST = 1e-5


@dataclass(frozen=True)
class DeviceSampling:
    """One row per row of logits, all contiguous and on their device."""

    temperature: torch.Tensor  # float32[S]; below COLDEST is greedy
    top_k: torch.Tensor  # int32[S], 0 is off
    top_p: torch.Tensor  # float32[S], 1 is off
    min_p: torch.Tensor  # float32[S], 0 is off
    seed: torch.Tensor  # int64[S]: the bits of a uint64
    choice: torch.Tensor  # int32[S]
    position: torch.Tensor  # int32[S] of the token to be sampled

    def select(self, rows: torch.Tensor) -> DeviceSampling:
        """These rows, int32[n]."""
        return DeviceSampling(*(getattr(self, field.name).index_select(0, rows) for field in fields(self)))


def sample_rows(
    logits: torch.Tensor,
    sampling: DeviceSampling,
    *,
    restricted: bool,
    logprobs: bool,
    raw: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits [S, V] in bfloat16, float16 or float32 -> tokens int32[S] and, with `logprobs`, theirs as float32[S].

    Without `restricted` the caller promises that no row uses top-k, top-p or min-p, and they are not looked at.
    Logprobs are of `raw` [S, V], the logits before penalties, bias and masks, where it is given.
    """
    if raw is not None and raw.shape != logits.shape:
        raise ValueError(f"raw logits {tuple(raw.shape)} are not shaped as the logits, {tuple(logits.shape)}")
    if not logits.is_cuda:
        return _sample_rows(logits, sampling, restricted, logits if raw is None else raw, logprobs)
    if logits.stride(1) != 1 or (raw is not None and raw.stride(1) != 1):
        raise ValueError("a row's logits must be contiguous")
    from pd.kernels import sampling_triton

    return sampling_triton.sample_rows(logits, sampling, restricted, raw, logprobs)


def _sample_rows(
    logits: torch.Tensor, sampling: DeviceSampling, restricted: bool, raw: torch.Tensor, logprobs: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In torch. Greedy rows go through the draw, too, and what it finds for them is not taken."""
    logits = logits.float()
    greedy = sampling.temperature < COLDEST
    limits = (sampling.top_k > 0) | (sampling.top_p < 1.0) | (sampling.min_p > 0.0)
    params = reference.DrawParams(
        temperature=sampling.temperature.masked_fill(greedy, 1.0),
        top_k=sampling.top_k.long(),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        restricted=(limits & ~greedy).nonzero()[:, 0] if restricted else torch.arange(0, device=logits.device),
    )
    keys = DrawKeys(*(tuple(one.tolist()) for one in (sampling.seed, sampling.choice, sampling.position)))
    tokens = torch.where(greedy, reference.greedy(logits), reference.draw(logits, params, keys))
    chosen = raw.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0] if logprobs else None
    return tokens.int(), chosen
