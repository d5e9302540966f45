"""Request fields that every API shares: how tokens are drawn, and what pd refuses by name.

Unknown fields are accepted, because clients send many. A field that pd knows, that changes the output and that is not
built is an error with its name: an answer that silently ignores it would be wrong.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pd.errors import ModelError, RequestError
from pd.types import MAX_CHOICES, SamplingParams

#: Stop strings of one request. OpenAI takes 4; SGLang and vLLM have no bound, and evaluation harnesses send more.
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_TOP_LOGPROBS = 128

_SEED_MASK = (1 << 63) - 1
_FIRST_INT64, _LAST_INT64 = -(1 << 63), (1 << 63) - 1


class SamplingFields(msgspec.Struct, kw_only=True):
    """As they come; None means not given. SGLang's and vLLM's names beyond OpenAI's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    sampling_seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    n: int | None = None
    # What constrains the output: see pd.api.grammar.
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    # Known, not built: see _NEUTRAL.
    structural_tag: Any = None
    stop_regex: Any = None
    custom_params: Any = None


#: Fields that are not built -> the values with which they change nothing (None always is one).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "structural_tag": ("",),
    "stop_regex": ("", []),
    "custom_params": ({},),
    "suffix": ("",),
    "use_beam_search": (False,),
    "prompt_embeds": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "custom_logit_processor": ("",),
    "return_hidden_states": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": ("",),
    "lora_path": ("", []),
    "lora_request": (),
    "image_data": ([],),
    "video_data": ([],),
    "audio_data": ([],),
    "input_embeds": ([],),
    "session_params": ({},),
    "kv_transfer_params": ({},),
}


#: What to do instead, where there is something.
_INSTEAD = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "chat_template": "the server is started with --chat-template",
}


def neutral_values(name: str) -> tuple[Any, ...] | None:
    """The values that a field that is not built may have; None for any other field."""
    return _NEUTRAL.get(name)


def refuse_unsupported(fields: msgspec.Struct, prefix: str = "") -> None:
    """RequestError for the first known field that would change the output and is not built."""
    for name in fields.__struct_fields__:
        neutral = _NEUTRAL.get(name)
        if neutral is None:
            continue
        value = getattr(fields, name)
        if value is None or any(value == same and type(value) is type(same) for same in neutral):
            continue
        instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise RequestError(
            f"{prefix}{name} is not supported{instead}", param=prefix + name, code="unsupported_parameter"
        )


@dataclass(frozen=True)
class Defaults:
    """What a model's generation_config.json says where the request does not."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    @classmethod
    def read(cls, model: str) -> Defaults:
        """Raises ModelError for a file that is not what it should be; no file means no defaults."""
        file = Path(model) / "generation_config.json"
        if not file.exists():
            return cls()
        try:
            found = msgspec.json.decode(file.read_bytes(), type=_GenerationConfig)
        except msgspec.MsgspecError as error:
            raise ModelError(model, f"generation_config.json cannot be read: {error}") from error
        given = {name: getattr(found, name) for name in found.__struct_fields__ if getattr(found, name) is not None}
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        return cls(**given)


class _GenerationConfig(msgspec.Struct):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against. `defaults` and `eos_token_ids` come from the model's directory."""

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...] = ()
    defaults: Defaults = field(default_factory=Defaults)


@dataclass(frozen=True)
class Wishes:
    """A request's sampling, resolved except for what depends on the prompt's length."""

    sampling: SamplingParams
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    max_tokens: int | None
    max_tokens_name: str
    seeded: bool = False
    n: int = 1  # outputs per prompt


def mint_seed() -> int:
    return secrets.randbits(63)


