"""From EBNF, as xgrammar, SGLang and vLLM take it (llama.cpp's GBNF is much the same), to llguidance's Lark.

    root ::= "yes" | "no" reason?
    reason ::= ", because " [a-z ]{1,40}

Rules that do not recurse become terminals, which llguidance matches as one regular expression.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TypeAlias

#: Parentheses within parentheses: each is a Python call.
MAX_DEPTH = 100

_TOKEN = re.compile(
    r"""
      (?P<space>\s+|\#[^\n]*)
    | (?P<defines>::=)
    | (?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)
    | (?P<text>"(?:[^"\\\n]|\\.)*")
    | (?P<chars>\[(?:[^\]\\]|\\.)*\])
    | (?P<repeat>\{\s*[0-9]+\s*(?:,\s*[0-9]*\s*)?\})
    | (?P<mark>\(=|[|()*+?.])
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|([^\\])", re.DOTALL)
_NAMED_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
_MACROS = {"TagDispatch", "TokenTagDispatch"}


class EbnfError(ValueError):
    """The text is not a grammar, or uses what is not supported. The message names the line."""


@dataclass(frozen=True)
class _Lark:
    """A string or character class, already in Lark's syntax."""

    source: str


@dataclass(frozen=True)
class _Ref:
    name: str
    line: int


@dataclass(frozen=True)
class _Repeat:
    node: _Node
    count: str


@dataclass(frozen=True)
class _Sequence:
    nodes: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    nodes: tuple[_Node, ...]


_Node: TypeAlias = _Lark | _Ref | _Repeat | _Sequence | _Choice


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def ebnf_to_lark(text: str) -> str:
    """The same language in Lark. Raises EbnfError."""
    rules = _Parser(_tokens(text)).rules()
    if "root" not in rules:
        raise EbnfError("there is no rule named root")
    references = {name: _references(body) for name, body in rules.items()}
    for found in references.values():
        for ref in found:
            if ref.name not in rules:
                raise EbnfError(f"line {ref.line}: there is no rule named {ref.name}")
    terminals = _terminals({name: {ref.name for ref in found} for name, found in references.items()})
    names = {name: f"{'T' if name in terminals else 'r'}{index}" for index, name in enumerate(rules)}
    lines = [f"{names[name]}: {_emit(body, names)}" for name, body in rules.items()]
    return "\n".join([f"start: {names['root']}", *lines, ""])


def _tokens(text: str) -> list[_Token]:
    tokens, at, line = [], 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise EbnfError(f"line {line}: not understood from {text[at : at + 20]!r} on")
        assert match.lastgroup is not None
        if match.lastgroup != "space":
            tokens.append(_Token(match.lastgroup, match.group(), line))
        line += match.group().count("\n")
        at = match.end()
    return [*tokens, _Token("end", "the end", line)]


class _Parser:
    """Recursive descent. A rule ends where the next one's name is followed by ::=."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens, self._at, self._depth = tokens, 0, 0

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def rules(self) -> dict[str, _Node]:
        found: dict[str, _Node] = {}
        while self._next.kind != "end":
            name = self._next
            if not self._defines():
                raise self._error("a rule, NAME ::= …, is expected")
            if name.text in found:
                raise EbnfError(f"line {name.line}: the rule {name.text} is defined twice")
            self._at += 2
            found[name.text] = self._choice()
        return found

    def _defines(self) -> bool:
        return self._next.kind == "name" and self._tokens[self._at + 1].kind == "defines"

    def _error(self, problem: str) -> EbnfError:
        return EbnfError(f"line {self._next.line}: {problem}, got {self._next.text}")

    def _choice(self) -> _Node:
        nodes = [self._sequence()]
        while self._next.text == "|":
            self._at += 1
            nodes.append(self._sequence())
        return nodes[0] if len(nodes) == 1 else _Choice(tuple(nodes))

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        while self._next.kind in ("name", "text", "chars") or self._next.text in ("(", ".", "(="):
            if self._defines():
                break
            nodes.append(self._repeated(self._item()))
        return nodes[0] if len(nodes) == 1 else _Sequence(tuple(nodes))

    def _item(self) -> _Node:
        token = self._next
        if token.text == "(=":
            raise EbnfError(f"line {token.line}: lookahead, (= …), is not supported")
        self._at += 1
        if token.kind == "text":
            return _Lark(json.dumps("".join(_characters(token.text[1:-1], token.line)), ensure_ascii=False))
        if token.kind == "chars":
            return _Lark(_character_class(token))
        if token.kind == "name":
            if token.text in _MACROS:
                raise EbnfError(f"line {token.line}: {token.text} is not supported")
            return _Ref(token.text, token.line)
        if token.text == ".":
            return _Lark("/(?s:.)/")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise EbnfError(f"line {token.line}: more than {MAX_DEPTH} parentheses within each other")
        inside = self._choice()
        if self._next.text != ")":
            raise self._error(") is expected")
        self._at += 1
        self._depth -= 1
        return inside

    def _repeated(self, node: _Node) -> _Node:
        token = self._next
        if token.text in ("*", "+", "?"):
            self._at += 1
            return _Repeat(node, token.text)
        if token.kind == "repeat":
            self._at += 1
            low, comma, high = "".join(token.text[1:-1].split()).partition(",")
            if high and int(high) < int(low):
                raise EbnfError(f"line {token.line}: {token.text} ends below its beginning")
            return _Repeat(node, f"{{{low}{comma}{high}}}")
        return node


def _characters(text: str, line: int) -> list[str]:
    """With escapes resolved."""
    found = []
    for byte, short, long, letter, plain in _ESCAPE.findall(text):
        code = byte or short or long
        if code:
            value = int(code, 16)
            if value > 0x10FFFF or 0xD800 <= value < 0xE000:
                raise EbnfError(f"line {line}: {code} is not a character's number")
            found.append(chr(value))
        elif letter.isalnum():
            if letter not in _NAMED_ESCAPES:
                raise EbnfError(f"line {line}: the escape \\{letter} is not known")
            found.append(_NAMED_ESCAPES[letter])
        else:
            found.append(letter or plain)
    return found


def _character_class(token: _Token) -> str:
    """[a-z] as a regular expression in which no character has a meaning of its own."""
    text = token.text[1:-1]
    negated = text.startswith("^")
    raw = [match.group() for match in _ESCAPE.finditer(text[1:] if negated else text)]
    values = [ord("".join(_characters(one, token.line))) for one in raw]
    if not values:
        raise EbnfError(f"line {token.line}: {token.text} has no character")
    parts, at = [], 0
    while at < len(values):
        if at + 2 < len(values) and raw[at + 1] == "-":
            low, high = values[at], values[at + 2]
            if high < low:
                raise EbnfError(f"line {token.line}: {raw[at]}-{raw[at + 2]} ends below its beginning")
            parts.append(rf"\x{{{low:x}}}-\x{{{high:x}}}")
            at += 3
        else:
            parts.append(rf"\x{{{values[at]:x}}}")
            at += 1
    return f"/[{'^' if negated else ''}{''.join(parts)}]/"


def _references(node: _Node) -> list[_Ref]:
    if isinstance(node, _Ref):
        return [node]
    if isinstance(node, _Repeat):
        return _references(node.node)
    if isinstance(node, _Sequence | _Choice):
        return [ref for one in node.nodes for ref in _references(one)]
    return []


def _terminals(references: dict[str, set[str]]) -> set[str]:
    """The rules from which no way leads back to a rule that refers to itself."""
    open_references = {name: len(found) for name, found in references.items()}
    users = defaultdict(list)
    for name, found in references.items():
        for other in found:
            users[other].append(name)
    closed = [name for name, count in open_references.items() if not count]
    for name in closed:  # grows as it goes
        for user in users[name]:
            open_references[user] -= 1
            if not open_references[user]:
                closed.append(user)
    return set(closed)


def _emit(node: _Node, names: dict[str, str], *, inside: bool = False) -> str:
    """`inside`: as one item of something else."""
    if isinstance(node, _Lark):
        return node.source
    if isinstance(node, _Ref):
        return names[node.name]
    if isinstance(node, _Repeat):
        return _emit(node.node, names, inside=True) + node.count
    if isinstance(node, _Sequence):
        source = " ".join(_emit(one, names, inside=True) for one in node.nodes) or '""'
    else:
        source = " | ".join(_emit(one, names) for one in node.nodes)
    return f"({source})" if inside and len(node.nodes) != 0 else source
