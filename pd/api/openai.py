"""What OpenAI's /v1/completions and /v1/chat/completions share: fields, checks, the form of answers and streams."""

from __future__ import annotations

import abc
import time
from typing import Any, ClassVar

import msgspec

from pd.api.context import Context, RequestFields, check_model
from pd.api.exchange import Choice, Exchange, Generation, Prompt
from pd.api.logprobs import TokenNumbers, TokenTexts, prompt_logprobs
from pd.api.params import Wishes, resolve
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
    # What constrains the output: see pd.api.grammar.
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: str | None = None
    user: str | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # Known, not built: see pd.api.params.
    use_beam_search: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    custom_logit_processor: Any = None
    return_hidden_states: Any = None
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
        self._shown: dict[Choice, int] = {}  # tokens whose logprobs and ids have been given out
        self._token_ids = bool(request.return_token_ids)
        self._prompt_logprobs = request.prompt_logprobs
        by_id = bool(request.return_tokens_as_token_ids)
        self._texts: TokenTexts = TokenNumbers(context.tokenizer) if by_id else context.tokenizer
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
    def whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        """The member that holds an unstreamed choice's text."""

    def members(self, choice: Choice, text: str) -> list[bytes] | None:
        """What this text means, as members of stream chunks; [] while that is not known, None where it is just text."""
        return None

    def finish_reason(self, choice: Choice) -> str:
        assert choice.finish is not None
        return choice.finish.reason.value

    def usage(self, exchange: Exchange) -> dict[str, Any]:
        return usage(exchange)

    def text(self, choice: Choice) -> str:
        """The text of the choice since the last call."""
        return choice.take_text()

    def extra_members(self, choice: Choice, begin: int, first: bool) -> dict[str, Any]:
        """Further members of a choice, about the tokens from `begin` on; `first`: nothing of it has been shown yet."""
        return {"token_ids": choice.ids[begin:]} if self._token_ids else {}

    def outer_members(self, exchange: Exchange) -> dict[str, Any]:
        """Further members of the answer as a whole, and of a stream's first chunk."""
        return {}

    def prompt_logprobs(self, generation: Generation) -> Any:
        """`prompt_logprobs` as vLLM has it."""
        found = generation.prompt_logprobs
        if found is None:
            return None
        return prompt_logprobs(self._context.tokenizer, generation.prompt.tokens, found, self._prompt_logprobs or 0)

    def answers(self, exchange: Exchange) -> list[Choice]:
        """The choices that an unstreamed answer shows, in the order of their indices."""
        return exchange.choices()

    def whole(self, exchange: Exchange) -> Any:
        choices = []
        for index, choice in enumerate(self.answers(exchange)):
            choices.append(
                {
                    "index": index,
                    **self.whole_choice(choice, self.text(choice)),
                    "logprobs": self.logprobs(choice, 0) if self.wants_logprobs() else None,
                    "finish_reason": self.finish_reason(choice),
                    "matched_stop": choice.matched,
                    **self.extra_members(choice, 0, True),
                }
            )
        return {
            "id": self._id,
            "object": self.object_whole,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": self.usage(exchange),
            **self.outer_members(exchange),
        }

    def opening(self, exchange: Exchange) -> bytes:
        return b""

    def update(self, exchange: Exchange) -> bytes:
        plain = not (self.wants_logprobs() or self._continuous or self._token_ids)
        chunks = []
        for choice in exchange.take_ready():
            text = self.text(choice)
            if choice.finish is None and not text:
                continue
            index = choice.place
            members = self.members(choice, text)
            if members is not None:
                chunks += self._apart(exchange, choice, index, members)
            elif plain and choice.finish is None:
                chunks.append(self._template.text(index, text))
            else:
                chunks.append(self._full_chunk(exchange, choice, index, text))
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _full_chunk(self, exchange: Exchange, choice: Choice, index: int, text: str) -> bytes:
        extra, logprobs = self._news(choice)
        return self._template.chunk(
            index,
            text=text,
            extra=extra,
            logprobs=logprobs,
            finish=self.finish_reason(choice) if choice.finish is not None else None,
            matched=choice.matched,
            usage=self.usage(exchange) if self._continuous else None,
        )

    def _news(self, choice: Choice) -> tuple[dict[str, Any], Any]:
        """(further members, logprobs) of the tokens that no chunk has shown yet."""
        begin, first = self._shown.get(choice, 0), choice not in self._shown
        self._shown[choice] = len(choice.ids)
        logprobs = self.logprobs(choice, begin) if self.wants_logprobs() else None
        return self.extra_members(choice, begin, first), logprobs

    def _apart(self, exchange: Exchange, choice: Choice, index: int, members: list[bytes]) -> list[bytes]:
        """A chunk for each member, and one of its own for the end; what is new of the tokens comes with the first."""
        end = choice.finish is not None
        chunks: list[bytes] = []
        used = self.usage(exchange) if self._continuous else None
        for member in members:
            extra, logprobs = ({}, None) if chunks else self._news(choice)
            chunks.append(self._template.chunk(index, member=member, extra=extra, logprobs=logprobs, usage=used))
        if end:
            extra, logprobs = ({}, None) if chunks else self._news(choice)
            finish, matched = self.finish_reason(choice), choice.matched
            chunks.append(
                self._template.chunk(index, extra=extra, logprobs=logprobs, finish=finish, matched=matched, usage=used)
            )
        return chunks

    def closing(self, exchange: Exchange) -> bytes:
        return self._template.usage(self.usage(exchange)) + DONE if self._include_usage else DONE


def check_shared(context: Context, request: OpenAIRequest) -> None:
    check_model(request.model, context.served)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    check_top_logprobs(context, "prompt_logprobs", request.prompt_logprobs)
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError("prompt_logprobs cannot be streamed: leave stream out", param="prompt_logprobs")
    wanted = request.truncate_prompt_tokens
    if wanted is not None and wanted != -1 and wanted < 1:
        raise RequestError(
            f"truncate_prompt_tokens must be -1 or at least 1, got {wanted}", param="truncate_prompt_tokens"
        )


def prompt_logprobs_wanted(request: OpenAIRequest) -> tuple[int, int]:
    """(`logprob_start`, `prompt_top_logprobs`) of vLLM's `prompt_logprobs`."""
    return (-1, 0) if request.prompt_logprobs is None else (0, request.prompt_logprobs)


def truncated(context: Context, request: OpenAIRequest, tokens: list[int], output: int) -> list[int]:
    """The last `truncate_prompt_tokens` tokens; -1: as many as leave room for `output` tokens in the context."""
    wanted = request.truncate_prompt_tokens
    if wanted is None:
        return tokens
    if wanted == -1:
        wanted = max(1, context.served.limits.context_length - max(1, output))
    return tokens[-wanted:]


def check_top_logprobs(context: Context, name: str, top: int | None) -> int | None:
    if top is not None and not 0 <= top <= context.limits.top_logprobs:
        raise RequestError(f"{name} must be between 0 and {context.limits.top_logprobs}, got {top}", param=name)
    return top


def resolve_wishes(
    context: Context,
    request: OpenAIRequest,
    limit: tuple[str, int | None],
    logprobs: bool,
    top: int,
    grammar: str = "",
    fewest_tokens: int = 1,
) -> Wishes:
    return resolve(
        request,
        context.served.limits,
        max_tokens=limit,
        min_tokens=("min_tokens", request.min_tokens),
        fewest_tokens=fewest_tokens,
        logprobs=logprobs,
        top_logprobs=top,
        grammar=grammar,
    )
