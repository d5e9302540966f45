"""A step's arrays for the device: packed on the host, brought there by one copy, seen as the tensors that ops take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pd.kernels.attention import DeviceBatch, PromptRow
from pd.kernels.attention_plan import prompt_tiles
from pd.kernels.step_rows import StepRows
from pd.runner.inputs import Int32, Row

#: Token of a decode row that only the device knows yet.
UNKNOWN = -1

#: Fields begin at multiples of so many words, for wide accesses.
_ALIGN = 32


class Packed:
    """int32 fields of given lengths, one after the other in one buffer."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self._places: dict[str, slice] = {}
        self.words = 0
        for name, length in lengths.items():
            self._places[name] = slice(self.words, self.words + length)
            self.words += -(-length // _ALIGN) * _ALIGN

    def of(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: buffer[place] for name, place in self._places.items()}

    def on_host(self, pinned: bool = True) -> tuple[torch.Tensor, dict[str, Int32]]:
        """A buffer to be filled, and its fields. With `pinned` it may be reused as soon as its copy has left it."""
        memory = torch.empty(self.words, dtype=torch.int32, pin_memory=pinned)
        words = memory.numpy()  # whose slices cost a tenth of a tensor's
        return memory, {name: words[place] for name, place in self._places.items()}


def bring(arrays: Mapping[str, Int32], device: torch.device) -> dict[str, torch.Tensor]:
    """Each on the device in its shape, by one copy in the current stream's order that nobody waits for."""
    packed = Packed({name: array.size for name, array in arrays.items()})
    memory, host = packed.on_host(device.type == "cuda")
    for name, array in arrays.items():
        host[name][:] = array.reshape(-1)
    fields = packed.of(memory.to(device, non_blocking=True))
    return {name: fields[name].view(array.shape) for name, array in arrays.items()}


@dataclass(frozen=True)
class StepArrays:
    """Views of one device buffer: the rows, and which of their tokens are sampled for which slots."""

    rows: StepRows
    sample_rows: torch.Tensor  # int32[S]: places in the flat batch
    sample_slots: torch.Tensor
    sample_lengths: torch.Tensor
    starts: torch.Tensor | None
    tiles: torch.Tensor | None
    prompts: tuple[PromptRow, ...]

    def batch(self, arrivals: torch.Tensor, by_torch: bool) -> DeviceBatch:
        """What attention takes; see there."""
        return replace(row_batch(self.rows, arrivals, self.starts, self.tiles), prompts=self.prompts, by_torch=by_torch)


def row_batch(
    rows: StepRows,
    arrivals: torch.Tensor,
    starts: torch.Tensor | None = None,
    tiles: torch.Tensor | None = None,
    whole: bool = False,
) -> DeviceBatch:
    return DeviceBatch(
        positions=rows.positions,
        blocks=rows.blocks,
        offsets=rows.offsets,
        tables=rows.tables,
        lengths=rows.lengths,
        decode=rows.decode,
        starts=starts,
        tiles=tiles,
        arrivals=arrivals,
        whole=whole,
    )


def row_fields(rows: int, tokens: int) -> dict[str, int]:
    """Lengths of the fields of `StepRows`."""
    return dict.fromkeys(("slots", "lengths", "grown"), rows) | dict.fromkeys(
        ("tokens", "positions", "blocks", "offsets"), tokens
    )


def sample_fields(samples: int, prompts: int, tiles: int) -> dict[str, int]:
    """Lengths of the fields that say what is sampled, and of those that describe prompts; `tiles` in words."""
    names = ("sample_rows", "sample_slots", "sample_lengths")
    return dict.fromkeys(names, samples) | {"starts": prompts + 1, "tiles": tiles}


def view_rows(fields: Mapping[str, torch.Tensor], tables: torch.Tensor, decode: int) -> StepRows:
    names = ("slots", "lengths", "grown", "tokens", "positions", "blocks", "offsets")
    return StepRows(**{name: fields[name] for name in names}, tables=tables, decode=decode)


def fill_rows(host: Mapping[str, Int32], rows: Sequence[Row], grown: Mapping[int, int], scratch: int) -> None:
    """The rows' own fields; places beyond them fill up a captured batch. `grown`: row -> its new block."""
    count = len(rows)
    host["slots"][:count] = [row.request.slot for row in rows]
    host["slots"][count:] = scratch
    host["lengths"][:count] = [row.end for row in rows]
    host["lengths"][count:] = 0
    host["grown"][:] = -1
    for index, block in grown.items():
        host["grown"][index] = block


def fill_decode(host: Mapping[str, Int32], rows: Sequence[Row]) -> None:
    """The first rows' tokens and positions; what follows, until it is filled, is harmless."""
    count = len(rows)
    host["tokens"][:count] = [row.request.tokens.at(row.first) for row in rows]
    host["tokens"][count:] = 0
    host["positions"][:count] = [row.first for row in rows]
    host["positions"][count:] = 0


def fill_prompts(host: Mapping[str, Int32], rows: Sequence[Row], page_size: int) -> None:
    """Tokens and slots of prompt rows; tokens that fill up a captured step go to the scratch block."""
    if rows:
        end = rows[-1].start + rows[-1].count
        for name in ("tokens", "positions", "blocks", "offsets"):
            host[name][end:] = 0
    for row in rows:
        part = slice(row.start, row.start + row.count)
        positions = np.arange(row.first, row.end, dtype=np.int32)
        table = row.request.blocks.view
        known = min(row.count, max(0, len(table) * page_size - row.first))  # tokens that have a block
        blocks = host["blocks"][part]
        host["tokens"][part] = row.request.tokens.view[row.first : row.end]
        host["positions"][part] = positions
        blocks[:known] = table[positions[:known] // page_size]
        blocks[known:] = 0
        np.remainder(positions, page_size, out=host["offsets"][part])


def fill_samples(host: Mapping[str, Int32], rows: Sequence[Row], scratch: int) -> None:
    """`rows` sample, each at its last token; samples beyond them are nobody's."""
    count = len(rows)
    host["sample_rows"][:count] = [row.start + row.count - 1 for row in rows]
    host["sample_rows"][count:] = 0
    host["sample_slots"][:count] = [row.request.slot for row in rows]
    host["sample_slots"][count:] = scratch
    host["sample_lengths"][:count] = [row.end for row in rows]
    host["sample_lengths"][count:] = 0


def fill_tiles(host: Mapping[str, Int32], prompts: Sequence[PromptRow], tiles: Int32, tokens: int) -> None:
    """Prompts and tiles beyond them are empty: they begin at the end of `tokens`."""
    host["starts"][: len(prompts)] = [prompt.start for prompt in prompts]
    host["starts"][len(prompts) :] = tokens
    places = host["tiles"].reshape(-1, 2)
    places[: len(tiles)] = tiles
    places[len(tiles) :] = (0, tokens)


class InputBuilder:
    """Packs steps that are not captured."""

    def __init__(self, page_size: int, group: int, scratch: int, device: torch.device) -> None:
        """`group` query heads share a kv head."""
        self._page, self._group, self._scratch, self._device = page_size, group, scratch, device

    def build(self, rows: Sequence[Row], decode: int, grown: Mapping[int, int]) -> StepArrays:
        """`rows`: the first `decode` of one token each, in the order's order."""
        tokens = rows[-1].start + rows[-1].count
        prompts = tuple(PromptRow(row.start, row.count, row.end) for row in rows[decode:])
        tiles = prompt_tiles(prompts, self._group)
        wanted = [row for row in rows if row.sample]
        packed = Packed(row_fields(len(rows), tokens) | sample_fields(len(wanted), len(prompts), tiles.size))
        memory, host = packed.on_host(self._device.type == "cuda")
        fill_rows(host, rows, grown, self._scratch)
        fill_decode(host, rows[:decode])
        fill_prompts(host, rows[decode:], self._page)
        fill_samples(host, wanted, self._scratch)
        fill_tiles(host, prompts, tiles, tokens)
        fields = packed.of(memory.to(self._device, non_blocking=True))
        width = -(-max(row.end for row in rows) // self._page)
        tables = torch.empty(len(rows), width, dtype=torch.int32, device=self._device)
        return StepArrays(
            view_rows(fields, tables, decode),
            fields["sample_rows"],
            fields["sample_slots"],
            fields["sample_lengths"],
            fields["starts"] if prompts else None,
            fields["tiles"].view(tiles.shape) if prompts else None,
            prompts,
        )
