"""Drawing tokens from logits: penalties, restrictions (top-k, top-p, min-p), Gumbel-max, logprobs.

Order: repetition, frequency and presence penalties, logit bias, masks; then temperature; then top-k, top-p of what
top-k left, min-p; then the draw. Rows never influence each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pd.kernels.philox import DrawKeys, gumbel


@dataclass(frozen=True)
class DrawParams:
    """One value per row, float32[S] (top_k int64[S]). `top_k` 0, `top_p` 1 and `min_p` 0 mean off.

    `restricted` int64[R] are the rows that use any of the three.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    restricted: torch.Tensor


def penalise(
    row: torch.Tensor,
    known: torch.Tensor,
    emitted: torch.Tensor,
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
) -> None:
    """In place on one row's logits float32[V].

    `repetition` acts on every token that occurs in `known` int64[n] (prompt and output, as in transformers and vLLM):
    positive logits are divided by it, negative ones multiplied. `frequency` per occurrence and `presence` once are
    subtracted for the tokens of `emitted` int64[m], the output alone (as OpenAI defines them).
    """
    if repetition != 1.0 and known.numel():
        ids = known.unique()
        values = row[ids]
        row[ids] = torch.where(values > 0, values / repetition, values * repetition)
    if (frequency or presence) and emitted.numel():
        ids, counts = emitted.unique(return_counts=True)
        row[ids] -= frequency * counts + presence


def add_bias(row: torch.Tensor, bias: Mapping[int, float]) -> None:
    """In place: add `bias[id]` to one row's logits; ids outside the vocabulary have no effect."""
    ids = [token for token in bias if 0 <= token < row.shape[0]]
    row[torch.tensor(ids, dtype=torch.int64, device=row.device)] += torch.tensor(
        [bias[token] for token in ids], dtype=row.dtype, device=row.device
    )


def forbid(row: torch.Tensor, tokens: tuple[int, ...]) -> None:
    """In place: these tokens cannot be drawn; ids outside the vocabulary have no effect."""
    ids = [token for token in tokens if 0 <= token < row.shape[0]]
    row[torch.tensor(ids, dtype=torch.int64, device=row.device)] = float("-inf")


def restrict(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """[S, V] -> the same with every token outside top-k, top-p and min-p at -inf. The best token always stays.

    Equal logits rank by token id, so top-k keeps exactly k.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    limit = torch.where(top_k > 0, top_k, vocab)[:, None]
    ordered = ordered.masked_fill(torch.arange(vocab, device=logits.device)[None] >= limit, float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = (before >= top_p[:, None]) & (top_p[:, None] < 1.0)
    outside |= probabilities < min_p[:, None] * probabilities[:, :1]
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, ids, ordered)


def draw(logits: torch.Tensor, params: DrawParams, keys: DrawKeys) -> torch.Tensor:
    """Sample one token per row by Gumbel-max: float32 [S, V] -> int64[S]. Temperatures must be positive."""
    scaled = logits / params.temperature[:, None]
    rows = params.restricted
    if rows.numel():
        scaled[rows] = restrict(scaled[rows], params.top_k[rows], params.top_p[rows], params.min_p[rows])
    return (scaled + gumbel(keys, logits.shape[-1], logits.device)).argmax(-1)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """[S, V] -> int64[S]; among equal logits the smallest id."""
    return logits.argmax(-1)
