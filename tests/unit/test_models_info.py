"""Reading model directories: both config spellings, and one clear error for everything that cannot be served."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pd.errors import ModelError
from pd.models.dense import DENSE_ARCHITECTURES, dense_config
from pd.models.info import check_model
from pd.models.registry import load_builder
from pd.models.rope import RopeConfig
from pd.plugins import load_plugins
from tests.oracle import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def copy_of(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A writable copy of a tiny model, with a tokenizer file and edited config.json."""

    def make(arch: str = "llama", edit: dict[str, Any] | None = None, **options: Any) -> Path:
        path = tmp_path / "model"
        shutil.copytree(tiny_model(folder, arch, **options), path, dirs_exist_ok=True)
        (path / "tokenizer.json").write_text("{}")
        config = json.loads((path / "config.json").read_text()) | (edit or {})
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
        return path

    return make


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        check_model(str(path), **options)
    assert error.value.path == str(path)
    return error.value.problem


def test_a_model_directory_is_described(copy_of: Callable[..., Path]) -> None:
    path = copy_of("qwen2")
    info = check_model(str(path), name="served")
    assert (info.name, info.path, info.architecture) == ("served", str(path), "Qwen2ForCausalLM")
    assert (info.num_layers, info.num_heads, info.num_kv_heads, info.head_dim) == (3, 4, 2, 16)
    assert (info.vocab_size, info.hidden_size, info.context_length, info.dtype) == (256, 64, 1024, "float32")
    assert check_model(str(path)).name == str(path)
    assert check_model(str(path), context_length=512).context_length == 512


