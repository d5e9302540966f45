"""Grammars that force calls, held against texts by llguidance's own matcher; and a request's tool fields, checked."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as Library

from pd.api.reasoning import Begins
from pd.api.tools.formats import HERMES, LLAMA3, CallFormat
from pd.api.tools.grammar import after_thoughts, call_constraint, call_grammar
from pd.api.tools.request import ToolWishes, tool_wishes
from pd.errors import RequestError
from pd.testing import tiny_tokenizer

BYTES = LLTokenizer("byte")
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("weather", CITY), tool("now")]


def text_only(text: str) -> int | None:
    return None


def wishes(tools: list[dict[str, Any]] = TOOLS, choice: Any = "required", parallel: bool | None = None) -> ToolWishes:
    found = tool_wishes(tools, choice, parallel)
    assert found is not None
    return found


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def written(format: CallFormat, name: str, arguments: str) -> str:
    body = f'{{"name": "{name}", "{format.arguments_key}": {arguments}}}'
    return f"<tool_call>\n{body}\n</tool_call>" if format is HERMES else body


@pytest.mark.parametrize("format", [HERMES, LLAMA3])
def test_a_forced_output_is_calls_that_fit_their_schemas_and_nothing_else(format: CallFormat) -> None:
    grammar = call_grammar(format, wishes(), text_only)
    weather, now = written(format, "weather", '{"city": "Köln", "days": 3}'), written(format, "now", "{}")
    good = [weather, now, weather + format.separator + now + format.separator + weather]
    bad = [
        "",
        "Hello",
        "x" + now,
        now + "x",
        now[:-1],
        written(format, "then", "{}"),
        written(format, "now", '{"a": 1}'),
        written(format, "weather", '{"days": 3}'),
        written(format, "weather", '{"city": 3}'),
        written(format, "weather", '{"city": "x", "more": 1}'),
    ]
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


@pytest.mark.parametrize("format", [HERMES, LLAMA3])
def test_what_the_grammar_accepts_is_what_the_parser_reads(format: CallFormat) -> None:
    text = written(format, "weather", '{"city": "x"}') + format.separator + written(format, "now", "{}")
    parser = format.parser(wishes().names, eager=False)
    events = [*parser.feed(text), *parser.finish()]
    assert accepts(call_grammar(format, wishes(), text_only), text)
    assert [str(getattr(event, "name", "")) for event in events] == ["weather", "", "now", ""]


def test_one_call_only_where_a_function_is_named_or_calls_are_not_to_be_parallel() -> None:
    now = written(HERMES, "now", "{}")
    single = call_grammar(HERMES, wishes(parallel=False), text_only)
    named = call_grammar(HERMES, wishes(choice={"type": "function", "function": {"name": "now"}}), text_only)
    for grammar in (single, named):
        assert accepts(grammar, now) and not accepts(grammar, now + "\n" + now)
    weather = written(HERMES, "weather", '{"city": "x"}')
    assert accepts(single, weather) and not accepts(named, weather)


def test_without_force_only_strict_functions_make_a_grammar() -> None:
    assert call_grammar(HERMES, wishes(choice="auto"), text_only) == ""
    strict = wishes([tool("weather", CITY, strict=True), tool("now", {})], choice="auto")
    weather, bad = written(HERMES, "weather", '{"city": "x"}'), written(HERMES, "weather", '{"town": "x"}')
    grammar = call_grammar(HERMES, strict, text_only)
    for text in ("", "Hi", "a < b <tool", weather, f"Hm.\n{weather}\nand {written(HERMES, 'now', '{}')} so"):
        assert accepts(grammar, text), text
    for text in (bad, "Hm " + bad, "<tool_call>no", weather + "<tool_call>\n{}"):
        assert not accepts(grammar, text), text
    weather, bad = written(LLAMA3, "weather", '{"city": "x"}'), written(LLAMA3, "weather", '{"town": "x"}')
    grammar = call_grammar(LLAMA3, strict, text_only)
    assert all(accepts(grammar, text) for text in ("", "Hi {}", weather, weather + ";" + weather))
    assert not any(accepts(grammar, text) for text in (bad, "{", weather + "x"))


def test_markup_in_tokens_of_its_own_is_written_as_their_ids() -> None:
    ids = {"<tool_call>": 5, "</tool_call>": 6, "<think>": 7, "</think>": 8, "<|python_tag|>": 9}
    strict = wishes([tool("now", strict=True)], choice="auto")
    for grammar in (
        call_grammar(HERMES, wishes(), ids.get),
        call_grammar(HERMES, strict, ids.get),
        call_grammar(LLAMA3, strict, ids.get),
        after_thoughts(call_grammar(HERMES, wishes(), ids.get), Begins.INSIDE, ids.get),
    ):
        assert LLMatcher.validate_grammar(grammar, None) == ""
        assert "<[" in grammar and '"<tool_call>"' not in grammar and "</think>" not in grammar


@pytest.mark.parametrize("special", [True, False])
def test_with_a_models_own_tokens_the_grammars_accept_what_its_tokenizer_makes_of_calls(special: bool) -> None:
    library = Library.from_str(tiny_tokenizer.byte_level().to_str())
    markup = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    (library.add_special_tokens if special else library.add_tokens)(markup)
    tokenizer = LLTokenizer(library.to_str())

    def accepted(grammar: str, text: str) -> bool:
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        tokens = library.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    now, bad = written(HERMES, "now", "{}"), written(HERMES, "then", "{}")
    forced = call_grammar(HERMES, wishes(), library.token_to_id)
    assert accepted(forced, now + "\n" + now) and not accepted(forced, bad)
    inside = after_thoughts(forced, Begins.INSIDE, library.token_to_id)
    assert accepted(inside, "Hm\n</think>\n\n" + now) and accepted(inside, "<think>Hm</think>" + now)
    perhaps = after_thoughts(forced, Begins.PERHAPS, library.token_to_id)
    assert accepted(perhaps, "<think>\nHm</think>\n\n" + now) and accepted(perhaps, now)
    strict = call_grammar(HERMES, wishes([tool("now", strict=True)], choice="auto"), library.token_to_id)
    assert accepted(strict, "Hi") and accepted(strict, f"Hm. {now} so") and not accepted(strict, "Hm. " + bad)


def test_after_thoughts_the_grammar_holds() -> None:
    now = written(HERMES, "now", "{}")
    calls = call_grammar(HERMES, wishes(), text_only)
    inside = after_thoughts(calls, Begins.INSIDE, text_only)
    assert accepts(inside, "Hm { <tool_call>\n</think>\n\n" + now) and accepts(inside, "<think>\nHm</think>" + now)
    assert not accepts(inside, now) and not accepts(inside, "Hm</think>Hello")
    perhaps = after_thoughts(calls, Begins.PERHAPS, text_only)
    assert accepts(perhaps, "<think>Hm</think>\n\n" + now) and accepts(perhaps, now)
    assert not accepts(perhaps, "Hm</think>" + now) and not accepts(perhaps, "<think>Hm</think>Hello")
    assert after_thoughts(calls, Begins.OUTSIDE, text_only) == calls
    assert after_thoughts("", Begins.INSIDE, text_only) == ""


@pytest.mark.parametrize(
    "grammar",
    [
        LLMatcher.grammar_from_lark('start: "yes" | "no"'),
        LLMatcher.grammar_from_regex("yes|no"),
        LLMatcher.grammar_from_json_schema('{"enum": [1]}'),
    ],
)
def test_any_grammar_may_come_after_thoughts(grammar: str) -> None:
    found = after_thoughts(grammar, Begins.INSIDE, text_only)
    answer = "1" if "enum" in grammar else "yes"
    assert accepts(grammar, answer) and accepts(found, f"Hm</think>\n\n{answer}") and not accepts(found, answer)


# --- requests --------------------------------------------------------------------------------------------------------

DEEP: dict[str, Any] = {}
for _ in range(500):
    DEEP = {"items": DEEP}
UNKNOWN = {"type": "object", "dependentRequired": {}}


@pytest.mark.parametrize(
    ("broken", "param"),
    [
        (tool("f", {"type": "object", "properties": 3}), "parameters"),
        (tool("f", {"type": "string"}), "parameters"),
        (tool("f", {"properties": {"a": {"type": "string", "pattern": "("}}}), "parameters"),
        (tool("f", UNKNOWN, strict=True), "parameters"),
        (tool("f", {"properties": {"a": DEEP}}), "parameters"),
        (tool("f", {"description": "x" * 70000}), "parameters"),
    ],
)
def test_a_schema_that_cannot_be_used_names_its_tool(broken: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        call_grammar(HERMES, wishes([TOOLS[0], broken]), text_only)
    assert caught.value.param == f"tools[1].function.{param}" and caught.value.status == 400
    assert "%json" not in caught.value.message, "the client knows of no grammar"


def test_a_keyword_that_grammars_lack_is_left_to_the_model_unless_the_function_is_strict() -> None:
    grammar = call_grammar(HERMES, wishes([tool("f", UNKNOWN)]), text_only)
    assert accepts(grammar, written(HERMES, "f", '{"a": 1}'))


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ({}, None, "tools"),
        ([3], None, "tools[0]"),
        ([{"type": "web_search"}], None, "tools[0].type"),
        ([{"type": "function"}], None, "tools[0].function"),
        ([tool("")], None, "tools[0].function.name"),
        ([TOOLS[1], tool("f", [])], None, "tools[1].function.parameters"),
        ([tool("f", {}, strict=1)], None, "tools[0].function.strict"),
        ([TOOLS[1], TOOLS[1]], None, "tools[1].function.name"),
        (TOOLS, "always", "tool_choice"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "f"}}, "tool_choice"),
        (None, "required", "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_by_name(tools: Any, choice: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        tool_wishes(tools, choice, None)
    assert caught.value.param == param


def test_no_tools_and_no_choice_are_nothing_to_wish_for() -> None:
    assert tool_wishes(None, None, None) is tool_wishes([], "auto", True) is tool_wishes(TOOLS, "none", None) is None
    found = wishes(choice={"type": "function", "function": {"name": "now"}})
    assert found.forced and found.names == {"now"} and len(found.tools) == 2


def test_equal_wishes_have_one_grammar_and_all_others_their_own() -> None:
    strict = [tool("weather", CITY, strict=True), tool("now")]
    asked = [
        (HERMES, wishes()),
        (LLAMA3, wishes()),
        (HERMES, wishes(parallel=False)),
        (HERMES, wishes(choice={"type": "function", "function": {"name": "now"}})),
        (HERMES, wishes(strict)),
        (HERMES, wishes(strict, "auto")),
        (HERMES, wishes(TOOLS[:1])),
    ]
    keys = [call_constraint(format, wish, text_only).key for format, wish in asked]
    assert len(set(keys)) == len(keys)
    again = call_constraint(HERMES, wishes(), text_only)
    assert again.key == keys[0] and again.make() == call_grammar(HERMES, wishes(), text_only)


def test_a_schema_that_is_too_deep_to_be_told_apart_is_refused_with_its_tools_name() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(1500):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(RequestError) as found:
        call_constraint(HERMES, wishes([tool("deep", deep)]), text_only).make()
    assert found.value.param == "tools[0].function.parameters"
