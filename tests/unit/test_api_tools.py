"""Calls and thoughts told from text: whatever the pieces in which it comes, with nothing lost and no markup shown."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pd.api.output import OutputParser, parse_whole
from pd.api.reasoning import Begins, ReasoningSplitter, begins, parser_for
from pd.api.tools.events import MAX_HELD_SPACE, Arguments, CallBegin, Event, Reasoning, Text, joined
from pd.api.tools.formats import FORMATS, HERMES, LLAMA3, format_for

NAMES = frozenset({"weather", "now"})
WEATHER = '{"city": "Köln \\"x\\" }]", "days": [1, {"a": null}], "f": -1.5e3}'


def hermes(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama3(name: str, arguments: str = "{}") -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def read(pieces: list[str], *, format: str, eager: bool, single: bool = False) -> list[Event]:
    parser = FORMATS[format].parser(NAMES, eager=eager, single=single)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined([*events, *parser.finish()])


def whole(text: str, format: str, **options: Any) -> list[Event]:
    return read([text], format=format, eager=False, **options)


def call(name: str, arguments: str = "{}") -> list[Event]:
    return [CallBegin(name), Arguments(arguments)]


FRAGMENTS = st.one_of(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "<tool_call>\n",
            "\n</tool_call>",
            "<|python_tag|>",
            "<think>",
            "</think>",
            hermes("weather", WEATHER),
            hermes("now"),
            hermes("unknown"),
            llama3("now"),
            llama3("weather", WEATHER),
            '{"name": "now", "arguments": {"a": [}, "b"',
            '{"arguments": {"x": "y"}, "type": "function", "name": "now"}',
            '{"name": "now", "arguments": null, "id": "1"}',
            '{"name": "now", "arguments": {}, "more": 1}',
            '{"name": "Bob"}',
            ";",
            "; ",
        ]
    ),
    st.text(alphabet='<>/{}[]":,\\ \n|atn;', max_size=6),
    st.text(max_size=4),
    st.sampled_from([" " * (MAX_HELD_SPACE + 9), "\n" * 300]),
)
OUTPUTS = st.lists(FRAGMENTS, max_size=7).map("".join)
CUTS = st.lists(st.integers(0, 2000), max_size=30)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=250, deadline=None)
@given(text=OUTPUTS, places=CUTS)
@example(text="a" + hermes("now") + "\n\n" + hermes("weather", WEATHER) + " b", places=list(range(400)))
@example(text=llama3("now") + "; " + llama3("weather", WEATHER), places=list(range(400)))
def test_the_pieces_in_which_an_output_comes_change_nothing(
    format: str, eager: bool, text: str, places: list[int]
) -> None:
    assert read(cut(text, places), format=format, eager=eager) == read([text], format=format, eager=eager)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=250, deadline=None)
@given(text=OUTPUTS)
def test_an_output_without_calls_is_its_own_text(format: str, text: str) -> None:
    events = whole(text, format)
    if not any(isinstance(event, CallBegin) for event in events):
        shown = "".join(event.text for event in events if isinstance(event, Text))
        if format == "llama3":  # a special token, not text
            text, shown = text.replace("<|python_tag|>", ""), shown.replace("<|python_tag|>", "")
            assert "".join(shown.split()) == "".join(text.split())
        else:
            assert shown == text


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=250, deadline=None)
@given(text=OUTPUTS)
def test_what_is_well_formed_is_the_same_in_a_stream(format: str, text: str) -> None:
    """A stream differs only where it gave a call out that turned out malformed."""
    streamed, found = read([text], format=format, eager=True), whole(text, format)
    if all(_is_json(event.text) for event in streamed if isinstance(event, Arguments)) and streamed != found:
        calls = [event for event in streamed if isinstance(event, CallBegin)]
        assert len(calls) > len([event for event in found if isinstance(event, CallBegin)])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


PLAIN = st.text(alphabet="ab c\n.,!ü", max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(PLAIN, min_size=4, max_size=4),
    arguments=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9)), min_size=3, max_size=3),
    places=CUTS,
    eager=st.booleans(),
)
def test_every_call_comes_out_as_it_went_in(
    texts: list[str], arguments: list[dict[str, str]], places: list[int], eager: bool
) -> None:
    written = [json.dumps(value, ensure_ascii=False) for value in arguments]
    text = texts[0] + "".join(hermes("now", a) + t for a, t in zip(written, texts[1:], strict=True))
    events = read(cut(text, places), format="hermes", eager=eager)
    assert [json.loads(e.text) for e in events if isinstance(e, Arguments)] == arguments
    shown = "".join(event.text for event in events if isinstance(event, Text))
    assert "".join(shown.split()) == "".join("".join(texts).split()), "no markup is shown, and no text is lost"


# --- hermes ----------------------------------------------------------------------------------------------------------


def test_text_before_a_call_is_content_without_the_space_between() -> None:
    text = "Let me look.\n\n" + hermes("weather", WEATHER)
    assert whole(text, "hermes") == [Text("Let me look."), *call("weather", WEATHER)]


def test_several_calls_in_one_block_in_several_blocks_and_without_an_end() -> None:
    one, two = '{"name": "now", "arguments": {}}', '{"name": "weather", "arguments": {"a": 1}}'
    expected = [*call("now"), *call("weather", '{"a": 1}')]
    for text in (
        f"<tool_call>{one}\n{two}</tool_call>",
        f"<tool_call>{one}</tool_call>\n<tool_call>{two}</tool_call>\n",
        f"<tool_call>\n{one}\n</tool_call><tool_call>\n{two}",
    ):
        assert whole(text, "hermes") == read([text], format="hermes", eager=True) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a < b and <tool_cal> and <tool_call no",
        "<tool_call>\nnot json\n</tool_call>",
        "<tool_call>\n" + '{"name": "unknown", "arguments": {}}' + "\n</tool_call>",
        '<tool_call>{"name": "now"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": 01}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": "\n"}}</tool_call>',
        '<tool_call>{"name": "now", "name": "now", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"unfinished": "',
        '<tool_call>{"name": "now", "arguments": ' + '{"a": ' * 200 + "1" + "}" * 201,
        "<tool_call>",
        "<tool_call>  ",
    ],
)
def test_what_only_resembles_a_call_is_content(text: str) -> None:
    assert whole(text, "hermes") == [Text(text)]


def test_a_call_after_a_malformed_one_is_found() -> None:
    bad = '<tool_call>{"name": "now", "arguments": {"a": [}</tool_call>'
    assert whole(bad + "\n" + hermes("now"), "hermes") == [Text(bad), *call("now")]


def test_a_stream_gives_arguments_out_as_they_come() -> None:
    parser = HERMES.parser(NAMES, eager=True)
    pieces = [
        "Hm",
        " <tool",
        '_call>\n{"name": "weath',
        'er", "argum',
        'ents": {"ci',
        'ty": "a',
        '"}}',
        "\n</tool_call>",
    ]
    assert [parser.feed(piece) for piece in pieces] == [
        [Text("Hm")],
        [],
        [],
        [],
        [CallBegin("weather"), Arguments('{"ci')],
        [Arguments('ty": "a')],
        [Arguments('"}')],
        [],
    ]
    assert parser.finish() == []


def test_a_stream_shows_text_that_turns_out_to_be_no_call_at_once() -> None:
    parser = HERMES.parser(NAMES, eager=True)
    assert parser.feed("<tool_call>\n{") == []
    assert parser.feed('"nam') == []
    assert parser.feed('ed": ') == [Text('<tool_call>\n{"named":')]
    assert parser.feed("more") == [Text(" more")]


def test_in_a_stream_a_call_that_turns_out_malformed_keeps_its_rest_as_arguments() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": True}}\n</tool_call> end'
    events = read([text], format="hermes", eager=True)
    assert events == [CallBegin("now"), Arguments('{"a": True}}'), Text(" end")]
    assert whole(text, "hermes") == [Text(text)]


def test_without_parallel_calls_the_first_is_the_only_one() -> None:
    text = "a" + hermes("now") + hermes("weather") + "b"
    for eager in (True, False):
        assert read([text], format="hermes", eager=eager, single=True) == [Text("a"), *call("now"), Text("b")]


# --- llama3 ----------------------------------------------------------------------------------------------------------


def test_llama_writes_calls_with_and_without_its_tag_and_several_with_semicolons() -> None:
    for text, expected in (
        (llama3("now"), call("now")),
        ("\n " + llama3("weather", WEATHER), call("weather", WEATHER)),
        ("<|python_tag|>" + llama3("now"), call("now")),
        ("Sure. <|python_tag|> " + llama3("now"), [Text("Sure."), *call("now")]),
        (llama3("now") + "; " + llama3("weather") + ";\n", [*call("now"), *call("weather")]),
        (llama3("now") + "\n" + llama3("now"), [*call("now"), *call("now")]),
        ('{"type": "function", "name": "now", "parameters": {}}', call("now")),
        ('{"parameters": {"a": 1}, "name": "now"}', call("now", '{"a": 1}')),
    ):
        assert whole(text, "llama3") == read([text], format="llama3", eager=True) == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Bob", "age": 3}',
        '{"name": "now"}',
        '{"name": "unknown", "parameters": {}}',
        "{}",
        "{",
        "  Hello {" + llama3("now"),
        "  ",
    ],
)
def test_an_answer_in_json_that_is_no_call_is_content(text: str) -> None:
    assert whole(text, "llama3") == read([text], format="llama3", eager=True) == [Text(text)]


def test_code_after_the_tag_is_content_without_it() -> None:
    assert whole('<|python_tag|>print("x")', "llama3") == [Text('print("x")')]


# --- which format ----------------------------------------------------------------------------------------------------


def test_the_format_is_the_one_that_the_template_teaches() -> None:
    assert format_for('<tool_call>\n{\\"name\\": 1, \\"arguments\\": 2}') is HERMES
    assert format_for("role == 'ipython' … \\\"parameters\\\": ") is LLAMA3
    assert format_for('<|python_tag|>{"name"') is LLAMA3
    assert format_for("<tool_call><function=x> arguments") is None
    assert format_for("{{ messages }}") is None


# --- thoughts --------------------------------------------------------------------------------------------------------


def split(pieces: list[str], begins: Begins, **options: Any) -> list[Event]:
    splitter = ReasoningSplitter(begins, **options)
    return joined([*(event for piece in pieces for event in splitter.feed(piece)), *splitter.finish()])


@pytest.mark.parametrize("how", Begins)
@pytest.mark.parametrize("verbatim", [True, False])
@settings(max_examples=200, deadline=None)
@given(text=OUTPUTS, places=CUTS)
@example(text="\n<think>\nHm\n</think>\n\nYes", places=list(range(40)))
def test_thoughts_are_the_same_whatever_the_pieces(how: Begins, verbatim: bool, text: str, places: list[int]) -> None:
    events = split(cut(text, places), how, verbatim=verbatim)
    assert events == split([text], how, verbatim=verbatim)
    shown = "".join(event.text for event in events if isinstance(event, Text | Reasoning))
    if verbatim:
        assert shown == text
    else:
        bare = [t.replace("<think>", "").replace("</think>", "") for t in (shown, text)]
        assert "".join(bare[0].split()) == "".join(bare[1].split())


def test_thoughts_and_answer_without_marks_and_the_space_around_them() -> None:
    expected = [Reasoning("Hm, <b>\nso"), Text("Yes")]
    assert split(["<think>\nHm, <b>\nso\n</think>\n\nYes"], Begins.PERHAPS) == expected
    assert split(["\nHm, <b>\nso\n</think>\n\nYes"], Begins.INSIDE) == expected
    assert split(["<think>Hm, <b>\nso</think>Yes"], Begins.INSIDE) == expected
    assert split(["Yes <think>no</think>"], Begins.PERHAPS) == [Text("Yes <think>no</think>")]
    assert split(["</think>x"], Begins.INSIDE) == [Text("x")]
    assert split(["still thinking"], Begins.INSIDE) == [Reasoning("still thinking")]


def test_how_an_output_begins_is_known_from_parser_and_prompt() -> None:
    assert begins("", "<think>\n") is Begins.OUTSIDE
    assert begins("qwen3", "<|assistant|>\n<think>\n") is Begins.INSIDE
    assert begins("qwen3", "<|assistant|>\n") is Begins.PERHAPS
    assert begins("qwen3", "<|assistant|>\n<think>\n\n</think>\n\n") is Begins.OUTSIDE
    assert begins("deepseek-r1", "<|assistant|>\n") is Begins.INSIDE
    assert begins("qwen3", "…", "<think>\nSo") is Begins.INSIDE
    assert begins("qwen3", "…", "<think>\nSo</think>Yes") is Begins.OUTSIDE
    assert parser_for("…</think>…") == "qwen3" and parser_for("…") == ""


# --- together --------------------------------------------------------------------------------------------------------

THINKING = "<think>\nI could <tool_call>.\n</think>\n\nLooking.\n" + hermes("now")


def test_calls_are_looked_for_after_the_thoughts() -> None:
    message = parse_whole(OutputParser(Begins.PERHAPS, HERMES.parser(NAMES, eager=False)), THINKING)
    assert (message.reasoning, message.content) == ("I could <tool_call>.", "Looking.")
    assert message.calls is not None and [c.name for c in message.calls] == ["now"]


def test_thoughts_that_are_not_separated_stay_in_the_content_as_they_are() -> None:
    parser = OutputParser(Begins.PERHAPS, HERMES.parser(NAMES, eager=False), separate=False)
    message = parse_whole(parser, THINKING)
    assert message.content == "<think>\nI could <tool_call>.\n</think>\n\nLooking."
    assert message.calls is not None and not message.reasoning


def test_thoughts_that_are_not_streamed_come_once_when_they_are_over() -> None:
    parser = OutputParser(Begins.INSIDE, None, stream_reasoning=False)
    assert [parser.feed(piece) for piece in ("Hm", ", so", "</think>", "Yes", "!")] == [
        [],
        [],
        [],
        [Reasoning("Hm, so"), Text("Yes")],
        [Text("!")],
    ]
    parser = OutputParser(Begins.INSIDE, None, stream_reasoning=False)
    assert parser.feed("Hm") == [] and parser.finish() == [Reasoning("Hm")]


@settings(max_examples=150, deadline=None)
@given(text=OUTPUTS, places=CUTS, separate=st.booleans(), streamed=st.booleans(), how=st.sampled_from(Begins))
def test_the_pieces_change_nothing_with_thoughts_and_calls(
    text: str, places: list[int], separate: bool, streamed: bool, how: Begins
) -> None:
    def run(pieces: list[str]) -> list[Event]:
        calls = HERMES.parser(NAMES, eager=True)
        parser = OutputParser(how, calls, separate=separate, stream_reasoning=streamed)
        return joined([*(event for piece in pieces for event in parser.feed(piece)), *parser.finish()])

    assert run(cut(text, places)) == run([text])