def test_sharded_weights_are_found_through_their_index(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama", shards=3)
    assert check_model(str(path)).num_layers == 3
    (path / "model-00002-of-00003.safetensors").unlink()
    assert refusal(path) == "shard model-00002-of-00003.safetensors is missing"


def test_a_shard_outside_the_directory_is_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama", shards=3)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the directory" in refusal(path)


def test_an_index_that_promises_too_much_is_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama", shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'model.extra'" in refusal(path)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, RopeConfig(5e5, original_context=1024)),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            RopeConfig(1e4, "linear", 2.0, original_context=1024),
        ),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 256,
            },
            RopeConfig(5e5, "llama3", 8.0, 1.0, 3.0, 256),
        ),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 16,
                "attention_factor": 1.25,
                "truncate": False,
            },
            RopeConfig(1e6, "yarn", 4.0, original_context=512, attention_factor=1.25, beta_fast=16.0, truncate=False),
        ),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, RopeConfig(1e4, original_context=1024)),
    ],
)
def test_both_spellings_of_rope_mean_the_same(
    copy_of: Callable[..., Path], rope: dict[str, Any], expected: RopeConfig
) -> None:
    config = json.loads((copy_of() / "config.json").read_text())
    newer = config | {"rope_parameters": rope}
    older = {k: v for k, v in config.items() if k != "rope_parameters"}
    older |= {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    oldest = json.loads(json.dumps(older).replace('"rope_type"', '"type"'))
    assert [dense_config("m", raw).rope for raw in (newer, older, oldest)] == [expected] * 3


def test_yarn_reaches_as_far_as_it_stretches_where_the_config_keeps_the_trained_length(
    copy_of: Callable[..., Path],
) -> None:
    """As Qwen2.5's model card has it: max_position_embeddings is what the model was trained with."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    path = copy_of("qwen2", {"rope_scaling": yarn, "rope_parameters": "absent", "rope_theta": 1e4})
    assert check_model(str(path)).context_length == 4096
    assert check_model(str(path), context_length=4000).context_length == 4000
    assert check_model(str(copy_of("qwen2", {"rope_scaling": yarn | {"factor": 0.5}}))).context_length == 1024


def test_windows_are_those_of_the_layers_that_have_one(copy_of: Callable[..., Path]) -> None:
    qwen = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": "absent"}
    full, sliding = "full_attention", "sliding_attention"
    for arch, edit, expected in (
        ("llama", {}, (0, 0, 0)),
        ("llama", {"layer_types": [full] * 3, "sliding_window": None}, (0, 0, 0)),
        ("mistral", {"sliding_window": 8}, (8, 8, 8)),
        ("mistral", {"sliding_window": None}, (0, 0, 0)),
        ("mistral", {"sliding_window": "absent"}, (4096,) * 3),  # transformers' default
        ("mistral", {"sliding_window": 8, "layer_types": [sliding, full, sliding]}, (8, 0, 8)),
        ("qwen2", qwen, (0, 0, 8)),
        ("qwen2", {**qwen, "max_window_layers": "absent"}, (0, 0, 0)),
        ("qwen2", {**qwen, "use_sliding_window": False}, (0, 0, 0)),
        ("qwen3", {**qwen, "layer_types": [sliding, full, full]}, (8, 0, 0)),
        ("qwen3", {**qwen, "sliding_window": "absent"}, (0, 0, 4096)),
    ):
        raw = json.loads((copy_of(arch, edit) / "config.json").read_text())
        assert dense_config("m", raw).windows == expected, (arch, edit)


def test_a_head_may_be_wider_than_its_share_of_the_hidden_state(copy_of: Callable[..., Path]) -> None:
    info = check_model(str(copy_of("qwen3", head_dim=32)))
    assert (info.num_heads, info.head_dim, info.hidden_size) == (4, 32, 64)
    assert check_model(str(copy_of("qwen3", {"head_dim": "absent"}, head_dim=128))).head_dim == 128


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported"),
        ({"architectures": []}, "names no architecture"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding-window"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types must name the 3 layers"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "'linear_attention'"),
        ({"use_sliding_window": True}, "use_sliding_window: LlamaForCausalLM has no sliding-window attention"),
        ({"sliding_window": 8}, "sliding_window: LlamaForCausalLM has no sliding-window attention"),
        ({"model_type": "ministral"}, "model_type 'ministral' is not LlamaForCausalLM's ('llama')"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"alibi": True}, "alibi True"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
        ({"logit_scale": 0.0625}, "logit_scale 0.0625"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
        ({"attention_multiplier": 0.01}, "attention_multiplier 0.01"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size 8192"),
        ({"use_qk_norm": True}, "use_qk_norm True"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"is_causal": False}, "is_causal False"),
        ({"vision_config": {"depth": 2}}, "multimodal"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation 'gelu_pytorch_tanh'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs 'factor'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "needs 'factor'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "factor 0 is not a positive number"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "'mrope_section' in the RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention' in the RoPE"),
        ({"rope_parameters": "yarn"}, "must be an object"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "RoPE parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"eos_token_id": "end"}, "eos_token_id 'end'"),
        ({"num_hidden_layers": 4}, "'model.layers.3."),
        ({"num_hidden_layers": 2}, "'model.layers.2."),
        ({"intermediate_size": 97}, "has shape (64, 96) where config.json says (64, 97)"),
        ({"vocab_size": 300}, "where config.json says (300, 64)"),
        ({"attention_bias": True}, "bias' is missing (12 missing in all)"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    copy_of: Callable[..., Path], edit: dict[str, Any], problem: str
) -> None:
    assert problem in refusal(copy_of("llama", edit))


@pytest.mark.parametrize(
    ("arch", "edit", "problem"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias is not supported for MistralForCausalLM"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias is not supported for Qwen3ForCausalLM"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive integer"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window must be a positive integer"),
        ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "no sliding_window is in use"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "no sliding_window is in use"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None, "layer_types": None}, "max_window_layers"),
        ("qwen3", {"head_dim": 8}, "has shape"),
        ("qwen2", {"use_mrope": True}, "use_mrope True"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 64}}, "dual chunk attention is not supported"),
    ],
)
def test_what_an_architecture_does_not_compute_is_refused_by_name(
    copy_of: Callable[..., Path], arch: str, edit: dict[str, Any], problem: str
) -> None:
    assert problem in refusal(copy_of(arch, edit))


def test_fields_that_change_nothing_are_no_hindrance(copy_of: Callable[..., Path]) -> None:
    neutral = {
        "logit_scale": 1.0,
        "attn_logit_softcapping": None,
        "alibi": False,
        "num_experts": 0,
        "attention_dropout": 0.1,
        "pretraining_tp": 4,
        "hidden_act": "swish",
        "quantization_config": None,
        "is_causal": True,
        "unsloth_version": "1",
    }
    assert check_model(str(copy_of("llama", neutral))).architecture == "LlamaForCausalLM"


def test_missing_and_damaged_files_are_refused(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")
    path = copy_of()
    weights = (path / "model.safetensors").read_bytes()
    (path / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(path)
    assert check_model(str(path), tokenizer=False).num_layers == 3
    for damaged, problem in (
        (weights[:-100], "cut off"),
        (weights[:50], "header is cut off"),
        (b"", "no safetensors file"),
        (weights[:8] + b"[" + weights[9:], "damaged header"),
    ):
        (path / "model.safetensors").write_bytes(damaged)
        assert problem in refusal(path, tokenizer=False)
    (path / "model.safetensors").unlink()
    assert "no weights" in refusal(path, tokenizer=False)
    (path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(path)
    (path / "config.json").write_text("[]")
    assert "must hold a JSON object" in refusal(path)
    (path / "config.json").unlink()
    assert "config.json is missing" in refusal(path)


def test_tensors_that_the_model_would_not_use_are_refused(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    tensors = load_file(path / "model.safetensors")
    old_buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(tensors | old_buffer, path / "model.safetensors")
    assert check_model(str(path)).num_layers == 3
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, path / "model.safetensors")
    assert "q_norm.weight' is not part of LlamaForCausalLM" in refusal(path)
    save_file(tensors | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, path / "model.safetensors")
    assert "has dtype I8" in refusal(path)


def test_dtype_follows_the_flag_then_the_config_then_the_weights(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama", dtype="bfloat16")
    assert check_model(str(path)).dtype == "bfloat16"
    assert check_model(str(path), dtype="float16").dtype == "float16"
    assert "dtype 'int8'" in refusal(path, dtype="int8")
    assert check_model(str(copy_of("llama", {"dtype": "absent", "torch_dtype": "float16"}))).dtype == "float16"
    assert check_model(str(copy_of("llama", {"dtype": "absent"}, dtype="bfloat16"))).dtype == "bfloat16"


def test_end_tokens_come_from_both_configurations(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama", {"eos_token_id": [7, 8]})
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert check_model(str(path)).eos_token_ids == (9, 7, 8)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert check_model(str(path)).eos_token_ids == (3, 7, 8)
    (path / "generation_config.json").unlink()
    assert check_model(str(copy_of("llama", {"eos_token_id": None}))).eos_token_ids == (1,)
    (path / "generation_config.json").unlink()
    assert check_model(str(path)).eos_token_ids == ()


def test_a_context_longer_than_the_models_is_refused(copy_of: Callable[..., Path]) -> None:
    assert "--context-length 2048 exceeds the model's 1024" in refusal(copy_of(), context_length=2048)


def test_fingerprints_tell_weights_and_dtypes_apart_and_nothing_else(copy_of: Callable[..., Path]) -> None:
    path = copy_of()
    original = check_model(str(path)).fingerprint
    assert check_model(str(copy_of("llama", {"transformers_version": "9"}))).fingerprint == original
    assert check_model(str(path), dtype="bfloat16").fingerprint != original
    assert check_model(str(copy_of("llama", {"rms_norm_eps": 1e-5}))).fingerprint != original
    path = copy_of()
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    assert check_model(str(path)).fingerprint != original


def test_other_architectures_need_a_plugin_and_are_not_second_guessed(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama", {"architectures": ["CustomForCausalLM"], "hidden_act": "gelu"})
    assert check_model(str(path), supported=("CustomForCausalLM",)).architecture == "CustomForCausalLM"


def test_the_built_in_builders_are_registered_and_can_be_imported() -> None:
    found = load_plugins().models()
    assert found.items() >= dict.fromkeys(DENSE_ARCHITECTURES, "pd.models.llama:build").items()
    assert callable(load_builder("m", found["LlamaForCausalLM"]))
    with pytest.raises(ModelError, match="no_such"):
        load_builder("m", "pd.models.llama:no_such")


def test_checking_a_model_does_not_import_torch() -> None:
    """The parent and the CLI check models; only runners import torch."""
    modules = "pd.models.info, pd.models.registry, pd.models.plugin, pd.runner.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_oracles_tokenizer_maps_every_byte_to_itself(folder: Path) -> None:
    path = tiny_model(folder, tokenizer=True)
    made = Tokenizer.from_file(f"{path}/tokenizer.json")
    text = "Hi\n\x00 é ~ ÿ"
    assert made.encode(text).ids == list(text.encode())
    assert made.decode(list(text.encode())) == text
    assert made.get_vocab_size() == check_model(path).vocab_size
