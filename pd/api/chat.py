"""OpenAI's /v1/chat/completions: request, checks, answers."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from functools import cached_property
from typing import Any

import jinja2
import msgspec

from pd.api.chat_messages import other_forms, template_messages
from pd.api.chat_template import ChatTemplate
from pd.api.context import Context, PromptBuilder, named_prefills
from pd.api.exchange import Choice, Exchange, Prompt
from pd.api.http import Http
from pd.api.logprobs import chat
from pd.api.openai import (
    OpenAIPlan,
    OpenAIRequest,
    check_shared,
    check_top_logprobs,
    prompt_logprobs_wanted,
    resolve_wishes,
    truncated,
)
from pd.api.output import Call, OutputParser, parse_whole
from pd.api.params import Wishes
from pd.api.reasoning import CLOSING, OPENING, Begins, begins
from pd.api.sse import encode
from pd.api.tools.events import Arguments, CallBegin, Event, Reasoning
from pd.api.tools.formats import LLAMA3, CallFormat
from pd.api.tools.grammar import after_thoughts, call_constraint
from pd.api.tools.request import ToolWishes, tool_wishes
from pd.errors import RequestError
from pd.types import FinishReason


class ChatRequest(OpenAIRequest, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    # Known, not built: see pd.api.params.
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    chat_template: Any = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an output of one request consists of: how it begins, in which format calls are, and what is shown how."""

    begins: Begins
    thinks: bool  # the model's thoughts are marked
    calls: CallFormat | None
    names: frozenset[str]
    parallel: bool
    separate: bool
    stream_reasoning: bool

    @cached_property
    def plain(self) -> bool:
        """All of it is content."""
        return self.calls is None and (self.begins is Begins.OUTSIDE or not self.separate)

    def parser(self, *, eager: bool) -> OutputParser:
        calls = None
        if self.calls is not None:
            calls = self.calls.parser(self.names, eager=eager, single=not self.parallel)
        return OutputParser(
            self.begins, calls, separate=self.separate, stream_reasoning=self.stream_reasoning or not eager
        )


