"""Causal attention of a flat token batch over paged KV: decode rows and prompt chunks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from pd.kernels import reference


class LayerKv(NamedTuple):
    """One layer's keys and values: views [blocks, kv_heads, tokens, head_dim] of the pool. Only strides are assumed."""

    k: torch.Tensor
    v: torch.Tensor


class Heads(NamedTuple):
    """The flat batch's rotated queries [T, Hq, D] and keys, and its values [T, Hkv, D] in one layer: strided views."""

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


def paged_attention(heads: Heads, kv: LayerKv, batch: AttentionBatch, scale: float, window: int = 0) -> torch.Tensor:
    """Attention of heads.q [T, Hq, D]: [T, Hq * D] in its dtype. Query head h reads kv head h // G.

    Keys and values are already in `kv` too. Scores and softmax are in float32.

    Every token attends to its own request's positions up to its own, with a `window` > 0 to the last `window` of these.
    What lies in a block beyond a request's tokens never matters, NaN included.
    """
    return reference.paged_attention(heads.q, kv, batch, scale, window)
