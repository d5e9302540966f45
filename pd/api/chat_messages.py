"""Chat messages as clients send them, checked and brought into the form that templates expect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from pd.errors import RequestError

#: The names that clients give to an assistant's earlier thoughts; templates read the first or the second.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content a string, tool-call arguments objects."""
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    return [_template_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _template_message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{name}.role must be a string", param=f"{name}.role")
    if role == "function":
        raise RequestError(
            f"{name}.role: function messages are not supported: use the role 'tool'",
            param=f"{name}.role",
            code="unsupported_parameter",
        )
    for field, instead in (("function_call", ": use tool_calls"), ("audio", "")):
        if message.get(field) is not None:
            problem = f"{name}.{field} is not supported{instead}"
            raise RequestError(problem, param=f"{name}.{field}", code="unsupported_parameter")
    # Clients send fields that they do not use as null; templates ask whether a field is there.
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = _content(message.get("content"), f"{name}.content")
    if plain["content"] is None and isinstance(message.get("refusal"), str):
        plain["content"] = message["refusal"]
    thoughts = next((message[key] for key in _THOUGHTS if message.get(key) is not None), None)
    if thoughts is not None:
        plain = {"thinking": thoughts, **plain, "reasoning_content": thoughts}
    if message.get("tool_calls"):
        plain["tool_calls"] = _tool_calls(message["tool_calls"], f"{name}.tool_calls")
        if plain["content"] is None:
            del plain["content"]
        return plain
    plain.pop("tool_calls", None)
    if plain["content"] is None and thoughts is None:
        raise RequestError(f"{name}.content is missing", param=f"{name}.content")
    if plain["content"] is None:
        plain["content"] = ""
    return plain


def other_forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Messages with calls once more, for templates that cannot render them in the form that most expect: content that
    is not there is none, and then arguments are JSON text, which some templates add to other text.
    """
    if any("tool_calls" in message for message in messages):
        yield [{"content": None, **message} for message in messages]
        yield [{"content": None, **message, **_with_json_arguments(message)} for message in messages]


def _with_json_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = json.dumps(call["function"].get("arguments"), ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {"tool_calls": calls} if calls else {}


def _content(content: Any, name: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{name} must be a string or a list of parts", param=name)
    return "\n".join([_part(part, f"{name}[{at}]") for at, part in enumerate(content)])


def _part(part: Any, name: str) -> str:
    """The text of one part."""
    if not isinstance(part, dict):
        raise RequestError(f"{name} must be an object", param=name)
    kind = part.get("type")
    if kind not in ("text", "input_text", "refusal"):
        raise RequestError(f"{name}: only text parts are supported, got {kind!r}", param=name)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise RequestError(f"{name}.text must be a string", param=name)
    return text


def _tool_calls(calls: Any, name: str) -> list[Any]:
    """Earlier tool calls are history. Their arguments come as JSON text; templates index into them."""
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not (isinstance(call, dict) and isinstance(function, dict)):
            raise RequestError(f"{name} must be a list of function calls", param=name)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments or "{}")
            except msgspec.DecodeError as error:
                raise RequestError(f"{name}: arguments are not valid JSON: {error}", param=name) from error
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found
