"""Structured output: what a request asks for becomes a grammar as llguidance takes it, checked before anything runs.

    grammar = from_json_schema({"type": "object"}, "response_format.json_schema.schema")
    SamplingParams(grammar=grammar)

Each `from_…` raises RequestError 400 that names the field, `param`, and says what is wrong. What a grammar would
silently leave out of what the client wrote is such an error, too. Checking takes a millisecond for a usual schema and a
tenth of a second for the largest one; `Grammars` does it off the event loop.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from llguidance import LLMatcher

from pd.api.ebnf import EbnfError, ebnf_to_lark
from pd.errors import RequestError
from pd.stacks import call_deep

#: Bytes of the longest schema, pattern or grammar.
MAX_GRAMMAR = 256 << 10
#: EBNF is translated in Python.
MAX_EBNF = 64 << 10
#: Rules that refer to each other in one long chain take time that grows with its square.
MAX_LINES = 2000
#: Grammars that `Grammars` remembers, and the bytes of all of them.
REMEMBERED = 256
REMEMBERED_BYTES = 4 << 20
#: A schema within a schema within a schema …
MAX_DEPTH = 200

_LARK = re.compile(r"(?m)^\s*(%llguidance\b|start\s*:(?!:=))")

#: Keywords that say what is valid, which llguidance passes over without a word, and what to write instead.
_PASSED_OVER = {
    "divisibleBy": "use multipleOf",
    "extends": "use allOf",
    "disallow": "",
    "nullable": 'use "type": [..., "null"]',
    "contentEncoding": "",
    "contentMediaType": "",
    "contentSchema": "",
}
#: Where a schema holds others: as values of an object, in a list, or as it is.
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")


#: Between two tokens of JSON: a blank, or a line's end and what the next one is indented by.
WHITESPACE = r"( |\r?\n[ \t]{0,40})?"


@dataclass(frozen=True)
class JsonLayout:
    """How JSON may be laid out. `whitespace` False: not at all; `pattern`: what may stand between tokens.

    The default is bounded: a small model would go on with blanks until its last token.
    """

    whitespace: bool = True
    pattern: str = WHITESPACE

    def overrides(self) -> dict[str, Any]:
        found: dict[str, Any] = {"lenient": False}
        if not self.whitespace:
            found["whitespace_flexible"] = False
        else:
            found["whitespace_pattern"] = self.pattern
        return found


def from_json_schema(schema: Any, param: str, layout: JsonLayout | None = None) -> str:
    """`schema` is a JSON Schema, or the text of one."""
    try:
        if isinstance(schema, str):
            schema = msgspec.json.decode(_text(schema, param))
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise _bad(param, "must be a JSON Schema: an object")
        _refuse_passed_over(schema, param)
        text = _text(json.dumps(schema, ensure_ascii=False), param)
        overrides: Any = (layout or JsonLayout()).overrides()
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=overrides)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise _bad(param, f"is not a JSON Schema: {error}") from error
    return _checked(grammar, param)


def from_regex(pattern: str, param: str) -> str:
    """The whole output matches. Rust's syntax: no look-around, no back-references."""
    return _checked(LLMatcher.grammar_from_regex(_text(pattern, param)), param)


def from_lark(source: str, param: str) -> str:
    """llguidance's own variety of Lark."""
    lines = _text(source, param).count("\n") + 1
    if source.lstrip().startswith("{"):  # llguidance's other syntax
        raise _bad(param, "must be rules, NAME: …")
    if lines > MAX_LINES:
        raise _bad(param, f"must have at most {MAX_LINES} lines, got {lines}")
    return _checked(source, param)


def from_ebnf(source: str, param: str) -> str:
    """EBNF with a rule `root`, as xgrammar takes it, or Lark with a rule `start`."""
    if _LARK.search(_text(source, param)):
        return from_lark(source, param)
    _bound(source, param, MAX_EBNF)
    try:
        return from_lark(ebnf_to_lark(source), param)
    except EbnfError as error:
        raise _bad(param, f"is not a grammar: {error}") from error


