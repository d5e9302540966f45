"""Steps as CUDA graphs: one launch for all kernels, from the rows that the host sends to the sampled tokens.

A decode batch is filled up to the next captured number of rows, a step of short prompts to the next captured number of
tokens; one such prompt without a prefix has graphs of its own, with cuDNN's attention. All exist because a launch takes
the host 10 to 40 us: without graphs, more than the device needs for a layer of a decode step or of a few hundred prompt
tokens. Every graph samples greedily or by temperature, as most steps do; others take its logits and sample once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pd.kernels.attention import PromptRow
from pd.kernels.attention_plan import prompt_tiles, tile_tokens
from pd.kernels.sampling_device import sample_rows
from pd.kernels.step_rows import StepRows, gather_sampling, prepare_rows, store_last
from pd.models.registry import Model
from pd.runner.device_inputs import (
    Packed,
    fill_decode,
    fill_prompts,
    fill_rows,
    fill_samples,
    fill_tiles,
    row_batch,
    row_fields,
    sample_fields,
    view_rows,
)
from pd.runner.device_state import DeviceState
from pd.runner.inputs import Row
from pd.runner.kv_pool import KvPool

#: Decode batches up to this size are captured for every multiple of four, larger ones for multiples of 16.
_FINE = 32

#: Tokens of prompt steps that are captured: where the host would need longer than the device.
PROMPT_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)

#: Tokens of steps of one prompt without a prefix.
FRESH_SIZES = tuple(tokens for tokens in PROMPT_TOKENS if tokens >= 128)

#: Prompts in a step of prompts.
PROMPT_ROWS = 16


def graph_sizes(largest: int) -> list[int]:
    """Decode batches that are captured, ascending; the last one is `largest`."""
    sizes = {1, 2, *range(4, _FINE + 1, 4), *range(_FINE + 16, largest + 1, 16), largest}
    return sorted(size for size in sizes if size <= largest)


@dataclass(frozen=True)
class Outcome:
    """What a step's kernels leave for those of its rows that sample, before anything but the device knows it.

    `logits` [S, V]; `slots`, `lengths` int32[S] as `gather_sampling` takes them; `tokens` int32[S] of a graph, which
    has sampled and stored them as if no row asked for more than a temperature; `hidden` [T, H] of all tokens.
    """

    logits: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    tokens: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class _Captured:
    layout: Packed
    graph: torch.cuda.CUDAGraph
    outcome: Outcome


class StepGraphs:
    """What a replay returns is overwritten by the next one, in stream order."""

    def __init__(
        self,
        model: Model,
        pool: KvPool,
        state: DeviceState,
        *,
        batch: int,
        group: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Decode up to `batch` rows. `group` query heads share a kv head. Call it in inference mode."""
        self._model, self._pool, self._state = model, pool, state
        self._group, self._page = group, pool.shape.tokens
        self._decode_sizes, self._prompt_sizes = graph_sizes(batch), PROMPT_TOKENS
        layouts = {("decode", size): Packed(row_fields(size, size)) for size in self._decode_sizes}
        layouts |= {("prompts", size): Packed(self._prompt_fields(size)) for size in self._prompt_sizes}
        layouts |= {("fresh", size): Packed(self._prompt_fields(size)) for size in FRESH_SIZES}
        device = state.state.last.device
        words = max(layout.words for layout in layouts.values())
        self._inputs = torch.zeros(words, dtype=torch.int32, device=device)
        rows = max(batch, PROMPT_ROWS)
        self._tables = torch.zeros(rows, state.width, dtype=torch.int32, device=device)
        self._runs: dict[str, Callable[[int, Packed], Outcome]] = {
            "decode": self._decode,
            "prompts": self._prompt,
            "fresh": partial(self._prompt, whole=True),
        }
        self._graphs: dict[tuple[str, int], _Captured] = {}
        self._capture(layouts, progress)

    # --- replays ---

    def decode(self, rows: Sequence[Row], grown: Mapping[int, int]) -> Outcome | None:
        """A step of rows of one token each; None where no captured batch is large enough."""
        captured = self._find("decode", self._decode_sizes, len(rows))
        if captured is None:
            return None
        memory, host = captured.layout.on_host()
        fill_rows(host, rows, grown, self._state.state.scratch)
        fill_decode(host, rows)
        return self._replay(captured, memory, len(rows))

    def prompts(self, rows: Sequence[Row]) -> Outcome | None:
        """A step of prompts alone; None where it is not captured."""
        tokens = rows[-1].start + rows[-1].count
        if len(rows) == 1 and rows[0].first == 0 and tokens >= FRESH_SIZES[0]:
            captured = self._find("fresh", FRESH_SIZES, tokens)
        else:
            captured = self._find("prompts", self._prompt_sizes, tokens)
        if captured is None or len(rows) > PROMPT_ROWS:
            return None
        memory, host = captured.layout.on_host()
        fill_rows(host, rows, {}, self._state.state.scratch)
        fill_prompts(host, rows, self._page)
        prompts = tuple(PromptRow(row.start, row.count, row.end) for row in rows)
        fill_tiles(host, prompts, prompt_tiles(prompts, self._group), tokens)
        wanted = [row for row in rows if row.sample]
        fill_samples(host, wanted, self._state.state.scratch)
        return self._replay(captured, memory, len(wanted))

    def _find(self, kind: str, sizes: Iterable[int], needed: int) -> _Captured | None:
        size = next((size for size in sizes if size >= needed), None)
        return self._graphs[kind, size] if size is not None else None

    def _replay(self, captured: _Captured, memory: torch.Tensor, samples: int) -> Outcome:
        self._inputs[: len(memory)].copy_(memory, non_blocking=True)
        captured.graph.replay()
        whole = captured.outcome
        assert whole.tokens is not None
        return Outcome(
            whole.logits[:samples], whole.slots[:samples], whole.lengths[:samples], whole.tokens[:samples], whole.hidden
        )

    # --- capture ---

    def _prompt_fields(self, tokens: int) -> dict[str, int]:
        tiles = -(-tokens // tile_tokens(self._group)) + PROMPT_ROWS
        return row_fields(PROMPT_ROWS, tokens) | sample_fields(PROMPT_ROWS, PROMPT_ROWS, 2 * tiles)

    def _capture(self, layouts: Mapping[tuple[str, int], Packed], progress: Callable[[int, int], None]) -> None:
        """Largest first: the smaller ones live in the memory that it needed."""
        memory: Any = None
        order = sorted(layouts, key=lambda kind: layouts[kind].words, reverse=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for done, kind in enumerate(order):
                run = self._runs[kind[0]]
                run(kind[1], layouts[kind])  # compiles what is not compiled yet
                graph = torch.cuda.CUDAGraph()
                # Other threads, which move blocks, may go on.
                with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                    outcome = run(kind[1], layouts[kind])
                memory = memory or graph.pool()
                self._graphs[kind] = _Captured(layouts[kind], graph, outcome)
                progress(done + 1, len(order))
        torch.cuda.current_stream().wait_stream(stream)

    def _decode(self, size: int, layout: Packed) -> Outcome:
        rows = view_rows(layout.of(self._inputs), self._tables[:size], size)
        hidden = self._forward(rows)
        return self._sample(self._model.logits(hidden), rows.slots, rows.lengths)

    def _prompt(self, tokens: int, layout: Packed, whole: bool = False) -> Outcome:
        fields = layout.of(self._inputs)
        rows = view_rows(fields, self._tables[:PROMPT_ROWS], 0)
        hidden = self._forward(rows, fields["starts"], fields["tiles"].view(-1, 2), whole)
        logits = self._model.logits(hidden.index_select(0, fields["sample_rows"]))
        return self._sample(logits, fields["sample_slots"], fields["sample_lengths"], hidden)

    def _forward(
        self,
        rows: StepRows,
        starts: torch.Tensor | None = None,
        tiles: torch.Tensor | None = None,
        whole: bool = False,
    ) -> torch.Tensor:
        prepare_rows(self._state.state, rows, self._page)
        batch = row_batch(rows, self._state.arrivals, starts, tiles, whole)
        return self._model.forward(rows.tokens, batch, self._pool.layers)

    def _sample(
        self, logits: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> Outcome:
        sampling = gather_sampling(self._state.state, slots, lengths)
        tokens, _ = sample_rows(logits, sampling, restricted=False, logprobs=False)
        store_last(self._state.state, slots, tokens)
        return Outcome(logits, slots, lengths, tokens, hidden)
