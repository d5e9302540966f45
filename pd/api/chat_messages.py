"""Chat messages as clients send them, checked and brought into the form that templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pd.errors import RequestError


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content a string, tool-call arguments objects."""
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    found = []
    for at, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{at}].role must be a string", param=f"messages[{at}].role")
        plain = dict(message)
        plain["content"] = _content(message.get("content"), f"messages[{at}].content")
        if plain["content"] is None and not message.get("tool_calls"):
            raise RequestError(f"messages[{at}].content is missing", param=f"messages[{at}].content")
        if message.get("tool_calls"):
            plain["tool_calls"] = _tool_calls(message["tool_calls"], f"messages[{at}].tool_calls")
        found.append(plain)
    return found


def _content(content: Any, name: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{name} must be a string or a list of parts", param=name)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in ("text", "input_text") else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(f"{name}: only text parts are supported, got {kind!r}", param=name)
        texts.append(text)
    return "\n".join(texts)


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