def json_object(layout: JsonLayout | None = None) -> str:
    """Any JSON object."""
    return from_json_schema({"type": "object"}, "", layout)


def choice(options: list[str], param: str) -> str:
    """One of these texts."""
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise _bad(param, "must be a list of one string or more")
    return from_lark("start: " + " | ".join(json.dumps(o, ensure_ascii=False) for o in options), param)


def _bad(param: str, problem: str) -> RequestError:
    return RequestError(f"{param} {problem}", param=param, code="invalid_grammar")


def _bound(text: str, param: str, most: int = MAX_GRAMMAR) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _bad(param, "has half a surrogate pair") from error
    if size > most:
        raise _bad(param, f"must have at most {most} bytes, got {size}")


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise _bad(param, f"must be a string, got {type(value).__name__}")
    _bound(value, param)
    return value


def _checked(grammar: str, param: str) -> str:
    """The grammar itself. A warning is something left out, and so an error.

    Except that special tokens, <|name|> or <[5]>, are left for the runner to find, which has the tokenizer.
    """
    is_error, messages = call_deep(lambda: LLMatcher.validate_grammar_with_warnings(grammar))
    if not is_error:
        messages = [message for message in messages if not message.startswith("no tokenizer")]
    if messages:
        raise _bad(param, f"cannot be used: {messages[0].strip()}")
    return grammar


def _refuse_passed_over(schema: Any, where: str) -> None:
    pending = [(schema, where, 0)]
    while pending:
        one, path, depth = pending.pop()
        if not isinstance(one, dict):
            continue
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} schemas within each other")
        for name, remedy in _PASSED_OVER.items():
            if name in one:
                raise _bad(path, f"has {name}, which is not supported" + (f": {remedy}" if remedy else ""))
        for name in _MAPS:
            if isinstance(one.get(name), dict):
                pending += [(value, f"{path}.{name}.{key}", depth + 1) for key, value in one[name].items()]
        for name in _LISTS:
            if isinstance(one.get(name), list):
                pending += [(value, f"{path}.{name}[{at}]", depth + 1) for at, value in enumerate(one[name])]
        for name in _SINGLE:
            pending.append((one.get(name), f"{path}.{name}", depth + 1))


# --- the fields that ask for it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constraint:
    """A field that constrains the output. `key` is the same for the same grammar; `make` checks it."""

    param: str
    key: str
    make: Callable[[], str]


def constraint_of(fields: msgspec.Struct, prefix: str = "") -> Constraint | None:
    """What a request's fields ask for, under any client's name for it; None where the output is free.

    RequestError for more than one constraint, naming them, and for what is not supported.
    """
    given = {name: getattr(fields, name) for name in fields.__struct_fields__}
    found = list(_constraints(given, prefix))
    if len(found) > 1:
        both = " and ".join(one.param for one in found)
        raise RequestError(f"{both} both constrain the output: give one of them", param=found[1].param)
    return found[0] if found else None


#: Field -> what makes a grammar of its value, of fields that hold one kind of constraint.
_PLAIN: dict[str, Callable[[Any, str], str]] = {
    "json_schema": from_json_schema,
    "regex": from_regex,
    "ebnf": from_ebnf,
    "guided_regex": from_regex,
    "guided_choice": choice,
    "guided_grammar": from_ebnf,
}


def _constraints(given: Mapping[str, Any], prefix: str) -> Iterator[Constraint]:
    for name, make in _PLAIN.items():
        if not _empty(value := given.get(name)):
            yield _constraint(prefix + name, value, make)
    layout = JsonLayout(pattern=given.get("guided_whitespace_pattern") or WHITESPACE)
    if not _empty(value := given.get("guided_json")):
        yield _constraint(f"{prefix}guided_json", value, from_json_schema, layout)
    if given.get("response_format") is not None:
        yield from _response_format(given["response_format"], f"{prefix}response_format")
    if given.get("structured_outputs") is not None:
        yield from _structured_outputs(given["structured_outputs"], f"{prefix}structured_outputs")


