"""Tiny random models and what transformers computes with them, in float32 with eager attention."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pd.verify.rounding import rounded_kv

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

#: Of a layer's keys and values.
Scales = tuple[float, float]

_made: dict[str, str] = {}


def tiny_model(
    folder: Path,
    arch: str = "llama",
    *,
    shards: int = 1,
    older_config: bool = False,
    dtype: str = "float32",
    tokenizer: bool = False,
    spread: float = 0.15,
    **overrides: Any,
) -> str:
    """Directory of a random `arch` ("llama", "mistral", "qwen2" or "qwen3") model; the same arguments give the same.

    Made once per session: `folder` is where a new one goes. `older_config` writes config.json as transformers 4 did.
    `tokenizer` adds one whose token ids are the 256 bytes. `spread` is the standard deviation of the weights.
    `overrides` are fields of the transformers configuration.
    """
    key = json.dumps([arch, shards, older_config, dtype, tokenizer, spread, overrides], sort_keys=True)
    if key not in _made:
        path = Path(folder) / f"{arch}-{len(_made)}"
        _save(path, arch, shards, older_config, dtype, spread, overrides)
        if tokenizer:
            _save_tokenizer(path)
        _made[key] = str(path)
    return _made[key]


def _save_tokenizer(path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    made = Tokenizer(models.BPE(vocab={letter: value for value, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(path / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _byte_of(letter: str) -> int:
    """The byte that a letter of the byte-level alphabet stands for: itself if printable, else shifted above 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]


def _save(
    path: Path, arch: str, shards: int, older_config: bool, dtype: str, spread: float, overrides: dict[str, Any]
) -> None:
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **overrides})
    torch.manual_seed(20_240_607)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts with weights so small that attention hardly matters, biases 0 and norms 1.
            scale = 0.3 if parameter.ndim == 1 else spread
            parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    path.mkdir(parents=True)
    model.save_pretrained(path)
    if shards > 1:
        _shard(path, shards)
    if older_config:
        _downgrade(path)


def _shard(path: Path, shards: int) -> None:
    tensors = load_file(path / "model.safetensors")
    os.remove(path / "model.safetensors")
    names = sorted(tensors)
    mapping = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        mapping.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": mapping}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _downgrade(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Generated:
    """Greedy continuation of a prompt, and the model's logprobs: float32 [len(prompt) + n, vocab], row p judging

    what follows position p (so row p - 1 judges the token at p).
    """

    tokens: list[int]
    logprobs: torch.Tensor


class Oracle:
    """transformers on the same directory, without KV cache: every position is computed from scratch."""

    def __init__(
        self, path: str, *, dtype: str = "float32", device: str = "cpu", fp8_scales: Sequence[Scales] | None = None
    ) -> None:
        """`fp8_scales`: of each layer's keys and values, which are rounded to float8_e4m3fn times them."""
        self.model, self._scales = _load(path, dtype, device), fp8_scales

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens), vocab], on the CPU."""
        rounding = nullcontext() if self._scales is None else rounded_kv(self.model, self._scales)
        with torch.inference_mode(), rounding:
            ids = torch.tensor([tokens], device=self.model.device)
            return self.model(ids, use_cache=False).logits[0].float().log_softmax(-1).cpu()

    def generate_logprobs(self, prompt: list[int], n: int) -> Generated:
        """The `n` greedy tokens after `prompt`, end tokens ignored."""
        tokens = list(prompt)
        for _ in range(n):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return Generated(tokens[len(prompt) :], self.logprobs(tokens))


@functools.lru_cache(maxsize=16)
def _load(path: str, dtype: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="eager").eval().to(device)
