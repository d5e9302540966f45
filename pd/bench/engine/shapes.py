"""The model that is measured where none is named: a real one's shape, with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pd

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
        "eos_token_id": 0,  # the bundled tokenizer's, as for the other shape
    },
    # For a rehearsal without a GPU.
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 4096,
        "eos_token_id": 0,
    },
}


def make_model(folder: Path, shape: str) -> Path:
    """A directory with the shape's config.json and a tokenizer that serves where only token ids are sent."""
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    builtin = Path(pd.__file__).parent / "builtin_model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (builtin / name).exists():
            shutil.copy(builtin / name, folder / name)
    return folder
