"""Templates with the constructs of real model families, rendered as transformers' apply_chat_template renders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest

from pd.api.chat_messages import other_forms, template_messages
from pd.api.chat_template import ChatTemplate
from pd.api.context import ChatFormats
from pd.api.tokenizer import Tokenizer
from pd.api.tools.formats import HERMES, LLAMA3
from pd.config import ServeConfig, UpConfig
from pd.errors import ConfigError, RequestError
from pd.settings import parse
from pd.testing import tiny_tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
SOURCES = {file.stem: file.read_text() for file in FOLDER.glob("*.jinja")}

USER = {"role": "user", "content": ' Grüße <b>"& 你好\n'}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather, "now" & <then>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": None}},
]
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system": [{"role": "system", "content": "Be nice. "}, USER],
    "history": [
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi  "},
        {"role": "user", "content": "More"},
    ],
    "thoughts": [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "\nHm\n"}],
    "calls": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "20 °C", "tool_call_id": "abcdef123", "name": "weather"},
        {"role": "assistant", "content": "It is warm."},
        {"role": "user", "content": "And now?"},
    ],
}


@pytest.fixture(scope="module")
def library() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.byte_level(), bos_token="<|bos|>", eos_token="<|eos|>", unk_token=None
    )


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    template = ChatTemplate(source, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"})
    try:
        return template.render(template_messages(messages), **options)
    except RequestError:
        return None


def theirs(library: Any, source: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        return library.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    except Exception:  # whatever the template or the library raises is a refusal
        return None


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", SOURCES)
def test_a_family_is_rendered_as_transformers_renders_it(library: Any, name: str, chat: str, tools: Any) -> None:
    source, messages = SOURCES[name], CHATS[chat]
    for prompt in (True, False):
        expected = theirs(library, source, messages, tools=tools, add_generation_prompt=prompt)
        assert ours(source, messages, tools=tools, add_generation_prompt=prompt) == expected
    assert expected is not None or chat == "calls", "most of these templates take most of these chats"


def test_these_chats_exercise_most_of_the_templates(library: Any) -> None:
    rendered = [(n, c) for n in SOURCES for c in CHATS if theirs(library, SOURCES[n], CHATS[c]) is not None]
    assert {"qwen2.5", "qwen3", "llama3.1", "mistral"} <= {name for name, chat in rendered if chat == "calls"}
    assert len(rendered) >= 40


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("text", ["It is", "It is ", "<think>\nHm"])
def test_a_last_message_is_continued_as_transformers_continues_it(library: Any, name: str, text: str) -> None:
    messages = [USER, {"role": "assistant", "content": text}]
    expected = theirs(library, SOURCES[name], messages, continue_final_message=True)
    assert expected is not None
    assert ours(SOURCES[name], messages, continue_final_message=True) == expected


@pytest.mark.parametrize(
    "options",
    [{"enable_thinking": False}, {"enable_thinking": True}, {"date_string": "1 Jan", "tools_in_user_message": False}],
)
@pytest.mark.parametrize("name", ["qwen3", "llama3.1"])
def test_the_clients_own_variables_reach_the_template(library: Any, name: str, options: dict[str, Any]) -> None:
    expected = theirs(library, SOURCES[name], [USER], tools=TOOLS, add_generation_prompt=True, **options)
    assert ours(SOURCES[name], [USER], tools=TOOLS, kwargs=options) == expected is not None


def test_documents_reach_the_template(library: Any) -> None:
    source = "{% for d in documents %}[{{ d.title }}]{{ d.text }}{% endfor %}{{ messages[0].content }}"
    documents = [{"title": "T", "text": "x"}]
    expected = theirs(library, source, [USER], documents=documents)
    assert ours(source, [USER], documents=documents) == expected is not None


def test_the_message_to_continue_must_be_there_and_must_be_shown() -> None:
    assert ours(SOURCES["chatml"], [USER], continue_final_message=True) is not None
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", {})
    with pytest.raises(RequestError, match="continue_final_message"):
        template.render([USER], continue_final_message=True)
    with pytest.raises(RequestError, match="content"):
        template.render([USER, {"role": "assistant", "content": None}], continue_final_message=True)


# --- messages --------------------------------------------------------------------------------------------------------


def test_fields_that_clients_send_as_null_are_not_there() -> None:
    sent = {"role": "assistant", "content": "Hi", "tool_calls": None, "function_call": None, "refusal": None}
    assert template_messages([sent]) == [{"role": "assistant", "content": "Hi"}]
    assert template_messages([{"role": "assistant", "content": "Hi", "tool_calls": []}])[0].keys() == {
        "role",
        "content",
    }


def test_refusals_names_and_thoughts_are_kept() -> None:
    [refused, named, parts, thoughts] = template_messages(
        [
            {"role": "assistant", "content": None, "refusal": "No."},
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
            {"role": "assistant", "reasoning": "Hm", "content": None},
        ]
    )
    assert refused["content"] == "No." and named["name"] == "Ann" and parts["content"] == "a\nb"
    assert (thoughts["reasoning_content"], thoughts["content"]) == ("Hm", "")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]},
            "messages[0].content[1]",
        ),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "messages[0].function_call"),
        ({"role": "assistant", "audio": {"id": "1"}}, "messages[0].audio"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "assistant", "tool_calls": 3}, "messages[0].tool_calls"),
    ],
)
def test_a_message_that_cannot_be_taken_is_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        template_messages([message])
    assert caught.value.param == param


def test_calls_have_other_forms_for_templates_that_need_them() -> None:
    messages = template_messages(CHATS["calls"])
    assert "content" not in messages[1], "as transformers has it"
    template = ChatTemplate(SOURCES["deepseek-r1"], {"bos_token": "<|bos|>"})
    objects, texts = other_forms(messages)
    for given in (messages, objects):
        with pytest.raises(RequestError) as caught:
            template.render(given)
        assert isinstance(caught.value.__cause__, TypeError | jinja2.UndefinedError)
    assert objects[1]["content"] is None and objects[3]["content"] == "It is warm."
    assert '```json\n{"city": "Köln"}\n```' in template.render(texts)
    assert list(other_forms(template_messages(CHATS["history"]))) == []


# --- which template --------------------------------------------------------------------------------------------------


def write(folder: Path, template: Any) -> Path:
    return tiny_tokenizer.write(folder, chat_template=template)


def shown(tokenizer: Tokenizer, *, tools: bool) -> str:
    template = tokenizer.templates.pick(tools=tools)
    assert template is not None
    return template.render([USER])


def test_a_template_for_tools_is_used_when_there_are_some(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tokenizer = Tokenizer(write(tmp_path, named))
    assert (shown(tokenizer, tools=False), shown(tokenizer, tools=True)) == ("D", "T")
    (tmp_path / "chat_template.jinja").write_text("F")
    assert shown(Tokenizer(tmp_path), tools=True) == "F"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("A")
    tokenizer = Tokenizer(tmp_path)
    assert (shown(tokenizer, tools=False), shown(tokenizer, tools=True)) == ("F", "A")
    assert shown(Tokenizer(tmp_path, "G"), tools=True) == "G"


def test_formats_follow_from_the_template_unless_a_setting_says_otherwise(tmp_path: Path) -> None:
    def formats(source: str, calls: str = "auto", reasoning: str = "auto") -> tuple[Any, str]:
        found = ChatFormats.of(Tokenizer(tmp_path, source).templates, calls, reasoning)
        return found.calls, found.reasoning

    write(tmp_path, None)
    assert formats(SOURCES["qwen3"]) == (HERMES, "qwen3")
    assert formats(SOURCES["qwen2.5"]) == (HERMES, "")
    assert formats(SOURCES["llama3.1"]) == (LLAMA3, "")
    assert formats(SOURCES["deepseek-r1"]) == (None, "qwen3")
    assert all(formats(SOURCES[name]) == (None, "") for name in ("chatml", "phi3", "phi4", "gemma", "mistral"))
    assert formats(SOURCES["chatml"], "llama3", "deepseek-r1") == (LLAMA3, "deepseek-r1")
    assert formats(SOURCES["qwen3"], "llama3", "none") == (LLAMA3, "")


def test_the_template_of_a_flag_is_a_file_or_the_template_itself(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    for given in (str(file), "{{ messages }}"):
        line = ["/m", "--chat-template", given]
        assert parse(ServeConfig, line, {}).chat.chat_template == "{{ messages }}"
        assert parse(UpConfig, ["--chat-template", given], {}).serve.chat.chat_template == "{{ messages }}"
    (tmp_path / "empty").write_text(" \n")
    for bad in (str(tmp_path / "missing"), str(tmp_path), str(tmp_path / "empty")):
        with pytest.raises(ConfigError) as caught:
            parse(ServeConfig, ["/m", "--chat-template", bad], {})
        assert caught.value.field == "--chat-template"
    with pytest.raises(ConfigError) as caught:
        Tokenizer(write(tmp_path / "model", None), "{% if %}")
    assert caught.value.field == "--chat-template"


def test_the_spellings_of_other_servers_are_understood() -> None:
    def calls(name: str) -> str:
        return parse(ServeConfig, ["/m", "--tool-call-parser", name], {}).chat.tool_call_parser

    assert [calls(name) for name in ("hermes", "qwen", "qwen25", "llama3", "llama3_json")] == ["hermes"] * 3 + [
        "llama3"
    ] * 2
    given = parse(ServeConfig, ["/m", "--reasoning-parser", "deepseek_r1"], {})
    assert given.chat.reasoning_parser == "deepseek-r1"
    with pytest.raises(ConfigError, match="not one of"):
        calls("pythonic")
