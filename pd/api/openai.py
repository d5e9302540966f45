"""OpenAI's /v1/completions and /v1/chat/completions: requests, checks, answers."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from pd.api.context import Context, PromptBuilder, RequestFields, check_model, named_prefills
from pd.api.exchange import Choice, Exchange, Prompt
from pd.api.http import Http
from pd.api.logprobs import CompletionLogprobs, chat
from pd.api.params import MAX_STOPS_OPENAI, Wishes, resolve
from pd.api.sse import DONE, ChunkTemplate
from pd.errors import RequestError

#: OpenAI's (and SGLang's and vLLM's) default of /v1/completions.
COMPLETION_TOKENS = 16


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIRequest(RequestFields, kw_only=True):
    """What both endpoints share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    add_special_tokens: bool | None = None
    rid: str | None = None
    # Known, not built: see pd.api.params.
    use_beam_search: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    custom_logit_processor: Any = None
    return_hidden_states: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    lora_path: Any = None
    lora_request: Any = None
    session_params: Any = None
    kv_transfer_params: Any = None


class CompletionRequest(OpenAIRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: Any = None
    suffix: Any = None
    echo: Any = None
    prompt_embeds: Any = None


class ChatRequest(OpenAIRequest, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    documents: Any = None
    chat_template: Any = None
    continue_final_message: Any = None


def usage(exchange: Exchange) -> dict[str, Any]:
    prompt, completion = exchange.prompt_tokens(), exchange.completion_tokens()
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": exchange.cached_tokens()},
    }


class _Plan(abc.ABC):
    """Both endpoints' answers; they differ in names and in the form of text and logprobs."""

    object_whole: ClassVar[str]
    object_chunk: ClassVar[str]
    text_form: ClassVar[tuple[bytes, bytes]]
    empty: ClassVar[bytes]

    def __init__(self, context: Context, request: OpenAIRequest, rid: str, prompts: list[Prompt]) -> None:
        options = request.stream_options
        self.stream = bool(request.stream)
        self.prompts = prompts
        self._context = context
        self._id = rid
        self._created = int(time.time())
        self._model = context.served.name
        self._include_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._shown: dict[Choice, int] = {}  # logprobs given out so far
        self._template = ChunkTemplate(
            id=rid,
            object=self.object_chunk,
            created=self._created,
            model=self._model,
            text_form=self.text_form,
            empty=self.empty,
            null_usage=self._include_usage and not self._continuous,
        )

    @abc.abstractmethod
    def wants_logprobs(self) -> bool: ...

    @abc.abstractmethod
    def logprobs(self, choice: Choice, begin: int) -> Any:
        """Of the tokens from `begin` on, in the endpoint's form."""

    @abc.abstractmethod
    def whole_choice(self, text: str) -> dict[str, Any]:
        """The member that holds an unstreamed choice's text."""

    def whole(self, exchange: Exchange) -> Any:
        choices = []
        for index, choice in enumerate(exchange.choices()):
            assert choice.finish is not None
            choices.append(
                {
                    "index": index,
                    **self.whole_choice(choice.take_text()),
                    "logprobs": self.logprobs(choice, 0) if self.wants_logprobs() else None,
                    "finish_reason": choice.finish.reason.value,
                    "matched_stop": choice.matched,
                }
            )
        return {
            "id": self._id,
            "object": self.object_whole,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage(exchange),
        }

    def opening(self, exchange: Exchange) -> bytes:
        return b""

    def update(self, exchange: Exchange) -> bytes:
        plain = not (self.wants_logprobs() or self._continuous)
        chunks = []
        for choice in exchange.take_ready():
            text = choice.take_text()
            if choice.finish is None and not text:
                continue
            index = choice.generation.index
            if plain and choice.finish is None:
                chunks.append(self._template.text(index, text))
            else:
                chunks.append(self._full_chunk(exchange, choice, index, text))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _full_chunk(self, exchange: Exchange, choice: Choice, index: int, text: str) -> bytes:
        logprobs = None
        if self.wants_logprobs():
            logprobs = self.logprobs(choice, self._shown.get(choice, 0))
            self._shown[choice] = len(choice.ids)
        return self._template.chunk(
            index,
            text=text,
            logprobs=logprobs,
            finish=choice.finish.reason.value if choice.finish is not None else None,
            matched=choice.matched,
            usage=usage(exchange) if self._continuous else None,
        )

    def closing(self, exchange: Exchange) -> bytes:
        return self._template.usage(usage(exchange)) + DONE if self._include_usage else DONE


class CompletionPlan(_Plan):
    object_whole = object_chunk = "text_completion"
    text_form = (b'"text":', b"")
    empty = b'"text":""'

    def __init__(self, context: Context, request: CompletionRequest, rid: str, prompts: list[Prompt]) -> None:
        super().__init__(context, request, f"cmpl-{rid}", prompts)
        self._top = request.logprobs
        self._formats: dict[Choice, CompletionLogprobs] = {}

    def wants_logprobs(self) -> bool:
        return self._top is not None

    def logprobs(self, choice: Choice, begin: int) -> Any:
        found = self._formats.get(choice)
        if found is None:
            found = self._formats[choice] = CompletionLogprobs(self._context.tokenizer, self._top or 0)
        return found.format(choice.ids, choice.logprobs, begin)

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatPlan(_Plan):
    object_whole, object_chunk = "chat.completion", "chat.completion.chunk"
    text_form = (b'"delta":{"content":', b"}")
    empty = b'"delta":{}'

    def __init__(self, context: Context, request: ChatRequest, rid: str, prompts: list[Prompt]) -> None:
        super().__init__(context, request, f"chatcmpl-{rid}", prompts)
        self._logprobs = bool(request.logprobs)
        self._tops = bool(request.top_logprobs)

    def wants_logprobs(self) -> bool:
        return self._logprobs

    def logprobs(self, choice: Choice, begin: int) -> Any:
        return chat(self._context.tokenizer, choice.ids, choice.logprobs, begin, self._tops)

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def opening(self, exchange: Exchange) -> bytes:
        role = b'"delta":{"role":"assistant","content":""}'
        indices = range(len(exchange.generations))
        return b"".join([self._template.chunk(index, member=role) for index in indices])


async def plan_completion(context: Context, http: Http, request: CompletionRequest, rid: str) -> CompletionPlan:
    """Raises RequestError naming the field at fault."""
    _check_shared(context, request)
    top = _top_logprobs(context, "logprobs", request.logprobs)
    wishes = _wishes(context, request, ("max_tokens", request.max_tokens), top is not None, top or 0)
    prompts = await completion_prompts(context, request)
    builder = PromptBuilder(context, request, named_prefills(http), rid)
    built = [
        builder.build(tokens, wishes, i, len(prompts), field="prompt", default_max_tokens=COMPLETION_TOKENS)
        for i, tokens in enumerate(prompts)
    ]
    return CompletionPlan(context, request, rid, built)


async def completion_prompts(context: Context, request: CompletionRequest) -> list[list[int]]:
    """A string, strings, token ids, or lists of token ids."""
    prompt = request.prompt
    items: Sequence[Any] = [prompt] if isinstance(prompt, str) else prompt
    if not items:
        raise RequestError("prompt must not be empty", param="prompt")
    kinds = {type(item) for item in items}
    if len(kinds) > 1:
        raise RequestError("prompt must not mix strings, token ids and lists of token ids", param="prompt")
    if kinds == {int}:
        return [list(items)]
    if len(items) > context.limits.prompts:
        raise RequestError(f"prompt must be at most {context.limits.prompts} prompts", param="prompt")
    if kinds == {list}:
        return list(items)
    return await context.tokenizer.encode(items, add_special_tokens=request.add_special_tokens is not False)


async def plan_chat(context: Context, http: Http, request: ChatRequest, rid: str) -> ChatPlan:
    """Raises RequestError naming the field at fault."""
    _check_shared(context, request)
    top = _top_logprobs(context, "top_logprobs", request.top_logprobs)
    if top and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    limit = ("max_tokens", request.max_tokens)
    if request.max_completion_tokens is not None:
        limit = ("max_completion_tokens", request.max_completion_tokens)
    wishes = _wishes(context, request, limit, bool(request.logprobs), top or 0)
    template = context.tokenizer.chat_template
    if template is None:
        raise RequestError("the model has no chat template: use /v1/completions", param="messages")
    kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    text = template.render(
        template_messages(request.messages),
        add_generation_prompt=request.add_generation_prompt is not False,
        kwargs=kwargs,
    )
    # Templates write the begin-of-text token themselves.
    [tokens] = await context.tokenizer.encode([text], add_special_tokens=bool(request.add_special_tokens))
    builder = PromptBuilder(context, request, named_prefills(http), rid)
    return ChatPlan(context, request, rid, [builder.build(tokens, wishes, 0, 1, field="messages")])


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


def _check_shared(context: Context, request: OpenAIRequest) -> None:
    check_model(request.model, context.served)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def _top_logprobs(context: Context, name: str, top: int | None) -> int | None:
    if top is not None and not 0 <= top <= context.limits.top_logprobs:
        raise RequestError(f"{name} must be between 0 and {context.limits.top_logprobs}, got {top}", param=name)
    return top


def _wishes(
    context: Context, request: OpenAIRequest, limit: tuple[str, int | None], logprobs: bool, top: int
) -> Wishes:
    return resolve(
        request,
        context.served.limits,
        max_tokens=limit,
        min_tokens=("min_tokens", request.min_tokens),
        max_stops=MAX_STOPS_OPENAI,
        logprobs=logprobs,
        top_logprobs=top,
    )
