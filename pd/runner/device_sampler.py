"""Samples a step's rows on the device, whatever they ask for: what `pd.runner.sampler` does on the host.

A step whose rows only ask for the best token, or for a draw from all, is sampled by its graph. For any other this comes
behind the graph, kernel by kernel, on the logits that the graph leaves: some ten launches, less than half a millisecond
of the host's time, while the device is busy with the layers. Graphs that have these kernels in them would save the
device nothing, and be as many again to capture and to keep. Nothing here waits for the device.

Logprobs are of the logits as the model made them, see `pd.runner.logprobs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from pd.kernels.sampling_device import sample_rows
from pd.kernels.shaping import Penalties, add_bias_rows, apply_penalties, count_tokens, forbid_rows
from pd.kernels.step_rows import gather_sampling, store_last
from pd.runner.device_inputs import bring
from pd.runner.device_state import DeviceState
from pd.runner.drawn import Drawn, Judged
from pd.runner.graphs import Outcome
from pd.runner.inputs import Int32, Request
from pd.runner.logprobs import wants_logprobs
from pd.runner.sampler import restricts
from pd.runner.shaping import shaping_arrays
from pd.types import SamplingParams

#: Draws of further choices that are made at once: each has its own copy of its row's logits.
_DRAWS = 128

Fields = Mapping[str, torch.Tensor]


class DeviceSampler:
    """Leaves the slots' last tokens, and their counts, as the next step needs them."""

    def __init__(self, state: DeviceState) -> None:
        self.state, self._device = state, state.state.last.device

    def sample(self, requests: Sequence[Request], outcome: Outcome, allowed: Mapping[int, Int32]) -> Drawn:
        """The next token of each request, and those of its further choices; `outcome` has a row for each.

        `allowed` as `Grammars.allowed` makes it.
        """
        again = [row for row, request in enumerate(requests) for _ in range(1, request.choices)]
        judged = tuple(row for row, request in enumerate(requests) if _judges(request.sampling))
        shaping = shaping_arrays(requests, allowed)
        arrays = shaping | _again_arrays(requests, again) | _judged_arrays(requests, again, judged)
        fields = bring(arrays, self._device) if arrays else {}
        logits = self._shape(outcome.logits, fields) if shaping else outcome.logits
        tokens, logprobs = self._draw(requests, outcome, logits, fields)
        if not judged:
            return Drawn(tokens, tuple(again), logprobs)
        assert logprobs is not None
        width = max(requests[row].sampling.top_logprobs for row in judged)
        return Drawn(tokens, tuple(again), logprobs, _judge(outcome.logits, judged, width, fields, tokens, logprobs))

    def _shape(self, raw: torch.Tensor, fields: Fields) -> torch.Tensor:
        """float32 and a copy: the raw ones are needed for logprobs, and have too few digits for what is done here."""
        logits = raw.to(torch.float32, copy=True)
        if "slot" in fields:
            rates = [fields[name].view(torch.float32) for name in ("repetition", "frequency", "presence")]
            known = self.state.tokens
            apply_penalties(logits, Penalties(fields["slot"], *rates), known.seen, known.counts)
        if "bias_row" in fields:
            values = fields["bias_value"].view(torch.float32)
            add_bias_rows(logits, fields["bias_row"], fields["bias_token"], values)
        if "mask_row" in fields:
            forbid_rows(logits, fields["mask_row"], fields["mask"])
        return logits

    def _draw(
        self, requests: Sequence[Request], outcome: Outcome, logits: torch.Tensor, fields: Fields
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and logprobs, of the further choices at the end. A request goes on with its first one."""
        sampling = gather_sampling(self.state.state, outcome.slots, outcome.lengths)
        wishes = {
            "restricted": any(restricts(request.sampling) for request in requests),
            "logprobs": any(wants_logprobs(request.sampling) for request in requests),
        }
        raw = outcome.logits if wishes["logprobs"] and logits is not outcome.logits else None
        drawn = [sample_rows(logits, sampling, raw=raw, **wishes)]
        store_last(self.state.state, outcome.slots, drawn[0][0])
        if "slot" in fields:
            count_tokens(self.state.tokens.counts, fields["slot"], drawn[0][0])
        if "again" in fields:
            parts = fields["again"].split(_DRAWS), fields["offset"].split(_DRAWS)
            for rows, offset in zip(*parts, strict=True):
                some = sampling.select(rows)
                other = replace(some, choice=some.choice + offset)
                of_raw = raw.index_select(0, rows) if raw is not None else None
                drawn.append(sample_rows(logits.index_select(0, rows), other, raw=of_raw, **wishes))
        if len(drawn) == 1:
            return drawn[0]
        logprobs = [one for _, one in drawn if one is not None]
        return torch.cat([one for one, _ in drawn]), torch.cat(logprobs) if logprobs else None


def _judges(sampling: SamplingParams) -> bool:
    """Asks for logprobs of other tokens than the sampled one."""
    return sampling.top_logprobs > 0 or len(sampling.token_ids_logprob) > 0


def _again_arrays(requests: Sequence[Request], again: Sequence[int]) -> dict[str, Int32]:
    """`again`, `offset` [A]: rows that draw once more, and by how much their choice is then another."""
    if not again:
        return {}
    offsets = [offset for request in requests for offset in range(1, request.choices)]
    return {"again": np.array(again, dtype=np.int32), "offset": np.array(offsets, dtype=np.int32)}


def _judged_arrays(requests: Sequence[Request], again: Sequence[int], judged: Sequence[int]) -> dict[str, Int32]:
    """`judged` [J]: the rows; `draw`, `draw_place` [n]: their draws and the place in `judged` of each.

    `wanted`, `wanted_place` [m]: token ids whose logprobs they want, and the place of each.
    """
    if not judged:
        return {}
    places = {row: place for place, row in enumerate(judged)}
    rows = itertools.chain(range(len(requests)), again)
    draws = [(draw, places[row]) for draw, row in enumerate(rows) if row in places]
    wanted = [(token, place) for row, place in places.items() for token in requests[row].sampling.token_ids_logprob]
    pairs = {"draw": draws, "wanted": wanted}
    arrays = {"judged": np.array(judged, dtype=np.int32)}
    for name, found in pairs.items():
        arrays[name], arrays[f"{name}_place"] = np.array(found, dtype=np.int32).reshape(-1, 2).T
    return arrays


def _judge(
    raw: torch.Tensor,
    judged: tuple[int, ...],
    width: int,
    fields: Fields,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
) -> Judged:
    """What `_judged_arrays` asks for. The rows' own logprobs are made of the same numbers, so that none differs from
    the same token's among the alternatives.
    """
    said = raw.index_select(0, fields["judged"]).float().log_softmax(-1)
    own = fields["draw"].long()
    logprobs[own] = said[fields["draw_place"].long(), tokens[own].long()]
    best = said.topk(min(width, said.shape[1]), dim=-1)
    ids = fields["wanted"].long()
    inside = (ids >= 0) & (ids < said.shape[1])
    wanted = said[fields["wanted_place"].long(), ids.where(inside, 0)].where(inside, float("nan"))
    return Judged(judged, best.indices.int(), best.values, wanted)
