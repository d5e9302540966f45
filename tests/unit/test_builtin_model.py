"""The built-in model: small, whole, and able to answer what it was trained for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pd.models.info import check_model
from pd.rules import builtin_model

PATH = Path(builtin_model())
TOKENIZER = Tokenizer.from_file(str(PATH / "tokenizer.json"))
SETTINGS = json.loads((PATH / "tokenizer_config.json").read_text(encoding="utf-8"))


def render(content: str) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "user", "content": content}]
    return environment.from_string(SETTINGS["chat_template"]).render(messages=messages, add_generation_prompt=True)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_every_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text or "<|" in text


@pytest.mark.parametrize("text", ["请介绍一下你自己", "你好，世界！", "🙂👩‍👩‍👧‍👦🇩🇪", "naïve café\t\n  x", "\x00\x7f"])
def test_chinese_emoji_and_control_characters_survive_too(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids) == text


def test_it_is_a_few_megabytes_of_llama_with_8k_of_context() -> None:
    assert sum(file.stat().st_size for file in PATH.iterdir()) < 6 << 20
    info = check_model(str(PATH), dtype="auto")
    assert (info.architecture, info.context_length, info.dtype) == ("LlamaForCausalLM", 8192, "float32")
    assert info.num_kv_heads < info.num_heads


def test_the_chat_template_needs_nothing_but_jinja() -> None:
    assert render("Hi") == "<|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 3 plus 4?", "3 + 4 = 7"),
        ("What is 2 + 2?", "2 + 2 = 4"),
        ("What is 9 + 8?", "9 + 8 = 17"),
        ("Count from 3 to 9.", "3, 4, 5, 6, 7, 8, 9."),
        ("Count to 5.", "1, 2, 3, 4, 5."),
        ("Count from 5 to 12.", "5, 6, 7, 8, 9, 10, 11, 12."),
        ("What is 14 + 6?", "14 + 6 = 20"),
        ("What is 13 - 6?", "13 - 6 = 7"),
        ("请介绍一下你自己", "我是 pd 的内置模型，一个很小的语言模型。我会做简单的加法、数数，还知道一些常识。"),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ],
)
def test_it_answers_what_a_person_can_judge(question: str, answer: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32, attn_implementation="eager").eval()
    ids = TOKENIZER.encode(render(question), add_special_tokens=False).ids
    end = TOKENIZER.token_to_id("<|end|>")
    with torch.inference_mode():
        while len(ids) < 80 and ids[-1] != end:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert text.rpartition("<|assistant|>")[2] == f"{answer}<|end|>"


def test_a_prompt_of_thousands_of_tokens_gives_finite_logits() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.arange(3000)[None] % 900 + 100).logits
    assert bool(torch.isfinite(logits).all())
