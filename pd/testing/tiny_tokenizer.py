"""Tiny tokenizers for tests, trained in milliseconds on a few lines: byte-level BPE and sentencepiece-like."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
BOS, EOS = 0, 1

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ 'assistant' if message.role == 'assistant' else 'user' }}|>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TEXT = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today?",
    "Die Würde des Menschen ist unantastbar. Être ou ne pas être, voilà la question.",
    "你好，世界！今天天气很好。我们在北京见面。",
    "Emoji: 😀 😃 👍🏽 👩‍👩‍👧 🇩🇪 and numbers 0 1 2 3 4 5 6 7 8 9 10 11 12.",
    "def f(x):\n    return {'a': x, \"b\": [1, 2, 3]}\n",
] * 4


@functools.cache
def byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: any text round-trips, characters can be cut into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """As Llama 2: pieces with U+2581 for spaces, unknown characters as byte tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*SPECIAL, "<unk>", *bytes_],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT[:2], trainer)
    model = json.loads(tokenizer.to_str())
    # The trainer marks every byte token special, which sentencepiece's are not.
    model["added_tokens"] = [token for token in model["added_tokens"] if token["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(model))


@functools.cache
def metaspace() -> Tokenizer:
    """As T5 and some Mistral exports: a Metaspace decoder, which strips the first token's space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def write(
    directory: Path, make: Callable[[], Tokenizer] = byte_level, *, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """tokenizer.json, tokenizer_config.json and generation_config.json, as a model directory has them."""
    directory.mkdir(parents=True, exist_ok=True)
    make().save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}), encoding="utf-8")
    return directory
