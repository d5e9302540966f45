"""Logprobs as messages carry them.

Always log_softmax of the raw float32 logits: before penalties, bias, temperature and restrictions, so that they say
what the model thinks, not how it was sampled.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from pd.messages import PromptLogprobs, TokenLogprobs, TopLogprobs
from pd.models.registry import Model
from pd.runner.inputs import Row
from pd.types import SamplingParams

#: Most logits that prompt logprobs materialise at once (64 MiB of float32).
_LOGITS_PER_TILE = 16 << 20


def wants_logprobs(sampling: SamplingParams) -> bool:
    return sampling.logprobs or sampling.top_logprobs > 0 or len(sampling.token_ids_logprob) > 0


def token_logprobs(logprobs: torch.Tensor, tokens: list[int], sampling: SamplingParams) -> TokenLogprobs:
    """Of `tokens` (several for several choices), all drawn at the one position that `logprobs` float32[V] is of.

    On the CPU, like those.
    """
    count = len(tokens)
    return TokenLogprobs(
        chosen_f32=logprobs[torch.tensor(tokens)].numpy().tobytes(),
        tops=_tops(logprobs.expand(count, -1), sampling.top_logprobs),
        wanted_f32=_wanted(logprobs.expand(count, -1), sampling.token_ids_logprob),
    )


def prompt_logprobs(model: Model, hidden: torch.Tensor, row: Row, vocab: int) -> PromptLogprobs | None:
    """What this row says of its request's prompt: token p is judged by the position before it.

    hidden [count, H] of the row's positions. None when no wanted prompt token follows one of them. Position 0 is
    judged by nothing: NaN, with its alternatives' ids 0; it comes with the row that computes it.
    """
    request = row.request
    start = max(request.logprob_start, 0 if row.first == 0 else row.first + 1)
    end = min(row.end, request.prompt_len - 1) + 1
    if request.logprob_start < 0 or start >= end:
        return None
    sampling, width = request.sampling, max(0, min(request.prompt_top_logprobs, vocab))
    chosen, ids, tops, wanted = [], [], [], []
    begin = max(start, 1)
    if start == 0:
        chosen.append(np.full(1, math.nan, np.float32))
        ids.append(np.zeros((1, width), np.int32))
        tops.append(np.full((1, width), math.nan, np.float32))
        wanted.append(np.full((1, len(sampling.token_ids_logprob)), math.nan, np.float32).tobytes())
    tile = max(1, _LOGITS_PER_TILE // vocab)
    for low in range(begin, end, tile):
        high = min(low + tile, end)
        logprobs = model.logits(hidden[low - 1 - row.first : high - 1 - row.first]).float().log_softmax(-1)
        tokens = torch.from_numpy(request.tokens.view[low:high].astype(np.int64)).to(logprobs.device)
        chosen.append(logprobs.gather(1, tokens[:, None])[:, 0].cpu().numpy())
        top = logprobs.topk(width, dim=-1)
        ids.append(top.indices.to(torch.int32).cpu().numpy())
        tops.append(top.values.cpu().numpy())
        wanted.append(_wanted(logprobs, sampling.token_ids_logprob))
    return PromptLogprobs(
        start=start,
        logprobs_f32=np.concatenate(chosen).tobytes(),
        tops=TopLogprobs(width, np.concatenate(ids).tobytes(), np.concatenate(tops).tobytes()) if width else None,
        wanted_f32=b"".join(wanted),
    )


def _tops(logprobs: torch.Tensor, width: int) -> TopLogprobs | None:
    """logprobs [n, V] -> the best `width` of each row, best first."""
    width = min(width, logprobs.shape[-1])
    if width <= 0:
        return None
    top = logprobs.topk(width, dim=-1)
    return TopLogprobs(width, top.indices.to(torch.int32).numpy().tobytes(), top.values.numpy().tobytes())


def _wanted(logprobs: torch.Tensor, ids: tuple[int, ...]) -> bytes:
    """logprobs [n, V] of these ids; NaN for an id outside the vocabulary."""
    if not ids:
        return b""
    vocab = logprobs.shape[-1]
    values = logprobs[:, torch.tensor([token if 0 <= token < vocab else 0 for token in ids], device=logprobs.device)]
    outside = torch.tensor([not 0 <= token < vocab for token in ids])
    return values.cpu().masked_fill(outside, math.nan).numpy().tobytes()