def resolve(
    fields: SamplingFields,
    model: ModelLimits,
    *,
    max_tokens: tuple[str, int | None],
    min_tokens: tuple[str, int | None],
    fewest_tokens: int = 1,
    prefix: str = "",
    logprobs: bool = False,
    top_logprobs: int = 0,
    token_ids_logprob: tuple[int, ...] = (),
    grammar: str = "",
) -> Wishes:
    """Check every field's range. RequestError names the field, with `prefix` ("sampling_params.") where it stood.

    `max_tokens` and `min_tokens` are (the name that the client used, the value or None). `fewest_tokens` 0: a prompt
    may be scored without any output. `grammar` is one that `pd.api.grammar` made.
    """
    refuse_unsupported(fields, prefix)
    check = _Checker(prefix)
    if fields.n is not None:
        check.within("n", fields.n, 1, MAX_CHOICES)
    least = check.within(min_tokens[0], min_tokens[1], 0, 1 << 31) or 0
    most = check.within(max_tokens[0], max_tokens[1], fewest_tokens, 1 << 31)
    if most is not None and least > most:
        raise check.error(min_tokens[0], f"must not exceed {max_tokens[0]} ({most}), got {least}")
    stop_ids = check.token_ids("stop_token_ids", fields.stop_token_ids or (), model.vocab_size)
    ignore_eos = bool(fields.ignore_eos)
    if grammar and not model.eos_token_ids:
        raise RequestError("the model has no end-of-sequence token, without which no constrained output could end")
    # What a grammar describes comes to an end, after which there is nothing else to emit.
    ends = () if ignore_eos and not grammar else model.eos_token_ids
    sampling = SamplingParams(
        **_numbers(fields, model.defaults, check),
        logit_bias=_logit_bias(fields.logit_bias, model.vocab_size, check),
        min_tokens=least,
        stop_token_ids=tuple(dict.fromkeys((*ends, *stop_ids))),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        token_ids_logprob=token_ids_logprob,
        grammar=grammar,
    )
    return Wishes(
        sampling=sampling,
        stop=_stops(fields.stop, check),
        include_stop=bool(fields.include_stop_str_in_output or fields.no_stop_trim),
        skip_special_tokens=fields.skip_special_tokens is not False,
        max_tokens=most if most is not None else model.defaults.max_tokens,
        max_tokens_name=max_tokens[0] if most is not None else "",
        seeded=fields.seed is not None or fields.sampling_seed is not None,
        n=1 if fields.n is None else fields.n,
    )


def _numbers(fields: SamplingFields, defaults: Defaults, check: _Checker) -> dict[str, Any]:
    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    top_k = defaults.top_k if fields.top_k is None else fields.top_k
    check.within("top_k", top_k, -1, (1 << 31) - 1)
    seed_name = "seed" if fields.seed is not None else "sampling_seed"
    seed = check.within(seed_name, getattr(fields, seed_name), _FIRST_INT64, _LAST_INT64)
    top_p = check.within("top_p", given(fields.top_p, defaults.top_p), 0.0, 1.0)
    if top_p == 0.0:
        raise check.error("top_p", "must be greater than 0")
    penalty = given(fields.repetition_penalty, defaults.repetition_penalty)
    check.within("repetition_penalty", penalty, 0.0, 100.0)
    if penalty == 0.0:
        raise check.error("repetition_penalty", "must be greater than 0")
    return {
        "temperature": check.within("temperature", given(fields.temperature, defaults.temperature), 0.0, 100.0),
        "top_p": top_p,
        "top_k": max(0, top_k),
        "min_p": check.within("min_p", given(fields.min_p, defaults.min_p), 0.0, 1.0),
        # A retry on another instance must draw the same numbers, so one who gives no seed gets one.
        "seed": mint_seed() if seed is None else seed & _SEED_MASK,
        "presence_penalty": check.within("presence_penalty", given(fields.presence_penalty, 0.0), -2.0, 2.0),
        "frequency_penalty": check.within("frequency_penalty", given(fields.frequency_penalty, 0.0), -2.0, 2.0),
        "repetition_penalty": penalty,
    }


def _logit_bias(bias: Mapping[str, float] | None, vocab_size: int, check: _Checker) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit()) or len(key) > 10 or int(key) >= vocab_size:
            raise check.error("logit_bias", f"{key!r} is not a token id below {vocab_size}")
        check.within("logit_bias", value, -100.0, 100.0)
        found[int(key)] = value
    return found


def _stops(stop: str | list[str] | None, check: _Checker) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise check.error("stop", f"must be at most {MAX_STOPS} strings, got {len(stops)}")
    for text in stops:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise check.error("stop", f"every string must have 1 to {MAX_STOP_LENGTH} characters, got {len(text)}")
    return stops


class _Checker:
    """Builds the errors, so that each names the field as the client wrote it."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def error(self, name: str, problem: str) -> RequestError:
        name = self._prefix + name
        return RequestError(f"{name} {problem}", param=name)

    def within(self, name: str, value: Any, low: float, high: float) -> Any:
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise self.error(name, f"must be between {low} and {high}, got {value}")
        return value

    def token_ids(self, name: str, ids: Any, vocab_size: int) -> tuple[int, ...]:
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise self.error(name, f"must be token ids from 0 to {vocab_size - 1}, got {token_id}")
        return tuple(ids)
