"""SGLang's native /generate: request, checks, answers.

One difference is deliberate: prompt logprobs from a start beyond 0 begin with that token's own logprob, where SGLang
puts null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pd.api.context import Context, PromptBuilder, RequestFields, check_model, named_prefills, nth
from pd.api.exchange import Choice, Exchange, Prompt
from pd.api.http import Http
from pd.api.logprobs import NativeLogprobs
from pd.api.params import MAX_TOP_LOGPROBS, SamplingFields, Wishes, refuse_unsupported, resolve
from pd.api.sse import DONE, event
from pd.errors import RequestError
from pd.types import FinishReason, Role

#: SGLang's default.
NEW_TOKENS = 128


class NativeSampling(SamplingFields, kw_only=True):
    """`sampling_params`."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None


class GenerateRequest(RequestFields, kw_only=True):
    """Sampling fields at the top level count where `sampling_params` does not set them."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    stream: bool | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int]] | None = None
    return_text_in_logprobs: bool | None = None
    # Known, not built: see pd.api.params.
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    input_embeds: Any = None
    lora_path: Any = None
    session_params: Any = None
    custom_logit_processor: Any = None
    return_hidden_states: Any = None


class GeneratePlan:
    """Streams carry the text so far in every event, as SGLang's do."""

    def __init__(
        self, context: Context, request: GenerateRequest, prompts: list[Prompt], batch: bool, logprobs: list[bool]
    ) -> None:
        self.stream = bool(request.stream)
        self.prompts = prompts
        self._context = context
        self._batch = batch or prompts[0].choices > 1
        self._wants_logprobs = logprobs
        self._format = NativeLogprobs(context.tokenizer, bool(request.return_text_in_logprobs))
        self._texts: dict[Choice, str] = {}
        self._outputs: dict[Choice, list[list[Any]]] = {}

    def whole(self, exchange: Exchange) -> Any:
        answers = [self._answer(exchange, choice) for choice in exchange.choices()]
        return answers if self._batch else answers[0]

    def opening(self, exchange: Exchange) -> bytes:
        return b""

    def update(self, exchange: Exchange) -> bytes:
        events = []
        for choice in exchange.take_ready():
            answer = self._answer(exchange, choice)
            if self._batch:
                answer["index"] = choice.place
            events.append(event(answer))
        return b"".join(events)

    def closing(self, exchange: Exchange) -> bytes:
        return DONE

    def _answer(self, exchange: Exchange, choice: Choice) -> dict[str, Any]:
        text = self._texts.get(choice, "") + choice.take_text()
        if self.stream:
            self._texts[choice] = text
        generation = choice.generation
        rid = generation.prompt.rid
        meta: dict[str, Any] = {
            "id": rid if generation.prompt.choices == 1 else f"{rid}-{choice.index}",
            "finish_reason": _finish_reason(choice),
            "prompt_tokens": len(generation.prompt.tokens),
            "completion_tokens": choice.count,
            "cached_tokens": generation.cached_tokens,
        }
        if self._wants_logprobs[generation.index]:
            meta |= self._logprobs(choice)
        if choice.finish is not None:
            meta["e2e_latency"] = choice.last_at - exchange.arrived if choice.last_at else 0.0
        return {"text": text, "output_ids": choice.ids, "meta_info": meta}

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        generation, prompt = choice.generation, choice.generation.prompt
        shown = self._outputs.setdefault(choice, [])
        begin = len(shown)
        shown += self._format.tokens(choice.ids[begin:], choice.logprobs.chosen[begin:])
        found: dict[str, Any] = {"input_token_logprobs": [], "output_token_logprobs": shown}
        # With a room, the prompt's logprobs are the prefill leg's to give: the router joins both legs' lists.
        elsewhere = prompt.room >= 0 and self._context.served.role == Role.DECODE.value
        of_prompt = None if elsewhere else generation.prompt_logprobs
        if of_prompt is not None:
            start = generation.prompt_logprobs_start
            found["input_token_logprobs"] = self._format.tokens(prompt.tokens[start:], of_prompt.chosen)
        if prompt.sampling.top_logprobs:
            found["input_top_logprobs"] = self._format.tops(of_prompt.tops) if of_prompt is not None else []
            found["output_top_logprobs"] = self._format.tops(choice.logprobs.tops)
        wanted = prompt.sampling.token_ids_logprob
        if wanted:
            rows = of_prompt.wanted if of_prompt is not None else []
            found["input_token_ids_logprobs"] = self._format.wanted(wanted, rows)
            found["output_token_ids_logprobs"] = self._format.wanted(wanted, choice.logprobs.wanted)
        return found


def _finish_reason(choice: Choice) -> dict[str, Any] | None:
    finish = choice.finish
    if finish is None:
        return None
    if finish.reason is FinishReason.STOP:
        return {"type": "stop", "matched": choice.matched}
    if finish.reason is FinishReason.LENGTH:
        # The leg of a prefill instance ends with the first token, whatever the limit: SGLang calls that length 0.
        prompt = choice.generation.prompt
        limit = prompt.sampling.max_tokens
        return {"type": "length", "length": limit if choice.count >= limit and not prompt.score_only else 0}
    return {"type": "abort", "message": finish.message}


