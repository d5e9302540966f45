"""Grammars, as llguidance takes them, that force calls or keep them to their schemas, and that begin after thoughts."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher

from pd.api.grammar import Constraint
from pd.api.reasoning import CLOSING, OPENING, Begins
from pd.api.tools.formats import CallFormat
from pd.api.tools.request import Function, ToolWishes
from pd.errors import RequestError

#: The id of a text that is a token of its own, None where it is ordinary text: grammars write the two differently.
AddedId = Callable[[str], int | None]

MAX_DEPTH = 64
MAX_SCHEMA = 64 << 10

#: As models write JSON; and no endless white space.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_grammar(format: CallFormat, wishes: ToolWishes, added_id: AddedId) -> str:
    """The grammar that the output must follow; "" where it may be anything.

    A forced call is nothing but calls. Otherwise a function that is `strict` makes every call that is begun a
    well-formed one. Raises RequestError naming the tool whose schema is at fault.
    """
    if not wishes.constrained:
        return ""
    bodies = [_body(format, function, f"tools[{at}].function") for at, function in wishes.callable()]
    rules = [f"body{number}: {body}" for number, body in enumerate(bodies)]
    rules.append("body: " + " | ".join(f"body{number}" for number in range(len(bodies))))
    opening, closing = (_term(text, added_id) for text in (format.opening, format.closing))
    rest = f'"\\n" body "\\n" {closing}' if format.opening else "body"
    if wishes.forced:
        more = f" ({json.dumps(format.separator)} call)*" if wishes.parallel and not wishes.named else ""
        lines = [f"start: call{more}", f"call: {opening} {rest}"]
    elif format.opening:
        lines = _calls_in_text(opening, rest, format.opening, added_id)
    else:
        lines = _calls_instead_of_text(format, rest, added_id)
    return "\n".join([*lines, *rules]) + "\n"


def call_constraint(format: CallFormat, wishes: ToolWishes, added_id: AddedId) -> Constraint:
    """`call_grammar`, to be made once: the same tools come with every turn of a conversation."""
    try:
        asked = msgspec.json.encode((format.name, wishes.choice, wishes.named, wishes.parallel, wishes.functions))
        key = f"tools {asked.decode()}"
    except RecursionError:  # too deep for a grammar, which will name the tool if it is to be called
        key = uuid.uuid4().hex
    return Constraint("tools", key, lambda: call_grammar(format, wishes, added_id))


def _calls_in_text(opening: str, rest: str, markup: str, added_id: AddedId) -> list[str]:
    """Text in which every opening mark begins a call."""
    announced = [f"announced: TEXT {opening}"]
    if added_id(markup) is None:
        announced = [f"announced[lazy]: TEXT {opening}"]
    return ["start: call* text", "text: TEXT", "TEXT: /(.|\\n)*/", f"call: announced {rest}", *announced]


def _calls_instead_of_text(format: CallFormat, rest: str, added_id: AddedId) -> list[str]:
    """An answer that begins with a brace, or that comes to the mark, is calls; any other is text."""
    lines = [f"calls: {rest} ({json.dumps(format.separator)} {rest})*", r"TEXT: /\s*[^{\s](.|\n)*/"]
    if added_id(format.parser.opening) is None:
        return ["start: TEXT? | calls", *lines]
    return [f"start: TEXT? | calls | TEXT? {_term(format.parser.opening, added_id)} calls", *lines]


def _term(text: str, added_id: AddedId) -> str:
    if not text:
        return ""
    token_id = added_id(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _body(format: CallFormat, function: Function, where: str) -> str:
    """The object that names the function and holds its arguments."""
    schema = _checked_schema(function, where)
    name = json.dumps(function.name, ensure_ascii=False)
    head = f'{{"name": {name}, "{format.arguments_key}": '
    return f'{json.dumps(head, ensure_ascii=False)} %json {json.dumps(schema, ensure_ascii=False)} "}}"'


def _checked_schema(function: Function, where: str) -> dict[str, Any]:
    """The arguments' schema. Only a strict function's has to be understood to the last keyword."""
    if function.parameters is None:
        schema: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    else:
        schema = {"type": "object", **function.parameters}
    if schema["type"] != "object":
        problem = f"{where}.parameters: the schema's type must be 'object', got {schema['type']!r}"
        raise RequestError(problem, param=f"{where}.parameters")
    if _deeper(schema, MAX_DEPTH) or len(json.dumps(schema)) > MAX_SCHEMA:
        problem = f"{where}.parameters: at most {MAX_DEPTH} levels and {MAX_SCHEMA} characters can be made a grammar"
        raise RequestError(problem, param=f"{where}.parameters")
    problem = ""
    for lenient in (False,) if function.strict else (False, True):
        tried = {**schema, "x-guidance": {**_SPACING, "lenient": lenient}}
        problem = LLMatcher.validate_grammar("start: %json " + json.dumps(tried), None)
        if not problem:
            return tried
    raise RequestError(f"{where}.parameters is not a usable schema: {_reason(problem)}", param=f"{where}.parameters")


def _deeper(value: Any, levels: int) -> bool:
    """Whether there are more levels; llguidance goes through them by recursion, on the stack of its caller."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(item, levels - 1) for item in inner)


def _reason(problem: str) -> str:
    """llguidance's message without the place in a grammar that the client never sees."""
    return problem.split("failed to compile JSON schema: ", 1)[-1].split("\n   1 | ", 1)[0].strip()


def after_thoughts(grammar: str, begins: Begins, added_id: AddedId) -> str:
    """`grammar` for an output in which it holds after the thoughts only."""
    if not grammar or begins is Begins.OUTSIDE:
        return grammar
    opening, closing = (_term(text, added_id) for text in (OPENING, CLOSING))
    if added_id(CLOSING) is None:
        thoughts = [f"thoughts[suffix={closing}]: ANYTHING"]
    else:
        thoughts = [f"thoughts: ANYTHING {closing}"]
    begun = f"{opening}? thoughts /\\n{{0,2}}/" if begins is Begins.INSIDE else f"({opening} thoughts /\\n{{0,2}}/)?"
    lark = "\n".join([f"start: {begun} @answer", *thoughts, r"ANYTHING: /(.|\n)*/"])
    first, *others = _grammars(grammar)
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**first, "name": "answer"}, *others]}, ensure_ascii=False)


def _grammars(grammar: str) -> list[Mapping[str, Any]]:
    """llguidance takes a list of grammars, as JSON, or one in Lark's syntax."""
    if grammar.lstrip().startswith("{"):
        return json.loads(grammar)["grammars"]
    return [{"lark_grammar": grammar}]
