"""What a model directory holds, checked before any port opens and before any tensor is read. No torch.

`check_model` is what the parent process calls; the runner calls it again, with `tokenizer=False`, before it loads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from pd.errors import ModelError
from pd.models.checkpoint import Checkpoint, read_checkpoint, read_json
from pd.models.dense import DENSE_ARCHITECTURES, DenseConfig, count, dense_config, expected_tensors, ignorable
from pd.models.kv_cache import is_kv_scale, kv_cache
from pd.types import ModelInfo

DTYPES = ("float32", "float16", "bfloat16")
TOKENIZER_FILE = "tokenizer.json"

_WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_UNIMPORTANT = frozenset({"_name_or_path", "transformers_version"})
_SAMPLES, _SAMPLE_BYTES = 64, 1024


def check_model(
    path: str,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    name: str = "",
    context_length: int = 0,
    supported: Collection[str] = DENSE_ARCHITECTURES,
    tokenizer: bool = True,
    dummy: bool = False,
) -> ModelInfo:
    """Read and check a model directory.

    `dtype` auto keeps the checkpoint's own (float16 and bfloat16 too), `kv_cache_dtype` auto is the same type.
    `context_length` 0 means the model's own; a longer one is an error. `supported` names the architectures that have a
    builder. `tokenizer` asks for tokenizer.json as well, `dummy` for no weights. Raises ModelError, or ConfigError, for
    anything that would make serving fail later.
    """
    if not os.path.isdir(path):
        raise ModelError(path, "no such directory, and no hub id either (ORG/NAME)")
    raw = read_json(path, "config.json")
    architecture, shape = check_config(path, raw, supported)
    checkpoint = Checkpoint(path, {}, {}) if dummy else read_checkpoint(path)
    if isinstance(shape, DenseConfig) and not dummy:
        check_tensors(checkpoint, shape)
    if tokenizer and not os.path.isfile(os.path.join(path, TOKENIZER_FILE)):
        raise ModelError(path, f"{TOKENIZER_FILE} is missing (other tokenizer formats are not read)")
    if context_length > shape.context_length:
        raise ModelError(path, f"--context-length {context_length} exceeds the model's {shape.context_length}")
    resolved = resolve_dtype(path, dtype, raw, checkpoint)
    kv_dtype, kv_scales = kv_cache(checkpoint, kv_cache_dtype, layers=shape.num_layers, head_dim=shape.head_dim)
    return ModelInfo(
        name=name or path,
        path=path,
        architecture=architecture,
        vocab_size=shape.vocab_size,
        context_length=context_length or shape.context_length,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        dtype=resolved,
        eos_token_ids=eos_token_ids(path, raw),
        fingerprint=fingerprint(raw, checkpoint, resolved),
        kv_dtype=kv_dtype,
        kv_scales=kv_scales,
    )


@dataclass(frozen=True)
class _Shape:
    """What serving needs to know of an architecture that only a plugin's builder can read."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int


def check_config(path: str, raw: Mapping[str, Any], supported: Collection[str]) -> tuple[str, DenseConfig | _Shape]:
    """The architecture that config.json names, and its sizes. Raises ModelError for what cannot be served."""
    architecture = _architecture(path, raw, supported)
    if architecture in DENSE_ARCHITECTURES:
        return architecture, dense_config(path, raw)
    heads, hidden = count(path, raw, "num_attention_heads"), count(path, raw, "hidden_size")
    return architecture, _Shape(
        vocab_size=count(path, raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=count(path, raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=count(path, raw, "num_key_value_heads", heads),
        head_dim=count(path, raw, "head_dim", hidden // heads),
        context_length=count(path, raw, "max_position_embeddings"),
    )


def check_tensors(checkpoint: Checkpoint, config: DenseConfig) -> None:
    """Every expected tensor is there with its shape and a floating dtype, and nothing else is. Raises ModelError.

    An unknown tensor is an error because skipping it would make the model silently compute something else.
    """
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise ModelError(checkpoint.path, f"tensor {missing[0]!r} is missing ({len(missing)} missing in all)")
    for name, entry in checkpoint.tensors.items():
        shape = expected.get(name)
        if shape is None:
            if ignorable(name, config) or is_kv_scale(name):
                continue
            raise ModelError(checkpoint.path, f"tensor {name!r} is not part of {config.architecture}")
        if entry.shape != shape:
            raise ModelError(checkpoint.path, f"tensor {name!r} has shape {entry.shape} where config.json says {shape}")
        if entry.dtype not in _WEIGHT_DTYPES:
            raise ModelError(checkpoint.path, f"tensor {name!r} has dtype {entry.dtype}, which is not supported")


def resolve_dtype(path: str, wanted: str, raw: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """`wanted`, or for auto what config.json says (`dtype`, earlier `torch_dtype`), or else the weights' own."""
    if wanted != "auto":
        if wanted not in DTYPES:
            raise ModelError(path, f"dtype {wanted!r} is not supported (only {', '.join(DTYPES)})")
        return wanted
    said = raw.get("dtype", raw.get("torch_dtype"))
    if said is not None:
        name = str(said).removeprefix("torch.")
        if name not in DTYPES:
            raise ModelError(path, f"config.json: dtype {said!r} is not supported (only {', '.join(DTYPES)})")
        return name
    stored = {entry.dtype for entry in checkpoint.tensors.values()} & set(_WEIGHT_DTYPES)
    return _WEIGHT_DTYPES[stored.pop()] if len(stored) == 1 else "float32"


def eos_token_ids(path: str, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens: generation_config.json's (an id or a list), then config.json's, without repetition."""
    generation: Mapping[str, Any] = {}
    if os.path.exists(os.path.join(path, "generation_config.json")):
        generation = read_json(path, "generation_config.json")
    ids: dict[int, None] = {}
    for source in (generation, raw):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool):
                raise ModelError(path, f"eos_token_id {value!r} is neither an id nor a list of ids")
            ids[token] = None
    return tuple(ids)


def fingerprint(raw: Mapping[str, Any], checkpoint: Checkpoint, dtype: str) -> str:
    """blake2b-128 over config, dtype, and each file's header, size and 64 samples of 1 KiB.

    Two instances exchange KV only when these agree. The samples tell fine-tunes of one model apart; reading every
    byte would make start-up as slow as loading.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = {key: value for key, value in raw.items() if key not in _UNIMPORTANT}
    digest.update(msgspec.json.encode(config, order="deterministic"))
    digest.update(dtype.encode())
    for name, (header, size) in sorted(checkpoint.files.items()):
        digest.update(name.encode() + size.to_bytes(8, "little") + header)
        begin = 8 + len(header)
        step = max(_SAMPLE_BYTES, (size - begin) // _SAMPLES)
        with open(os.path.join(checkpoint.path, name), "rb") as file:
            for offset in range(begin, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _architecture(path: str, raw: Mapping[str, Any], supported: Collection[str]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError(path, "config.json names no architecture")
    if names[0] not in supported:
        raise ModelError(path, f"architecture {names[0]} is not supported (only {', '.join(sorted(supported))})")
    return names[0]
