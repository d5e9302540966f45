"""The configuration of dense decoders (Llama, Qwen2) and the tensors that it implies. No torch.

`config.json` is read in both spellings of RoPE: `rope_parameters` (transformers 5) and `rope_theta` with
`rope_scaling` (earlier).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd.errors import ModelError

ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """`kind` is one of ROPE_TYPES; `factor` divides frequencies (linear), the rest is Llama 3.1's interpolation."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class DenseConfig:
    """Everything that the dense decoder's computation depends on."""

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


def dense_config(path: str, raw: Mapping[str, Any]) -> DenseConfig:
    """Parse config.json of a Llama or Qwen2 model. Raises ModelError naming the field that cannot be served."""
    architecture = str((raw.get("architectures") or [""])[0])
    heads = count(path, raw, "num_attention_heads")
    hidden = count(path, raw, "hidden_size")
    kv_heads = count(path, raw, "num_key_value_heads", heads)
    head_dim = count(path, raw, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(path, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ModelError(path, f"head_dim {head_dim} is odd")
    _refuse_unsupported(path, raw)
    qwen2 = architecture == "Qwen2ForCausalLM"
    bias = bool(raw.get("attention_bias", False))
    context = count(path, raw, "max_position_embeddings")
    return DenseConfig(
        architecture=architecture,
        vocab_size=count(path, raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=count(path, raw, "intermediate_size"),
        num_layers=count(path, raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context,
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(path, raw, context),
        qkv_bias=qwen2 or bias,
        out_bias=bias and not qwen2,
        mlp_bias=bool(raw.get("mlp_bias", False)) and not qwen2,
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


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


def _refuse_unsupported(path: str, raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(path, f"config.json: hidden_act {activation!r} is not supported (only silu)")
    if raw.get("quantization_config"):
        raise ModelError(path, "config.json: quantization_config: quantised weights are not supported")
    layer_types = set(raw.get("layer_types") or ())
    if layer_types - {"full_attention"} or (raw.get("use_sliding_window") and not layer_types):
        raise ModelError(path, "config.json: sliding-window attention is not supported")


def _rope(path: str, raw: Mapping[str, Any], context: int) -> RopeConfig:
    newer = raw.get("rope_parameters")
    fields: dict[str, Any] = dict(newer if newer is not None else raw.get("rope_scaling") or {})
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ModelError(path, f"config.json: rope type {kind!r} is not supported (only {', '.join(ROPE_TYPES)})")
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(path, f"config.json: partial_rotary_factor {partial!r} is not supported (only 1)")
    theta = fields.get("rope_theta", raw.get("rope_theta"))
    try:
        return RopeConfig(
            theta=float(10_000.0 if theta is None else theta),
            kind=kind,
            factor=1.0 if kind == "default" else float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]) if kind == "llama3" else 1.0,
            high_freq_factor=float(fields["high_freq_factor"]) if kind == "llama3" else 4.0,
            original_context=int(fields.get("original_max_position_embeddings") or context),
        )
    except KeyError as missing:
        raise ModelError(path, f"config.json: rope type {kind!r} needs {missing.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ModelError(path, f"config.json: RoPE parameters: {error}") from error
