"""What KV blocks hold: the model's type, or one byte an element with scales that a checkpoint may bring. No torch."""

from __future__ import annotations

import re

from pd.errors import ConfigError, ModelError
from pd.models.checkpoint import Checkpoint, read_number

FP8_E4M3 = "fp8_e4m3"

#: Where checkpoints keep a layer's scales: llm-compressor, ModelOpt, and one for both as AutoFP8 once had it. What is
#: stored times its scale is the key or value, as in vLLM and SGLang. Queries are not quantised here.
_K_SCALES = ("self_attn.k_scale", "self_attn.k_proj.k_scale", "self_attn.kv_scale")
_V_SCALES = ("self_attn.v_scale", "self_attn.v_proj.v_scale", "self_attn.kv_scale")
_SCALE = re.compile(r"model\.layers\.\d+\.(.+)")
_KNOWN = frozenset({*_K_SCALES, *_V_SCALES, "self_attn.q_scale"})

#: Scales below it, or above its inverse, are errors: what they make of numbers is 0 or infinite.
_SMALLEST = 2.0**-100

#: Transfers and digests count words of so many bytes.
_WORD = 8


def is_kv_scale(name: str) -> bool:
    """Whether a tensor scales what is cached: read where the cache is of one byte, and else of no use."""
    found = _SCALE.fullmatch(name)
    return found is not None and found[1] in _KNOWN


def kv_cache(
    checkpoint: Checkpoint, wanted: str, *, layers: int, head_dim: int
) -> tuple[str, tuple[tuple[float, float], ...]]:
    """(`ModelInfo.kv_dtype`, `ModelInfo.kv_scales`) where `--kv-cache-dtype` is `wanted`.

    Raises ConfigError for what cannot be stored so, ModelError for scales that are not one positive number a layer.
    """
    if wanted == "auto":
        return "", ()
    if wanted != FP8_E4M3:
        raise ConfigError("--kv-cache-dtype", f"{wanted!r} is not one of auto, {FP8_E4M3}")
    if head_dim % _WORD:
        problem = f"heads of {head_dim} elements, a byte each, are no whole words of {_WORD} bytes"
        raise ConfigError("--kv-cache-dtype", problem, "leave it out for this model")
    scales = tuple(
        (_scale(checkpoint, layer, _K_SCALES), _scale(checkpoint, layer, _V_SCALES)) for layer in range(layers)
    )
    return FP8_E4M3, () if all(pair == (1.0, 1.0) for pair in scales) else scales


def _scale(checkpoint: Checkpoint, layer: int, names: tuple[str, ...]) -> float:
    for name in names:
        tensor = f"model.layers.{layer}.{name}"
        if tensor in checkpoint.tensors:
            value = read_number(checkpoint, tensor)
            if not _SMALLEST < value < 1 / _SMALLEST:
                raise ModelError(checkpoint.path, f"tensor {tensor!r} is {value}: no scale of keys or values")
            return value
    return 1.0
