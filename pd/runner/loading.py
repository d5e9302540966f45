"""From a checked model directory to a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pd.models.checkpoint import read_checkpoint, read_json
from pd.models.kv_cache import FP8_E4M3
from pd.models.registry import Model, load_builder
from pd.runner.weights import CheckpointWeights, DummyWeights
from pd.types import ModelInfo

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KV_DTYPES = TORCH_DTYPES | {FP8_E4M3: torch.float8_e4m3fn}


def load_model(
    info: ModelInfo,
    builders: Mapping[str, str],
    *,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    dummy: bool = False,
) -> Model:
    """Build the model that `info` describes with the builder of its architecture. Raises ModelError.

    `progress(done, total)` is told how many bytes of weights are in place; of random ones there is no total.
    """
    builder = load_builder(info.path, builders[info.architecture])
    place, dtype, raw = device or torch.device("cpu"), TORCH_DTYPES[info.dtype], read_json(info.path, "config.json")
    if dummy:
        return builder(raw, info, DummyWeights(dtype, place, progress))
    with CheckpointWeights(read_checkpoint(info.path), dtype, place, progress) as weights:
        return builder(raw, info, weights)
