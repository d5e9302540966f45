"""OpenAI's /v1/chat/completions: request, checks, answers."""

from __future__ import annotations

from typing import Any

from pd.api.chat_messages import template_messages
from pd.api.context import Context, PromptBuilder, named_prefills
from pd.api.exchange import Choice, Exchange, Prompt
from pd.api.http import Http
from pd.api.logprobs import chat
from pd.api.openai import OpenAIPlan, OpenAIRequest, check_shared, check_top_logprobs, resolve_wishes
from pd.errors import RequestError


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


class ChatPlan(OpenAIPlan):
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
        return b"".join([self._template.chunk(choice.place, member=role) for choice in exchange.choices()])


async def plan_chat(context: Context, http: Http, request: ChatRequest, rid: str) -> ChatPlan:
    """Raises RequestError naming the field at fault."""
    check_shared(context, request)
    top = check_top_logprobs(context, "top_logprobs", request.top_logprobs)
    if top and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    limit = ("max_tokens", request.max_tokens)
    if request.max_completion_tokens is not None:
        limit = ("max_completion_tokens", request.max_completion_tokens)
    wishes = resolve_wishes(context, request, limit, bool(request.logprobs), top or 0)
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
