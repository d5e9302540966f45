"""OpenAI's /v1/completions: request, checks, answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from pd.api.context import Context, PromptBuilder, named_prefills
from pd.api.exchange import Choice, Exchange, Prompt
from pd.api.http import Http
from pd.api.logprobs import CompletionLogprobs
from pd.api.openai import OpenAIPlan, OpenAIRequest, check_shared, check_top_logprobs, resolve_wishes
from pd.api.params import Wishes
from pd.errors import RequestError
from pd.types import MAX_CHOICES

#: OpenAI's (and SGLang's and vLLM's) default of /v1/completions.
COMPLETION_TOKENS = 16


class CompletionRequest(OpenAIRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Any = None
    echo: Any = None
    prompt_embeds: Any = None


class CompletionPlan(OpenAIPlan):
    object_whole = object_chunk = "text_completion"
    text_form = (b'"text":', b"")
    empty = b'"text":""'

    def __init__(self, context: Context, request: CompletionRequest, rid: str, prompts: list[Prompt], n: int) -> None:
        super().__init__(context, request, f"cmpl-{rid}", prompts)
        self._n = n
        self._top = request.logprobs
        self._formats: dict[Choice, CompletionLogprobs] = {}

    def wants_logprobs(self) -> bool:
        return self._top is not None

    def logprobs(self, choice: Choice, begin: int) -> Any:
        found = self._formats.get(choice)
        if found is None:
            found = self._formats[choice] = CompletionLogprobs(self._context.tokenizer, self._top or 0)
        return found.format(choice.ids, choice.logprobs, begin)

    def answers(self, exchange: Exchange) -> list[Choice]:
        """With `best_of` the best `n` candidates of each prompt, best first."""
        return [choice for generation in exchange.generations for choice in best(generation.choices, self._n)]

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}


async def plan_completion(context: Context, http: Http, request: CompletionRequest, rid: str) -> CompletionPlan:
    """Raises RequestError naming the field at fault."""
    check_shared(context, request)
    top = check_top_logprobs(context, "logprobs", request.logprobs)
    wishes = resolve_wishes(context, request, ("max_tokens", request.max_tokens), top is not None, top or 0)
    prompts = await completion_prompts(context, request)
    builder = PromptBuilder(context, request, named_prefills(http), rid)
    n, wishes = wishes.n, _with_candidates(request, wishes)
    built = [
        builder.build(tokens, wishes, i, len(prompts), field="prompt", default_max_tokens=COMPLETION_TOKENS)
        for i, tokens in enumerate(prompts)
    ]
    return CompletionPlan(context, request, rid, built, n)


def _with_candidates(request: CompletionRequest, wishes: Wishes) -> Wishes:
    """`best_of` outputs instead of `n`, with the logprobs that rank them."""
    wanted = request.best_of
    if wanted is None or wanted == wishes.n:
        return wishes
    if not wishes.n <= wanted <= MAX_CHOICES:
        message = f"best_of must be between n ({wishes.n}) and {MAX_CHOICES}, got {wanted}"
        raise RequestError(message, param="best_of")
    if request.stream:
        raise RequestError("best_of above n cannot be streamed: which are best is known at the end", param="best_of")
    return replace(wishes, n=wanted, sampling=msgspec.structs.replace(wishes.sampling, logprobs=True))


def best(candidates: list[Choice], n: int) -> list[Choice]:
    """The `n` with the highest mean logprob per token (as OpenAI defines it), best first; of equals the first drawn.

    The model's own logprobs count: those of its raw logits, whatever temperature, penalties or masks drew the tokens.
    """
    if n >= len(candidates):
        return candidates
    return sorted(candidates, key=_score, reverse=True)[:n]


def _score(choice: Choice) -> float:
    chosen = choice.logprobs.chosen
    return sum(chosen) / len(chosen) if chosen else -math.inf


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
