"""Chat templates as transformers renders them: the same sandbox, filters, globals and block tags, without it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pd.errors import RequestError


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training masks; when serving it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which would change the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


#: As transformers': the space at the end shows whether the template trims.
_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled template. `variables` (bos_token, eos_token, …) are visible to every rendering."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._template = environment.from_string(source)
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """With `continue_final_message` the text ends inside the last message, which the output goes on with.

        Raises RequestError for messages that the template refuses or cannot render.
        """
        if continue_final_message:
            return self._open_ended(messages, tools, documents, kwargs)
        values = {
            **self._variables,
            **(kwargs or {}),
            "tools": tools,
            "documents": documents,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            # Messages come from the client: whatever they make the template do is the client's error.
            raise RequestError(f"the model's chat template refused the messages: {error}", param="messages") from error

    def _open_ended(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> str:
        """A mark at the end of the last message shows where to cut, whatever the template writes after it."""
        content = messages[-1].get("content")
        if not isinstance(content, str):
            raise RequestError("continue_final_message needs a last message with content", param="messages")
        marked = [*messages[:-1], {**messages[-1], "content": content + _END_MARK}]
        text = self.render(marked, add_generation_prompt=False, tools=tools, documents=documents, kwargs=kwargs)
        cut = text.rfind(_END_MARK.strip())
        if cut < 0 or content.strip() not in text:
            raise RequestError(
                "continue_final_message: the chat template does not show the last message as it is", param="messages"
            )
        # A template that trims the content trims the mark's own space, and would trim what is before it.
        return text[:cut] if text.startswith(_END_MARK, cut) else text[:cut].rstrip()


class ChatTemplates:
    """A model's templates: the one for chats, and the one for chats with tools where it has its own."""

    def __init__(self, default: ChatTemplate | None, tool_use: ChatTemplate | None = None) -> None:
        self._default, self._tool_use = default, tool_use

    def pick(self, *, tools: bool) -> ChatTemplate | None:
        return self._tool_use if tools and self._tool_use is not None else self._default

    @property
    def source(self) -> str:
        """Of both, for what they say of the model."""
        return "\n".join(template.source for template in (self._default, self._tool_use) if template is not None)
