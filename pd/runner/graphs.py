"""Decode steps as CUDA graphs: one launch for all kernels of a batch, from the rows that the host sends to the tokens.

A batch is filled up to the next captured size. For each size there are two graphs: one that samples greedily or by
temperature, as nearly every step does, and one that ends with the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pd.kernels.attention import DeviceBatch
from pd.kernels.sampling_device import sample_rows
from pd.kernels.step_rows import gather_sampling, prepare_rows, store_last
from pd.models.registry import Model
from pd.runner.device_inputs import Packed, fill_decode, fill_rows, row_fields, view_rows
from pd.runner.device_state import DeviceState
from pd.runner.inputs import Row
from pd.runner.kv_pool import KvPool

#: Batches up to this size are captured for every multiple of four, larger ones for multiples of 16.
_FINE = 32


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes that are captured, ascending; the last one is `largest`."""
    sizes = {1, 2, *range(4, _FINE + 1, 4), *range(_FINE + 16, largest + 1, 16), largest}
    return sorted(size for size in sizes if size <= largest)


@dataclass(frozen=True)
class _Captured:
    """`tokens` int32[size] of a graph that samples; `logits` [size, V] of one that does not."""

    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor | None
    logits: torch.Tensor


class DecodeGraphs:
    """`replay` fills the inputs and launches; what it returns is overwritten by the next replay, in stream order."""

    def __init__(
        self, model: Model, pool: KvPool, state: DeviceState, largest: int, progress: Callable[[int, int], None]
    ) -> None:
        self._model, self._pool, self._state, self._arrivals = model, pool, state.state, state.arrivals
        self._sizes = graph_sizes(largest)
        device = self._state.last.device
        self._layouts = {size: Packed(row_fields(size, size)) for size in self._sizes}
        self._inputs = torch.zeros(self._layouts[largest].words, dtype=torch.int32, device=device)
        self._tables = torch.zeros(largest, state.width, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[int, bool], _Captured] = {}
        self._capture(progress)

    @property
    def largest(self) -> int:
        return self._sizes[-1]

    def replay(self, rows: Sequence[Row], grown: Mapping[int, int], samples: bool) -> _Captured:
        """One step of these rows, of one token each. Its outputs have as many rows as were captured, theirs first."""
        size = next(size for size in self._sizes if size >= len(rows))
        memory = torch.empty(self._layouts[size].words, dtype=torch.int32, pin_memory=True)
        host = {name: field.numpy() for name, field in self._layouts[size].of(memory).items()}
        fill_rows(host, rows, grown, self._state.scratch)
        fill_decode(host, rows)
        host["tokens"][len(rows) :] = 0
        host["positions"][len(rows) :] = 0
        self._inputs[: len(memory)].copy_(memory, non_blocking=True)
        captured = self._graphs[size, samples]
        captured.graph.replay()
        return captured

    def _capture(self, progress: Callable[[int, int], None]) -> None:
        """Largest first: the smaller ones live in the memory that it needed."""
        memory: Any = None
        kinds = [(size, samples) for size in reversed(self._sizes) for samples in (True, False)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for done, (size, samples) in enumerate(kinds):
                if samples:
                    self._run(size, samples)  # compiles what is not compiled yet
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                    tokens, logits = self._run(size, samples)
                memory = memory or graph.pool()
                self._graphs[size, samples] = _Captured(graph, tokens, logits)
                progress(done + 1, len(kinds))
        torch.cuda.current_stream().wait_stream(stream)

    def _run(self, size: int, samples: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        fields = self._layouts[size].of(self._inputs)
        rows = view_rows(fields, self._tables[:size], size)
        prepare_rows(self._state, rows, self._pool.shape.tokens)
        batch = DeviceBatch(
            positions=rows.positions,
            blocks=rows.blocks,
            offsets=rows.offsets,
            tables=rows.tables,
            lengths=rows.lengths,
            decode=size,
            prompts=(),
            arrivals=self._arrivals,
        )
        hidden = self._model.forward(rows.tokens, batch, self._pool.layers)
        logits = self._model.logits(hidden)
        if not samples:
            return None, logits
        sampling = gather_sampling(self._state, rows.slots, rows.lengths)
        tokens, _ = sample_rows(logits, sampling, restricted=False, logprobs=False)
        store_last(self._state, rows.slots, tokens)
        return tokens, logits
