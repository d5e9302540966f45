"""What config.json may not say: fields that change a model's computation and that the dense decoder does not compute.

A model that would be computed in another way than its authors meant is refused by the field's name. Fields that only
matter in training, or that the architecture of the model never reads, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd.errors import ModelError

#: Architecture -> its model_type. Another one would mean other code than the architecture's name promises.
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}

#: Field -> the values, besides null, with which it changes nothing.
_OFF: tuple[Any, ...] = (False, 0)
_ONE: tuple[Any, ...] = (1,)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # scores and logits
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_softcap": (),
    "logit_softcap": (),
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_scale": (),
    "scale_attn_by_inverse_layer_idx": _OFF,
    "use_logn_attn": _OFF,
    "clip_qkv": (),
    # hidden states
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "scale_emb": _ONE,
    "scale_depth": (),
    "dim_model_base": (),
    "use_parallel_residual": _OFF,
    "normalization_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    # positions
    "alibi": _OFF,
    "use_alibi": _OFF,
    "position_embedding_type": ("rope", "rotary"),
    "rotary_pct": _ONE,
    "rope_interleaved": _OFF,
    "use_dynamic_ntk": _OFF,
    "use_mrope": _OFF,
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    # which tokens attend to which
    "attention_chunk_size": (),
    "is_causal": (True,),
    "use_bidirectional_attention": _OFF,
    "dual_chunk_attention_config": ({},),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_layers": ([],),
    # norms of queries and keys that are not Qwen3's
    "use_qk_norm": _OFF,
    "qk_layernorm": _OFF,
    # mixtures of experts
    "num_experts": _OFF,
    "num_local_experts": (0, 1),
    "n_routed_experts": _OFF,
    # other weights than those that are read
    "quantization_config": ({},),
    "compression_config": ({},),
    "pruned_heads": ({},),
    "vision_config": ({},),
    "audio_config": ({},),
}
_WHY = {
    "dual_chunk_attention_config": "dual chunk attention is not supported (without the field attention is full)",
    "quantization_config": "quantised weights are not supported",
    "compression_config": "quantised weights are not supported",
    "vision_config": "multimodal models are not supported",
    "audio_config": "multimodal models are not supported",
}


def refuse_unsupported(path: str, architecture: str, raw: Mapping[str, Any]) -> None:
    """Raises ModelError for the first field that asks for what would not be computed."""
    model_type = raw.get("model_type")
    expected = MODEL_TYPES[architecture]
    if model_type not in (None, expected):
        raise ModelError(path, f"config.json: model_type {model_type!r} is not {architecture}'s ({expected!r})")
    for field in ("hidden_act", "hidden_activation"):
        activation = raw.get(field)
        if activation not in (None, "silu", "swish"):
            raise ModelError(path, f"config.json: {field} {activation!r} is not supported (only silu)")
    for field, neutral in _NEUTRAL.items():
        value = raw.get(field)
        if value is not None and value not in neutral:
            why = _WHY.get(field, f"{field} {value!r} is not supported")
            raise ModelError(path, f"config.json: {field}: {why}" if field in _WHY else f"config.json: {why}")
    # The architecture decides where biases are: a flag that it does not have would be followed by nobody.
    for field, having in (("attention_bias", "Llama Qwen2 Qwen3"), ("mlp_bias", "Llama")):
        if raw.get(field) and architecture.removesuffix("ForCausalLM") not in having.split():
            raise ModelError(path, f"config.json: {field} is not supported for {architecture}")
