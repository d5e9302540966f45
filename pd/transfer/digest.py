"""The digest that guards every KV block on its way: a position-keyed sum of 64-bit words.

For words w_i of a block, little-endian and counted over the whole block (all kv heads of the model, so that a
tensor-parallel slice starts at its first head's offset),

    digest = sum over i of w_i * K(i div 64)  mod 2^64,    K(r) = splitmix64(r) | 1.

splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. The sum is linear, so
the digests of disjoint parts add up, and K is plain arithmetic, so that a kernel needs no table. An odd key makes every
change of a single word visible. It detects faults, not forgery: the keys are public.

A key covers a run of 64 words (512 bytes). What moves blocks moves far longer pieces, so that nothing finer changes
places; and with a key per word the sum would cost a multiplication per word instead of running at the speed of plain
addition: too slow to check copies through shared memory (measured with numpy: 3.8 against 2.4 us for 64 KiB, of which a
copy takes 7).

Of a partial block only the valid tokens' words count. In the layout `[kv_head, layer, k|v, token, head_dim]` these are
strided pieces, one per (kv head, layer, k|v).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy._core.multiarray import c_einsum  # np.einsum without 0.8 us of dispatch; the sums are 4 us each

from pd.types import BlockShape

#: Sent in Hello: peers must agree.
DIGEST_NAME = "splitmix64-sum64/1"

WORD = 8
RUN = 64
U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

#: Bytes copied and digested in one go: small enough that data and keys are still in the L2 cache.
CHUNK = 1 << 18


@dataclass(frozen=True)
class DigestGeometry:
    """Where a block's words stand: its shape, and the model-wide index of its first kv head."""

    shape: BlockShape
    first_head: int = 0

    def __post_init__(self) -> None:
        if self.shape.head_dim * self.shape.itemsize % WORD:
            raise ValueError(f"head_dim x itemsize must be a multiple of {WORD} bytes, got {self.shape}")

    @property
    def head_words(self) -> int:
        return self.shape.head_bytes // WORD

    @property
    def first_word(self) -> int:
        """Position of the block's first word in the whole block."""
        return self.first_head * self.head_words

    @property
    def words(self) -> int:
        return self.shape.nbytes // WORD


def splitmix64(index: U64) -> U64:
    """The finaliser of splitmix64, elementwise."""
    z = index + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=4)
def _table(bits: int) -> U64:
    table = splitmix64(np.arange(1 << bits, dtype=np.uint64)) | np.uint64(1)
    table.flags.writeable = False
    return table


def run_keys(words: int) -> U64:
    """K(0), K(1), …: enough for the first `words` words, shared and read-only."""
    return _table(max(8, (-(-words // RUN) - 1).bit_length()))


def word_keys(first_word: int, count: int) -> U64:
    """The key of each of `count` words from `first_word` on."""
    first_run, skip = divmod(first_word, RUN)
    runs = -(-(skip + count) // RUN)
    keys = run_keys((first_run + runs) * RUN)[first_run : first_run + runs]
    return np.repeat(keys, RUN)[skip : skip + count]


def sum_runs(runs: U64, keys: U64) -> Any:
    """Digest of whole runs uint64[n, RUN] with their keys uint64[n], as a numpy uint64."""
    return c_einsum("rc,r->", runs, keys)


def digest_words(words: U64, first_word: int, keys: U64) -> Any:
    """Digest of contiguous words that stand from `first_word` on, as a numpy uint64; `keys` from `run_keys`."""
    if (first_word | words.size) % RUN == 0:
        first = first_word // RUN
        return sum_runs(words.reshape(-1, RUN), keys[first : first + words.size // RUN])
    return c_einsum("i,i->", words, word_keys(first_word, words.size))


def digest_span(buffer: memoryview | bytes | U8, first_word: int) -> int:
    """Digest of one contiguous span whose first word stands at `first_word`. Its length is a multiple of 8 bytes."""
    raw = np.frombuffer(buffer, dtype=np.uint8)
    if raw.size % WORD:
        raise ValueError(f"a span is a whole number of {WORD}-byte words, got {raw.size} bytes")
    words = raw.view(np.uint64)
    keys = run_keys(first_word + words.size)
    step = CHUNK // WORD
    total = 0
    for start in range(0, words.size, step):
        total += int(digest_words(words[start : start + step], first_word + start, keys))
    return total & 0xFFFFFFFFFFFFFFFF


def digest_spans(buffer: memoryview | U8, spans: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> U64:
    """Digests of spans uint64[n, 2] (offset, length) of `buffer`; `keys[i]` is the position of span i's first word."""
    raw = np.frombuffer(buffer, dtype=np.uint8)
    out = np.empty(len(spans), dtype=np.uint64)
    for i, ((offset, length), first) in enumerate(zip(spans.tolist(), keys.tolist(), strict=True)):
        out[i] = digest_span(raw[offset : offset + length], first)
    return out


def valid_runs(geometry: DigestGeometry, tokens: int, heads: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """The bytes of a block that count: uint64[n, 3] (offset in the block, length, position of the first word).

    `heads` is a half-open range of the block's own heads. A whole block is one run.
    """
    shape = geometry.shape
    first, last = heads
    start, end = first * shape.head_bytes, last * shape.head_bytes
    if tokens >= shape.tokens:
        rows = np.array([[start, end - start, 0]], dtype=np.uint64)
    else:
        row = shape.head_dim * shape.itemsize
        offsets = np.arange(start, end, shape.tokens * row, dtype=np.uint64)
        rows = np.zeros((len(offsets), 3), dtype=np.uint64)
        rows[:, 0], rows[:, 1] = offsets, tokens * row
    rows[:, 2] = rows[:, 0] // np.uint64(WORD) + np.uint64(geometry.first_word)
    return rows


def digest_block(block: U8, tokens: int, geometry: DigestGeometry, heads: tuple[int, int] | None = None) -> int:
    """Digest of the first `tokens` tokens of one block (uint8[block_bytes]); `heads` selects some of its heads."""
    shape = geometry.shape
    first, last = heads or (0, shape.kv_heads)
    start, end = first * shape.head_bytes, last * shape.head_bytes
    position = geometry.first_word + start // WORD
    if tokens >= shape.tokens:
        return digest_span(block[start:end], position)
    rows = (last - first) * shape.layers * 2, shape.tokens, shape.head_dim * shape.itemsize // WORD
    words = block[start:end].view(np.uint64).reshape(rows)[:, :tokens]
    keys = word_keys(position, (end - start) // WORD).reshape(rows)[:, :tokens]
    return int(c_einsum("ijk,ijk->", words, keys))


def digest_blocks(
    pool: memoryview | U8,
    block_bytes: int,
    block_ids: Sequence[int] | npt.NDArray[np.int32],
    valid_tokens: Sequence[int] | npt.NDArray[np.int32],
    geometry: DigestGeometry,
    heads: tuple[int, int] | None = None,
) -> U64:
    """Digests uint64[n] of blocks of `pool` (bytes); block i counts its first `valid_tokens[i]` tokens."""
    raw = np.frombuffer(pool, dtype=np.uint8)
    out = np.empty(len(block_ids), dtype=np.uint64)
    for i, (block, tokens) in enumerate(zip(block_ids, valid_tokens, strict=True)):
        start = int(block) * block_bytes
        out[i] = digest_block(raw[start : start + block_bytes], int(tokens), geometry, heads)
    return out
