"""What a builder is given and what it builds. Which architecture has which builder: `Plugins.models()`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pd.errors import ModelError
from pd.types import ModelInfo

if TYPE_CHECKING:
    import torch

    from pd.kernels.attention import AttentionBatch, DeviceBatch, LayerKv


class Weights(Protocol):
    """Where a builder takes tensors from; converts to the model's dtype and device."""

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """One tensor, owned by the caller. Raises ModelError when it is missing or has another shape."""

    def stack(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Several tensors as one, joined along their first dimension (fused projections)."""


class Model(Protocol):
    """One rank's part of a model. Stateless between calls: all memory is weights and the KV given to `forward`."""

    def forward(self, tokens: torch.Tensor, batch: AttentionBatch | DeviceBatch, kv: Sequence[LayerKv]) -> torch.Tensor:
        """tokens int[T] -> final hidden states [T, hidden]; writes the T tokens' keys and values into `kv`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> [R, vocab], in the model's dtype or float32."""


class Builder(Protocol):
    def __call__(self, raw: Mapping[str, Any], info: ModelInfo, weights: Weights) -> Model:
        """`raw` is config.json. Raises ModelError."""


def load_builder(path: str, dotted: str) -> Builder:
    """Import "module:function". Raises ModelError when it does not exist."""
    module, _, function = dotted.partition(":")
    try:
        builder: Builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(path, f"model builder {dotted!r} cannot be imported: {error}") from error
    return builder