class _Reading:
    """One streamed choice: its parser, and the calls that have begun."""

    __slots__ = ("calls", "parser")

    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser
        self.calls = 0

    def members(self, events: list[Event]) -> list[bytes]:
        """Each event as the delta of a chunk."""
        return [b'"delta":%b' % self._delta(event) for event in events]

    def _delta(self, event: Event) -> bytes:
        match event:
            case CallBegin(name):
                self.calls += 1
                return encode({"tool_calls": [{"index": self.calls - 1, **_call(Call(name))}]})
            case Arguments(text):
                return encode({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": text}}]})
            case Reasoning(text):
                return b'{"reasoning_content":%b}' % encode(text)
            case _:
                return b'{"content":%b}' % encode(event.text)


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class ChatPlan(OpenAIPlan):
    object_whole, object_chunk = "chat.completion", "chat.completion.chunk"
    text_form = (b'"delta":{"content":', b"}")
    empty = b'"delta":{}'

    def __init__(self, context: Context, request: ChatRequest, rid: str, prompts: list[Prompt], shape: Shape) -> None:
        super().__init__(context, request, f"chatcmpl-{rid}", prompts)
        self._logprobs = bool(request.logprobs)
        self._tops = bool(request.top_logprobs)
        self._shape = shape
        self._readings: dict[Choice, _Reading] = {}
        self._called: set[Choice] = set()
        self._thought: set[Choice] = set()
        self._counted: dict[Choice, tuple[int, bool]] = {}  # tokens of thoughts so far, and whether they are over

    def wants_logprobs(self) -> bool:
        return self._logprobs

    def logprobs(self, choice: Choice, begin: int) -> Any:
        return chat(self._texts, choice.ids, choice.logprobs, begin, self._tops)

    def whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        if self._shape.plain:
            return {"message": {"role": "assistant", "content": text}}
        parser = self._shape.parser(eager=False)
        found = parse_whole(parser, text)
        message: dict[str, Any] = {"role": "assistant", "content": found.content or None}
        if parser.thought:
            self._thought.add(choice)
        if self._shape.thinks and self._shape.separate:
            message["reasoning_content"] = found.reasoning or None
        if found.calls:
            self._called.add(choice)
            message["tool_calls"] = [_call(call) for call in found.calls]
        elif not found.reasoning:
            message["content"] = found.content
        return {"message": message}

    def members(self, choice: Choice, text: str) -> list[bytes] | None:
        if self._shape.plain:
            return None
        reading = self._readings.get(choice)
        if reading is None:
            reading = self._readings[choice] = _Reading(self._shape.parser(eager=True))
        events = reading.parser.feed(text) if text else []
        if choice.finish is not None:
            events += reading.parser.finish()
        members = reading.members(events)
        if reading.calls:
            self._called.add(choice)
        if reading.parser.thought:
            self._thought.add(choice)
        return members

    def finish_reason(self, choice: Choice) -> str:
        reason = super().finish_reason(choice)
        return "tool_calls" if choice in self._called and reason == FinishReason.STOP.value else reason

    def usage(self, exchange: Exchange) -> dict[str, Any]:
        found = super().usage(exchange)
        closing = self._context.tokenizer.added_id(CLOSING)
        if self._shape.thinks and not self._shape.plain and closing is not None:
            counts = [self._thought_tokens(choice, closing) for choice in exchange.choices() if choice in self._thought]
            found["completion_tokens_details"] = {"reasoning_tokens": sum(counts)}
        return found

    def _thought_tokens(self, choice: Choice, closing: int) -> int:
        """Up to the mark that closes the thoughts, or all of them. Every token is looked at once."""
        looked, over = self._counted.get(choice, (0, False))
        if not over:
            over = closing in choice.ids[looked:]
            looked = choice.ids.index(closing, looked) + 1 if over else len(choice.ids)
            self._counted[choice] = (looked, over)
        return looked

    def outer_members(self, exchange: Exchange) -> dict[str, Any]:
        generation = exchange.generations[0]
        found: dict[str, Any] = {}
        if self._token_ids:
            found["prompt_token_ids"] = generation.prompt.tokens
        if self._prompt_logprobs is not None:
            found["prompt_logprobs"] = self.prompt_logprobs(generation)
        return found

    def opening(self, exchange: Exchange) -> bytes:
        role = b'"delta":{"role":"assistant","content":""}'
        outer = self.outer_members(exchange)
        return b"".join([self._template.chunk(choice.place, member=role, outer=outer) for choice in exchange.choices()])


async def plan_chat(context: Context, http: Http, request: ChatRequest, rid: str) -> ChatPlan:
    """Raises RequestError naming the field at fault."""
    check_shared(context, request)
    top = check_top_logprobs(context, "top_logprobs", request.top_logprobs)
    if top and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    limit = ("max_tokens", request.max_tokens)
    if request.max_completion_tokens is not None:
        limit = ("max_completion_tokens", request.max_completion_tokens)
    grammar = await context.grammars.of(request)
    wishes = resolve_wishes(context, request, limit, bool(request.logprobs), top or 0, grammar)
    tools = tool_wishes(request.tools, request.tool_choice, request.parallel_tool_calls)
    format = _call_format(context, tools)
    messages = template_messages(request.messages)
    text = _render(context, request, messages, tools)
    shape = _shape(context, request, text, messages, tools, format)
    wishes = await _constrained(context, wishes, tools, format, shape)
    # Templates write the begin-of-text token themselves.
    [tokens] = await context.tokenizer.encode([text], add_special_tokens=bool(request.add_special_tokens))
    tokens = truncated(context, request, tokens, wishes.max_tokens or 1)
    builder = PromptBuilder(context, request, named_prefills(http), rid)
    start, tops = prompt_logprobs_wanted(request)
    prompt = builder.build(
        tokens,
        wishes,
        0,
        1,
        field="messages",
        shown_tokens=_shown_tokens(context, shape),
        logprob_start=start,
        prompt_top_logprobs=tops,
    )
    return ChatPlan(context, request, rid, [prompt], shape)


def render_chat(context: Context, request: ChatRequest) -> str:
    """The conversation as the model's template writes it."""
    tools = tool_wishes(request.tools, request.tool_choice, request.parallel_tool_calls)
    return _render(context, request, template_messages(request.messages), tools)


def _call_format(context: Context, tools: ToolWishes | None) -> CallFormat | None:
    """None without tools. A forced call needs no format that the model knows: the grammar says what it is."""
    if tools is None or context.chat.calls is not None:
        return None if tools is None else context.chat.calls
    if tools.forced:
        return LLAMA3
    raise RequestError(
        "tools: the model's chat template does not show how it writes calls. Start the server with "
        '--tool-call-parser, or set tool_choice to "required", a function or "none"',
        param="tools",
        code="unsupported_parameter",
    )


def _render(context: Context, request: ChatRequest, messages: list[dict[str, Any]], tools: ToolWishes | None) -> str:
    template = context.tokenizer.templates.pick(tools=tools is not None)
    if template is None:
        raise RequestError(
            "the model has no chat template: use /v1/completions, or start the server with --chat-template",
            param="messages",
        )
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message goes on with the last message, add_generation_prompt begins a new one: set one",
            param="continue_final_message",
        )
    kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", request.reasoning_effort)

    def render(messages: list[dict[str, Any]]) -> str:
        return template.render(
            _roles_known(messages, template),
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            tools=None if tools is None else tools.tools,
            documents=request.documents or None,
            kwargs=kwargs,
        )

    try:
        return render(messages)
    except RequestError as error:
        if not isinstance(error.__cause__, TypeError | jinja2.UndefinedError):
            raise
        for other in other_forms(messages):
            with contextlib.suppress(RequestError):
                return render(other)
        raise


def _roles_known(messages: list[dict[str, Any]], template: ChatTemplate) -> list[dict[str, Any]]:
    """OpenAI's newer name for the system's messages, where the template does not know it."""
    if "developer" in template.source:
        return messages
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def _shape(
    context: Context,
    request: ChatRequest,
    text: str,
    messages: list[dict[str, Any]],
    tools: ToolWishes | None,
    format: CallFormat | None,
) -> Shape:
    continued = messages[-1].get("content") if request.continue_final_message else None
    return Shape(
        begins=begins(context.chat.reasoning, text, continued),
        thinks=bool(context.chat.reasoning),
        calls=format,
        names=frozenset() if tools is None else tools.names,
        parallel=tools is not None and tools.parallel,
        separate=request.separate_reasoning is not False,
        stream_reasoning=request.stream_reasoning is not False,
    )


async def _constrained(
    context: Context, wishes: Wishes, tools: ToolWishes | None, format: CallFormat | None, shape: Shape
) -> Wishes:
    """With the grammar of the calls, or that of the answer; either begins after the thoughts."""
    added_id, grammar = context.tokenizer.added_id, wishes.sampling.grammar
    if tools is not None and format is not None:
        if grammar:
            raise RequestError(
                "a constrained answer (response_format and its like) leaves no room for calls: "
                'leave tools out or set tool_choice to "none"',
                param="tools",
            )
        if tools.constrained:
            grammar = await context.grammars.make(call_constraint(format, tools, added_id))
    grammar = after_thoughts(grammar, shape.begins, added_id)
    return dataclasses.replace(wishes, sampling=msgspec.structs.replace(wishes.sampling, grammar=grammar))


def _shown_tokens(context: Context, shape: Shape) -> frozenset[int]:
    """Markup that is special tokens must be seen to be understood."""
    markup: tuple[str, ...] = shape.calls.markup if shape.calls is not None else ()
    if shape.thinks:
        markup += (OPENING, CLOSING)
    ids = (context.tokenizer.special_id(text) for text in markup)
    return frozenset(token_id for token_id in ids if token_id is not None)
