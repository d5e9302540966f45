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
from pd.api.openai import (
    OpenAIPlan,
    OpenAIRequest,
    check_shared,
    check_top_logprobs,
    prompt_logprobs_wanted,
    resolve_wishes,
    truncated,
)
from pd.api.params import Wishes
from pd.errors import RequestError
from pd.types import MAX_CHOICES

#: OpenAI's (and SGLang's and vLLM's) default of /v1/completions.
COMPLETION_TOKENS = 16


class CompletionRequest(OpenAIRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: Any = None
    prompt_embeds: Any = None


class CompletionPlan(OpenAIPlan):
    """`echoes`: the text of each prompt where the answer begins with it, else none."""

    object_whole = object_chunk = "text_completion"
    text_form = (b'"text":', b"")
    empty = b'"text":""'

    def __init__(
        self,
        context: Context,
        request: CompletionRequest,
        rid: str,
        prompts: list[Prompt],
        n: int,
        echoes: Sequence[str],
    ) -> None:
        super().__init__(context, request, f"cmpl-{rid}", prompts)
        self._n = n
        self._top = request.logprobs
        self._echoes = echoes
        self._echoed: set[Choice] = set()
        self._formats: dict[Choice, CompletionLogprobs] = {}

    def wants_logprobs(self) -> bool:
        return self._top is not None

    def text(self, choice: Choice) -> str:
        text = choice.take_text()
        if self._echoes and choice not in self._echoed:
            self._echoed.add(choice)
            return self._echoes[choice.generation.index] + text
        return text

    def logprobs(self, choice: Choice, begin: int) -> Any:
        form = self._formats.get(choice)
        if form is None:
            generation, tokenizer = choice.generation, self._context.tokenizer
            skips = generation.prompt.skip_special_tokens
            form = CompletionLogprobs(tokenizer, self._top or 0, self._texts, skips=skips)
            self._formats[choice] = form
            if self._echoes and generation.prompt_logprobs is not None:
                form.add_prompt(generation.prompt.tokens, generation.prompt_logprobs, self._echoes[generation.index])
        return form.format(choice.ids, choice.logprobs, begin)

    def answers(self, exchange: Exchange) -> list[Choice]:
        """With `best_of` the best `n` candidates of each prompt, best first."""
        return [choice for generation in exchange.generations for choice in best(generation.choices, self._n)]

    def whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        return {"text": text}

    def extra_members(self, choice: Choice, begin: int, first: bool) -> dict[str, Any]:
        found = super().extra_members(choice, begin, first)
        if self._token_ids and first:
            found["prompt_token_ids"] = choice.generation.prompt.tokens
        if self._prompt_logprobs is not None:
            found["prompt_logprobs"] = self.prompt_logprobs(choice.generation)
        return found


async def plan_completion(context: Context, http: Http, request: CompletionRequest, rid: str) -> CompletionPlan:
    """Raises RequestError naming the field at fault."""
    check_shared(context, request)
    top = check_top_logprobs(context, "logprobs", request.logprobs)
    grammar = await context.grammars.of(request)
    limit = ("max_tokens", request.max_tokens)
    fewest = 0 if request.echo else 1
    wishes = resolve_wishes(context, request, limit, top is not None, top or 0, grammar, fewest)
    output = COMPLETION_TOKENS if wishes.max_tokens is None else wishes.max_tokens
    prompts = [truncated(context, request, tokens, output) for tokens in await completion_prompts(context, request)]
    start, tops = prompt_logprobs_wanted(request)
    if request.echo and top is not None:
        start, tops = 0, max(tops, top)
    builder = PromptBuilder(context, request, named_prefills(http), rid)
    n, wishes = wishes.n, _with_candidates(request, wishes)
    built = [
        builder.build(
            tokens,
            wishes,
            i,
            len(prompts),
            field="prompt",
            default_max_tokens=COMPLETION_TOKENS,
            logprob_start=start,
            prompt_top_logprobs=tops,
        )
        for i, tokens in enumerate(prompts)
    ]
    echoes = _echoes(context, request, prompts) if request.echo else ()
    return CompletionPlan(context, request, rid, built, n, echoes)


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


def _echoes(context: Context, request: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """Texts as they came; tokens, and what is left of a truncated text, decoded."""
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if request.truncate_prompt_tokens is None and all(isinstance(item, str) for item in given):
        return [*given]
    skip = request.skip_special_tokens is not False
    return [context.tokenizer.decode(tokens, skip_special_tokens=skip) for tokens in prompts]


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
