"""Reads the prompt out of a body, for policies that want it. Only the needed fields are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` or `token_ids`, or neither where the body has no prompt that could be read."""

    text: str | None = None
    token_ids: list[int] | None = None


class _Message(msgspec.Struct):
    content: Any = None


class _Body(msgspec.Struct):
    """`/v1/completions`: prompt; `/v1/chat/completions`: messages; `/generate`: text or input_ids."""

    prompt: Any = None
    messages: list[_Message] | None = None
    text: Any = None
    input_ids: Any = None


#: What msgspec raises for bytes that are no JSON of the wanted kind; the last one for nesting without end.
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_decoder = msgspec.json.Decoder(_Body)


def read_prompt(body: bytes) -> Prompt:
    """The prompt of a request body. A body that is no such JSON gives an empty one: the worker says what is wrong."""
    try:
        fields = _decoder.decode(body)
    except NOT_JSON:
        return Prompt()
    if fields.messages is not None:
        return Prompt(text="\n".join(_content(message.content) for message in fields.messages))
    for value in (fields.prompt, fields.text, fields.input_ids):
        if value is not None:
            return _prompt(value)
    return Prompt()


def _prompt(value: Any) -> Prompt:
    """One prompt, or the first of a batch: a batch is served by one worker, so one must speak for all."""
    if isinstance(value, str):
        return Prompt(text=value)
    if isinstance(value, list) and value:
        first = value[0]
        if isinstance(first, str):
            return Prompt(text=first)
        ids = first if isinstance(first, list) else value
        if set(map(type, ids)) <= {int}:  # bool is no token
            return Prompt(token_ids=ids)
    return Prompt()


def _content(content: Any) -> str:
    """A message's text: a string, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""
