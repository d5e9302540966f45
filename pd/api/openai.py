"""What OpenAI's /v1/completions and /v1/chat/completions share: fields, checks, the form of answers and streams."""

from __future__ import annotations

import abc
import time
from typing import Any, ClassVar

import msgspec

from pd.api.context import Context, RequestFields, check_model
from pd.api.exchange import Choice, Exchange, Prompt
from pd.api.params import MAX_STOPS_OPENAI, Wishes, resolve
from pd.api.sse import DONE, ChunkTemplate
from pd.errors import RequestError


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


def usage(exchange: Exchange) -> dict[str, Any]:
    prompt, completion = exchange.prompt_tokens(), exchange.completion_tokens()
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": exchange.cached_tokens()},
    }


class OpenAIPlan(abc.ABC):
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

    def answers(self, exchange: Exchange) -> list[Choice]:
        """The choices that an unstreamed answer shows, in the order of their indices."""
        return exchange.choices()

    def whole(self, exchange: Exchange) -> Any:
        choices = []
        for index, choice in enumerate(self.answers(exchange)):
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
            index = choice.place
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


def check_shared(context: Context, request: OpenAIRequest) -> None:
    check_model(request.model, context.served)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def check_top_logprobs(context: Context, name: str, top: int | None) -> int | None:
    if top is not None and not 0 <= top <= context.limits.top_logprobs:
        raise RequestError(f"{name} must be between 0 and {context.limits.top_logprobs}, got {top}", param=name)
    return top


def resolve_wishes(
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
