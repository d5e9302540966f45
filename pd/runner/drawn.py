"""What a step's rows have drawn, on its way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pd.messages import TokenLogprobs, TopLogprobs
from pd.runner.logprobs import wants_logprobs
from pd.runner.sampler import Sampled
from pd.types import SamplingParams


@dataclass(frozen=True)
class Judged:
    """Logprobs of other tokens than the sampled ones, for J of the rows.

    `top_ids`, `top_logprobs` [J, width] are the best ones of each. `wanted` float32[n] are of the ids that the rows ask
    for, one row's after the other's.
    """

    rows: tuple[int, ...]
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    wanted: torch.Tensor

    def to_host(self) -> Judged:
        return Judged(self.rows, to_host(self.top_ids), to_host(self.top_logprobs), to_host(self.wanted))

    def by_row(self, samplings: Sequence[SamplingParams]) -> dict[int, tuple[TopLogprobs | None, bytes]]:
        """Of a complete copy on the host."""
        ids, logprobs, wanted = self.top_ids.numpy(), self.top_logprobs.numpy(), self.wanted.numpy()
        found, start = {}, 0
        for place, row in enumerate(self.rows):
            width = min(samplings[row].top_logprobs, ids.shape[1])
            tops = TopLogprobs(width, ids[place, :width].tobytes(), logprobs[place, :width].tobytes())
            end = start + len(samplings[row].token_ids_logprob)
            found[row] = tops if width > 0 else None, wanted[start:end].tobytes()
            start = end
        return found


@dataclass(frozen=True)
class Drawn:
    """`tokens` int32[S + A]: one of each row, then further ones of the rows `again`; `logprobs` float32[S + A] of them
    where a row wants some.
    """

    tokens: torch.Tensor
    again: tuple[int, ...] = ()
    logprobs: torch.Tensor | None = None
    judged: Judged | None = None

    def to_host(self) -> Drawn:
        """A copy that is complete when all that the device has been given until now is done."""
        logprobs = to_host(self.logprobs) if self.logprobs is not None else None
        judged = self.judged.to_host() if self.judged is not None else None
        return Drawn(to_host(self.tokens), self.again, logprobs, judged)

    def results(self, samplings: Sequence[SamplingParams]) -> list[Sampled]:
        """Of a complete copy on the host. `samplings` are the rows' own."""
        tokens: list[list[int]] = self._by_row(self.tokens, len(samplings))
        if self.logprobs is None:
            return [Sampled(some, None) for some in tokens]
        chosen: list[list[float]] = self._by_row(self.logprobs, len(samplings))
        others = self.judged.by_row(samplings) if self.judged is not None else {}
        return [
            Sampled(some, _said(said, *others.get(row, (None, b""))) if wants_logprobs(sampling) else None)
            for row, (some, said, sampling) in enumerate(zip(tokens, chosen, samplings, strict=True))
        ]

    def _by_row(self, values: torch.Tensor, rows: int) -> list[list[Any]]:
        listed = values.tolist()
        found = [[value] for value in listed[:rows]]
        for row, value in zip(self.again, listed[rows:], strict=True):
            found[row].append(value)
        return found


def to_host(values: torch.Tensor) -> torch.Tensor:
    """On its way: complete when all that the device has been given until now is done."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=True)


def _said(chosen: Sequence[float], tops: TopLogprobs | None, wanted: bytes) -> TokenLogprobs:
    """All choices of a row are drawn at one position, so they have its alternatives in common."""
    count = len(chosen)
    if tops is not None:
        tops = TopLogprobs(tops.width, tops.ids_i32 * count, tops.logprobs_f32 * count)
    return TokenLogprobs(np.array(chosen, dtype=np.float32).tobytes(), tops, wanted * count)
