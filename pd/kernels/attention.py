"""Causal attention of a flat token batch over paged KV: decode rows and prompt chunks together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from pd.kernels import reference
from pd.kernels.attention_plan import fresh_length


class LayerKv(NamedTuple):
    """One layer's keys and values: views [blocks, kv_heads, tokens, head_dim] of the pool. Only strides are assumed.

    In the queries' type, or in float8_e4m3fn: there an element stands for itself times the scale, and what is written
    is divided by it, rounded to nearest even and kept within the type's largest number, 448. Scales are of one layer.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0


class Heads(NamedTuple):
    """The flat batch's rotated queries [T, Hq, D] and keys, and its values [T, Hkv, D] in one layer: strided views.

    Keys and values are what the cache has of them, so that attention computes the same from either.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class DecodeGroup:
    """Rows of one token each whose contexts are of similar length.

    `rows` int64[B]: their places in the flat batch. `tables` int64[B, n]: block ids, padded with a block of the same
    row. `lengths` int64[B]: tokens to attend to, the row's own included.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class PromptSpan:
    """`count` tokens of one request, from `start` in the flat batch; the last one attends to `context` tokens."""

    start: int
    count: int
    context: int
    table: torch.Tensor  # int64[ceil(context / tokens per block)]


@dataclass(frozen=True)
class AttentionBatch:
    """Where the flat batch's T tokens stand and what they attend to.

    `positions`, `blocks`, `offsets` int64[T]: position in the request's sequence, and the slot of its key and value.
    """

    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    decode: tuple[DecodeGroup, ...]
    prompts: tuple[PromptSpan, ...]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt row of a batch on a GPU: `count` tokens from flat row `start`; the last one attends to `context`."""

    start: int
    count: int
    context: int


@dataclass(frozen=True)
class DeviceBatch:
    """A step's batch on a GPU. Rows of one token come first, `decode` of them; then prompt rows.

    `positions`, `blocks`, `offsets` int32[T]: as in AttentionBatch. `tables` int32[R, W]: each row's block ids; those
    beyond what it needs may be any that exist, and rows may be further than W apart. `lengths` int32[R]: tokens that a
    row attends to, its own included; 0 for a row that only fills a bucket. `starts` and `tiles` describe `prompts`, if
    there are any, to the device: `starts` int32[len(prompts) + 1], the flat row of each one's first token and the last
    one's end; `tiles`, what `prompt_tiles` makes. `arrivals` int32[decode * kv heads or more], zero before and after
    every use, saves decode attention a launch; it may serve all batches that run one after the other. `whole`: all T
    tokens are one prompt without a prefix, and what fills up the batch behind it.
    """

    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    decode: int
    prompts: tuple[PromptRow, ...] = ()
    starts: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
    arrivals: torch.Tensor | None = None
    whole: bool = False
    by_torch: bool = False  # without kernels, for comparison

    @cached_property
    def fresh(self) -> tuple[PromptRow, ...]:
        """Prompts without a prefix whose length suits cuDNN."""
        return tuple(prompt for prompt in self.prompts if fresh_length(prompt))


def paged_attention(
    heads: Heads, kv: LayerKv, batch: AttentionBatch | DeviceBatch, scale: float, window: int = 0
) -> torch.Tensor:
    """Attention of heads.q [T, Hq, D]: [T, Hq * D] in its dtype. Query head h reads kv head h // G.

    Keys and values are already in `kv` too. Scores and softmax are in float32.

    Every token attends to its own request's positions up to its own, with a `window` > 0 to the last `window` of these.
    What lies in a block beyond a request's tokens never matters, NaN included.
    """
    if isinstance(batch, AttentionBatch):
        return reference.paged_attention(heads.q, kv, batch, scale, window)
    if heads.q.is_cuda and not batch.by_torch:
        from pd.kernels.attention_device import paged_attention as on_device

        return on_device(heads, kv, batch, scale, window)
    return reference.paged_attention_device(heads, kv, batch, scale, window)
