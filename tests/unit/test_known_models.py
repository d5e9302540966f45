"""config.json of models that people have: which are served, with what shape, and why the others are not."""

from __future__ import annotations

from typing import Any

import pytest

from pd.errors import ModelError
from pd.models.dense import DENSE_ARCHITECTURES, DenseConfig
from pd.models.info import check_config

Fields = dict[str, Any]

COMMON: Fields = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}


def sized(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> Fields:
    return {
        **COMMON,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def of(kind: str, type_: str, sizes: Fields, **more: Any) -> Fields:
    return {"architectures": [f"{kind}ForCausalLM"], "model_type": type_, **sizes, **more}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
NO_WINDOW = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
QWEN2 = sized(3584, 18944, 28, 28, 4, 152064, 32768)
QWEN3 = sized(4096, 12288, 36, 32, 8, 151936, 40960) | {"head_dim": 128, "attention_bias": False}
MISTRAL = sized(4096, 14336, 32, 32, 8, 32768, 32768)

LLAMA_31 = of(
    "Llama", "llama", sized(4096, 14336, 32, 32, 8, 128256, 131072), rope_theta=500000.0, rope_scaling=LLAMA3,
    attention_bias=False, mlp_bias=False, pretraining_tp=1,
)  # fmt: skip
QWEN_25 = of("Qwen2", "qwen2", QWEN2, rope_theta=1e6, **NO_WINDOW)
SERVED = {
    "Llama-3.1-8B": (LLAMA_31, 131072, 0),
    "Qwen2.5-7B-Instruct": (QWEN_25, 32768, 0),
    "Qwen2.5-7B-Instruct with YaRN": ({**QWEN_25, "rope_scaling": YARN}, 131072, 0),
    "Qwen3-8B": (of("Qwen3", "qwen3", QWEN3, rope_theta=1e6, rope_scaling=None, sliding_window=None), 40960, 0),
    "Mistral-7B-v0.1": (of("Mistral", "mistral", MISTRAL, rope_theta=1e4, sliding_window=4096), 32768, 4096),
    "Mistral-7B-v0.3": (of("Mistral", "mistral", MISTRAL, rope_theta=1e6, sliding_window=None), 32768, 0),
    "Mistral-Nemo": (
        of("Mistral", "mistral", sized(5120, 14336, 40, 32, 8, 131072, 1024000), head_dim=128, sliding_window=None),
        1024000,
        0,
    ),
    "DeepSeek-R1-Distill-Qwen": (of("Qwen2", "qwen2", QWEN2, rope_theta=1e4, use_mrope=False, **NO_WINDOW), 32768, 0),
}

DUAL_CHUNK = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
REFUSED = {
    "Qwen2.5-7B-Instruct-1M": ({**QWEN_25, "dual_chunk_attention_config": DUAL_CHUNK}, "dual_chunk_attention_config"),
    "Qwen2.5-7B-Instruct-AWQ": ({**QWEN_25, "quantization_config": {"quant_method": "awq"}}, "quantised weights"),
    "Qwen1.5-MoE": (of("Qwen2Moe", "qwen2_moe", QWEN2, num_experts=60), "architecture Qwen2MoeForCausalLM"),
    "Phi-3": (of("Phi3", "phi3", MISTRAL, sliding_window=2047), "architecture Phi3ForCausalLM"),
    "Gemma-2": (of("Gemma2", "gemma2", MISTRAL, attn_logit_softcapping=50.0), "architecture Gemma2ForCausalLM"),
    "Ministral-3": (of("Mistral", "ministral3", MISTRAL), "model_type 'ministral3'"),
}


@pytest.mark.parametrize(("config", "context", "window"), SERVED.values(), ids=SERVED)
def test_a_known_model_is_served_as_it_is(config: Fields, context: int, window: int) -> None:
    architecture, shape = check_config("m", config, DENSE_ARCHITECTURES)
    assert architecture == config["architectures"][0] and isinstance(shape, DenseConfig)
    assert (shape.context_length, shape.head_dim, set(shape.windows)) == (context, 128, {window})


@pytest.mark.parametrize(("config", "why"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_not_computed_here_is_refused_by_what_is_missing(config: Fields, why: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_config("m", config, DENSE_ARCHITECTURES)
    assert why in str(caught.value)
