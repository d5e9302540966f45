"""How the work of attention on a GPU is divided: what is decided on the host, from shapes and host integers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pd.kernels.attention import PromptRow

#: Queries x heads of a group in a tile of prompt attention: what the two warp groups of a program on a Hopper multiply.
TILE_ROWS = 128

#: Lengths of prompts without a prefix that cuDNN attends to. It plans anew for each length and thread (some 0.4 s), so
#: prompts a little shorter are padded; others are left to the paged kernel, as are those too short to gain.
FRESH_LENGTHS = (1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384)

#: Prompts of one length side by side go to cuDNN together, up to so many tokens: alone a short one leaves most of the
#: GPU without work. As each number is planned by itself, there are 1, 2, 4, … of them.
FRESH_TOKENS = 8192

#: Least share of a length that a prompt fills: cost grows with the square, and cuDNN is not twice as fast.
FRESH_SHARE = 0.85


class Split(NamedTuple):
    """A context is divided into at most `parts`, of at least `least` tokens each."""

    parts: int
    least: int


#: (rows x kv heads for each multiprocessor, up to which the split applies; the split). A multiprocessor holds about
#: five programs at once, and nearly four with enough to read saturate memory. So rows of some 1,000 tokens make about
#: four programs each, and longer ones more, so that one of them does not run on alone when the others are done.
SPLITS = (
    (0.07, Split(64, 64)),
    (0.13, Split(32, 64)),
    (0.25, Split(24, 64)),
    (0.5, Split(16, 128)),
    (1.0, Split(16, 256)),
    (2.0, Split(8, 512)),
    (4.0, Split(8, 1024)),
    (float("inf"), Split(8, 2048)),
)


def decode_split(rows: int, kv_heads: int, processors: int) -> Split:
    """By what is known when a graph is captured: lengths are not, so each program finds its own share."""
    each = rows * kv_heads / processors
    return next(split for most, split in SPLITS if each <= most)


def prompt_split(tiles: int, kv_heads: int, processors: int) -> Split:
    """Few tiles behind a long prefix leave processors without work unless its keys are divided too."""
    return Split(max(1, min(16, 2 * processors // (tiles * kv_heads))), 512)


def fresh_length(prompt: PromptRow) -> int:
    """The length in which cuDNN attends to this prompt; 0 if it does not."""
    if prompt.count != prompt.context:
        return 0
    length = next((length for length in FRESH_LENGTHS if length >= prompt.count), 0)
    return length if prompt.count >= length * FRESH_SHARE else 0


def fresh_counts(length: int) -> list[int]:
    """How many prompts of that length cuDNN attends to at once: each of 1, 2, 4, … that is planned, ascending."""
    counts = [1]
    while 2 * counts[-1] * length <= FRESH_TOKENS:
        counts.append(2 * counts[-1])
    return counts


def fresh_runs(prompts: Sequence[PromptRow]) -> list[tuple[PromptRow, ...]]:
    """`prompts`, all of a fresh length, divided into those that cuDNN attends to at once: neighbours in the batch."""
    runs: list[tuple[PromptRow, ...]] = []
    begin = 0
    while begin < len(prompts):
        length, end = fresh_length(prompts[begin]), begin + 1
        while end < len(prompts) and fresh_length(prompts[end]) == length and _follows(prompts[end - 1], prompts[end]):
            end += 1
        count = max(count for count in fresh_counts(length) if count <= end - begin)
        runs.append(tuple(prompts[begin : begin + count]))
        begin += count
    return runs


def _follows(one: PromptRow, other: PromptRow) -> bool:
    return one.start + one.count == other.start


def tile_tokens(group: int) -> int:
    """Tokens of a prompt in one tile, where `group` query heads share a kv head."""
    return max(1, TILE_ROWS // group)


def prompt_tiles(prompts: Sequence[PromptRow], group: int) -> npt.NDArray[np.int32]:
    """int32[n, 2], (index of a prompt, its first token in the tile): all prompts in tiles of `tile_tokens(group)`.

    Tiles of prompts that cuDNN can attend to (`fresh_length`) come last, and are left out where it does. Both parts
    begin with what takes longest.
    """
    tokens = tile_tokens(group)
    if len(prompts) == 1:  # as below, at a tenth of the cost: an idle engine waits for it
        places = np.zeros((tile_count(prompts[0], tokens), 2), dtype=np.int32)
        places[:, 1] = np.arange(len(places) - 1, -1, -1) * tokens
        return places
    counts = [tile_count(prompt, tokens) for prompt in prompts]
    index = np.repeat(np.arange(len(prompts), dtype=np.int32), counts)
    first = np.concatenate([np.arange(count, dtype=np.int32) * tokens for count in counts] or [index])
    before = np.array([prompt.context - prompt.count for prompt in prompts], dtype=np.int32)
    fresh = np.array([fresh_length(prompt) > 0 for prompt in prompts], dtype=bool)
    order = np.lexsort((-(before[index] + first), fresh[index]))
    return np.column_stack((index, first))[order]


def tile_count(prompt: PromptRow, tokens: int) -> int:
    return -(-prompt.count // tokens)