async def plan_generate(context: Context, http: Http, request: GenerateRequest, rid: str) -> GeneratePlan:
    """Raises RequestError naming the field at fault."""
    check_model(request.model, context.served)
    refuse_unsupported(request)
    prompts, batch, name = await _prompts(context, request)
    count = len(prompts)
    builder = PromptBuilder(context, request, named_prefills(http), rid)
    built, logprobs = [], []
    for index, tokens in enumerate(prompts):
        item = _Item(context, request, index, count)
        logprobs.append(item.logprobs)
        start = item.start if item.logprobs else -1
        if start >= len(tokens):
            raise RequestError(
                f"logprob_start_len must be less than the prompt's {len(tokens)} tokens, got {start}",
                param="logprob_start_len",
            )
        built.append(
            builder.build(
                tokens,
                await item.wishes(),
                index,
                count,
                field=name,
                default_max_tokens=NEW_TOKENS,
                logprob_start=start,
                prompt_top_logprobs=item.top if start >= 0 else 0,
            )
        )
    if len({prompt.choices for prompt in built}) > 1:
        raise RequestError("sampling_params.n must be the same for every prompt", param="sampling_params.n")
    return GeneratePlan(context, request, built, batch, logprobs)


async def _prompts(context: Context, request: GenerateRequest) -> tuple[list[list[int]], bool, str]:
    """(token ids of each prompt, whether the answer is a list, the field that held them)."""
    if (request.text is None) == (request.input_ids is None):
        raise RequestError("exactly one of text and input_ids must be given", param="text")
    items: list[Any]
    if request.text is not None:
        name, batch = "text", isinstance(request.text, list)
        items = [*request.text] if isinstance(request.text, list) else [request.text]
    else:
        assert request.input_ids is not None
        name, kinds = "input_ids", {type(item) for item in request.input_ids}
        if len(kinds) > 1:
            raise RequestError("input_ids must not mix token ids and lists of token ids", param="input_ids")
        batch = kinds == {list}
        items = [*request.input_ids] if batch else [request.input_ids]
    if not items:
        raise RequestError(f"{name} must not be empty", param=name)
    if len(items) > context.limits.prompts:
        raise RequestError(f"{name} must be at most {context.limits.prompts} prompts", param=name)
    return (await context.tokenizer.encode(items) if name == "text" else list(items)), batch, name


def _of_each(ids: Sequence[int | list[int]], index: int, count: int) -> list[int]:
    """Of a prompt: a list for each, or one for all."""
    lists = [item for item in ids if isinstance(item, list)]
    if not lists:
        return [item for item in ids if isinstance(item, int)]
    if len(lists) < len(ids):
        problem = "token_ids_logprob must not mix token ids and lists of token ids"
        raise RequestError(problem, param="token_ids_logprob")
    own: list[int] = nth(lists, index, count, "token_ids_logprob")
    return own


class _Item:
    """One prompt's share of the request: every field may be a list with one element per prompt."""

    def __init__(self, context: Context, request: GenerateRequest, index: int, count: int) -> None:
        def of(name: str, default: Any) -> Any:
            value = nth(getattr(request, name), index, count, name)
            return default if value is None else value

        self._context, self._request = context, request
        self._own = of("sampling_params", NativeSampling())
        self.logprobs: bool = of("return_logprob", False)
        self.start: int = of("logprob_start_len", -1)
        self.top: int = of("top_logprobs_num", 0)
        self.ids = _of_each(request.token_ids_logprob or [], index, count)
        if self.start < -1:
            raise RequestError(f"logprob_start_len must be -1 or more, got {self.start}", param="logprob_start_len")
        if not 0 <= self.top <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"top_logprobs_num must be between 0 and {MAX_TOP_LOGPROBS}, got {self.top}", param="top_logprobs_num"
            )
        vocab = context.served.limits.vocab_size
        if not all(0 <= token_id < vocab for token_id in self.ids):
            raise RequestError(f"token_ids_logprob must be token ids from 0 to {vocab - 1}", param="token_ids_logprob")

    async def wishes(self) -> Wishes:
        own, outer = self._own, self._request
        names = NativeSampling.__struct_fields__
        given = {name: getattr(own, name) if getattr(own, name) is not None else getattr(outer, name) for name in names}
        merged = NativeSampling(**given)
        prefix = "" if self._request.sampling_params is None else "sampling_params."
        grammar = await self._context.grammars.of(merged, prefix)
        return resolve(
            merged,
            self._context.served.limits,
            max_tokens=("max_new_tokens", merged.max_new_tokens),
            min_tokens=("min_new_tokens", merged.min_new_tokens),
            fewest_tokens=0,
            prefix=prefix,
            logprobs=self.logprobs,
            top_logprobs=self.top if self.logprobs else 0,
            token_ids_logprob=tuple(self.ids) if self.logprobs else (),
            grammar=grammar,
        )
