"""The configuration of dense decoders (Llama, Mistral, Qwen2, Qwen3) and the tensors that it implies. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd.errors import ModelError
from pd.models.guard import MODEL_TYPES, refuse_unsupported
from pd.models.rope import RopeConfig, rope_config

#: Architectures whose configuration and tensors are known here, so that both are checked up front.
DENSE_ARCHITECTURES = frozenset(MODEL_TYPES)

#: What transformers assumes where config.json lacks the field, as far as it differs from the fields' own defaults.
_ABSENT: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "Qwen3ForCausalLM": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DenseConfig:
    """Everything that the dense decoder's computation depends on.

    `windows`: for each layer the number of tokens, its own included, that a token attends to at most; 0 means all.
    `qk_norm`: queries and keys are normalised, head by head, before they are rotated.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_eps: float
    rope: RopeConfig
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    windows: tuple[int, ...]
    qk_norm: bool


def dense_config(path: str, raw: Mapping[str, Any]) -> DenseConfig:
    """Parse config.json of one of DENSE_ARCHITECTURES. Raises ModelError naming the field that cannot be served."""
    architecture = str((raw.get("architectures") or [""])[0])
    raw = {**_ABSENT[architecture], **raw}
    refuse_unsupported(path, architecture, raw)
    heads = count(path, raw, "num_attention_heads")
    hidden = count(path, raw, "hidden_size")
    kv_heads = count(path, raw, "num_key_value_heads", heads)
    head_dim = count(path, raw, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(path, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ModelError(path, f"head_dim {head_dim} is odd")
    qwen2 = architecture == "Qwen2ForCausalLM"
    bias = bool(raw.get("attention_bias", False))
    context = count(path, raw, "max_position_embeddings")
    rope = rope_config(path, raw, context)
    return DenseConfig(
        architecture=architecture,
        vocab_size=count(path, raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=count(path, raw, "intermediate_size"),
        num_layers=count(path, raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=max(context, rope.reach),
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        qkv_bias=qwen2 or bias,
        out_bias=bias and not qwen2,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        windows=_windows(path, architecture, raw),
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


def _windows(path: str, architecture: str, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Each layer's window. `layer_types` names the layers that have one; without it Mistral's are all of them, and

    Qwen's, under `use_sliding_window`, those from `max_window_layers` on.
    """
    layers = count(path, raw, "num_hidden_layers")
    types = raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        raise ModelError(path, f"config.json: layer_types must name the {layers} layers, not {types!r}")
    other = sorted(str(kind) for kind in types or () if kind not in (FULL, SLIDING))
    if other:
        raise ModelError(path, f"config.json: layer_types: {other[0]!r} is not supported (only {FULL}, {SLIDING})")
    qwen = architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
    used = bool(raw.get("use_sliding_window")) if qwen else architecture == "MistralForCausalLM"
    window = 0 if not used or raw.get("sliding_window") is None else count(path, raw, "sliding_window")
    if not used and not qwen:
        for field in ("sliding_window", "use_sliding_window"):
            if raw.get(field):
                raise ModelError(path, f"config.json: {field}: {architecture} has no sliding-window attention")
    if types is None:
        first = _first_windowed(path, raw) if qwen else 0
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if SLIDING in types and not window:
        raise ModelError(
            path, "config.json: layer_types names sliding-window attention, but no sliding_window is in use"
        )
    return tuple(window if kind == SLIDING else 0 for kind in types)


def _first_windowed(path: str, raw: Mapping[str, Any]) -> int:
    first = raw.get("max_window_layers")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ModelError(path, f"config.json: max_window_layers must be a whole number, not {first!r}")
    return first


def expected_tensors(config: DenseConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the decoder loads, as transformers names them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = (
        ("self_attn.q_proj", q, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q, config.out_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def ignorable(name: str, config: DenseConfig) -> bool:
    """Whether a tensor that is not expected may be skipped: old RoPE buffers, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def count(path: str, raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A positive integer of config.json. Raises ModelError naming the field."""
    value = raw.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(path, f"config.json: {field} must be a positive integer, not {value!r}")
    return value