def _constraint(param: str, value: Any, make: Callable[..., str], layout: JsonLayout | None = None) -> Constraint:
    try:
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    except RecursionError as error:
        raise _bad(param, "is too deep") from error
    _bound(text, param)
    key = f"{make.__name__} {layout} {text}"
    extra = () if layout is None else (layout,)
    return Constraint(param, key, lambda: make(value, param, *extra))


def _empty(value: Any) -> bool:
    """As clients that always send a field send it when they do not mean it."""
    return value is None or value == "" or value == []


def _response_format(value: Any, param: str) -> Iterator[Constraint]:
    """OpenAI's. A schema is held to whether `strict` or not."""
    if not isinstance(value, dict):
        raise RequestError(f"{param} must be an object with a type", param=param)
    kind = value.get("type")
    if kind == "json_object":
        yield Constraint(param, "json_object", json_object)
    elif kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if schema is None:
            raise RequestError(f"{param}.json_schema.schema is missing", param=f"{param}.json_schema.schema")
        yield _constraint(f"{param}.json_schema.schema", schema, from_json_schema)
    elif kind == "structural_tag":
        raise _unsupported(f"{param}.type structural_tag", param)
    elif kind != "text":
        raise RequestError(f"{param}.type must be text, json_object or json_schema, got {kind!r}", param=param)


#: Keys of `structured_outputs` that choose a backend or its caches, which there is only one of here.
_NO_EFFECT = {"disable_fallback", "_backend", "_backend_was_auto"}


def _structured_outputs(value: Any, param: str) -> Iterator[Constraint]:
    """vLLM's."""
    if not isinstance(value, dict):
        raise RequestError(f"{param} must be an object", param=param)
    pattern = value.get("whitespace_pattern") or WHITESPACE
    if not isinstance(pattern, str):
        raise RequestError(f"{param}.whitespace_pattern must be a string", param=f"{param}.whitespace_pattern")
    layout = JsonLayout(not value.get("disable_any_whitespace"), pattern)
    makers: dict[str, Callable[[Any, str], str]] = {"regex": from_regex, "choice": choice, "grammar": from_ebnf}
    for name, inner in value.items():
        where = f"{param}.{name}"
        if _empty(inner) or inner is False or name in _NO_EFFECT:
            continue
        if name == "json":
            yield _constraint(where, inner, from_json_schema, layout)
        elif name == "json_object":
            yield Constraint(where, f"json_object {layout}", lambda: json_object(layout))
        elif name in makers:
            yield _constraint(where, inner, makers[name])
        elif name not in ("disable_any_whitespace", "whitespace_pattern"):
            raise _unsupported(where, where)


def _unsupported(what: str, param: str) -> RequestError:
    return RequestError(f"{what} is not supported", param=param, code="unsupported_parameter")


class Grammars:
    """Checks what requests ask for in a thread, and remembers what was good: most requests repeat a schema."""

    def __init__(self) -> None:
        self._good: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0

    async def of(self, fields: msgspec.Struct, prefix: str = "") -> str:
        """The grammar for `SamplingParams.grammar`; "" where the output is free. RequestError 400."""
        constraint = constraint_of(fields, prefix)
        return "" if constraint is None else await self.make(constraint)

    async def make(self, constraint: Constraint) -> str:
        """As `constraint.make`, without holding up the event loop."""
        known = self._good.get(constraint.key)
        if known is not None:
            self._good.move_to_end(constraint.key)
            return known
        grammar = await asyncio.to_thread(constraint.make)
        if constraint.key not in self._good:
            self._good[constraint.key] = grammar
            self._bytes += len(constraint.key) + len(grammar)
        while self._bytes > REMEMBERED_BYTES or len(self._good) > REMEMBERED:
            key, dropped = self._good.popitem(last=False)
            self._bytes -= len(key) + len(dropped)
        return grammar
