"""What every endpoint works with, and what every generating request carries beyond its sampling: prefills, room, id."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pd.access import Access
from pd.address import url_of
from pd.api.chat_template import ChatTemplates
from pd.api.engine import Engine
from pd.api.exchange import Prompt
from pd.api.grammar import Grammars
from pd.api.http import Http
from pd.api.metrics import Latencies
from pd.api.params import ModelLimits, SamplingFields, Wishes, mint_seed
from pd.api.reasoning import parser_for
from pd.api.tokenizer import Tokenizer
from pd.api.tools.formats import FORMATS, CallFormat, format_for
from pd.errors import RequestError

DEFAULT_BOOTSTRAP_PORT = 8998  # what a null bootstrap_port means
ROOMS = 1 << 63  # numbers of bootstrap rooms
MAX_PREFILLS = 16
_ENDPOINT = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")
_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.%]*:[0-9A-Fa-f:.%]*|\[[0-9A-Fa-f:.%]+\]")


@dataclass(frozen=True)
class Limits:
    """`prompts` bounds one HTTP request's batch; `write_s` how long a client may leave its answer unread."""

    body_bytes: int = 64 << 20
    prompts: int = 4096
    top_logprobs: int = 20  # OpenAI's bound
    scrape_s: float = 1.0
    probe_s: float = 20.0  # of /health_generate; SGLang's bound
    flush_s: float = 30.0
    profile_s: float = 600.0  # a trace is written
    write_s: float = 300.0


@dataclass(frozen=True)
class Served:
    """The served model and this instance, as the endpoints show them."""

    name: str
    path: str
    role: str
    limits: ModelLimits
    info: Mapping[str, Any] = field(default_factory=dict)
    created: int = 0


@dataclass(frozen=True)
class ChatFormats:
    """How this model writes calls (None: no format is known) and thoughts ("": it has none that are marked)."""

    calls: CallFormat | None = None
    reasoning: str = ""

    @classmethod
    def of(cls, templates: ChatTemplates, tool_call_parser: str, reasoning_parser: str) -> ChatFormats:
        """By the settings, or by what the chat templates say where these are "auto"."""
        auto = tool_call_parser == "auto"
        calls = format_for(templates.source) if auto else FORMATS[tool_call_parser]
        if reasoning_parser == "auto":
            return cls(calls, parser_for(templates.source))
        return cls(calls, "" if reasoning_parser == "none" else reasoning_parser)


@dataclass(frozen=True)
class Context:
    """Made once per process. `finished` is called with each generating request's summary; it must not block."""

    engine: Engine
    tokenizer: Tokenizer
    latencies: Latencies
    served: Served
    limits: Limits = field(default_factory=Limits)
    finished: Callable[[dict[str, Any]], None] = lambda summary: None
    chat: ChatFormats = field(default_factory=ChatFormats)
    grammars: Grammars = field(default_factory=Grammars)
    access: Access = field(default_factory=Access)


class RequestFields(SamplingFields, kw_only=True):
    """Fields of every generating request: how to draw, and where."""

    model: str | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    cache_salt: str | list[str | None] | None = None
    extra_key: str | list[str | None] | None = None
    bootstrap_host: str | list[str | None] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int | None] | None = None


def check_model(name: str | None, served: Served) -> None:
    """Clients of a single-model server name its path, "default" or nothing as often as its name."""
    if name not in (None, "", "default", served.name, served.path):
        raise RequestError(
            f"the model {name!r} does not exist; this instance serves {served.name!r}",
            status=404,
            param="model",
            kind="not_found_error",
            code="model_not_found",
        )


def named_prefills(http: Http) -> tuple[str, ...]:
    """`x-pd-prefill`: control endpoints in order of preference."""
    value = http.headers.get("x-pd-prefill", "")
    endpoints = tuple(part.strip() for part in value.split(",") if part.strip())
    for endpoint in endpoints:
        match = _ENDPOINT.fullmatch(endpoint)
        if match is None or not 0 < int(match.group(2)) < 65536:
            raise RequestError(f"x-pd-prefill must name tcp://host:port, got {endpoint!r}", param="x-pd-prefill")
    if len(endpoints) > MAX_PREFILLS:
        raise RequestError(f"x-pd-prefill names more than {MAX_PREFILLS} instances", param="x-pd-prefill")
    return endpoints


def nth(value: Any, index: int, count: int, name: str) -> Any:
    """A batch's field: a list has one element per prompt, a scalar serves all."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise RequestError(f"{name} must have one element per prompt ({count}), got {len(value)}", param=name)
    return value[index]


def _first_of(value: Any, index: int, count: int, name: str) -> Any:
    """As `nth`; a list may have one element per choice, of which the prompt's first counts."""
    if isinstance(value, list) and value and not len(value) % count:
        return value[index * (len(value) // count)]
    return nth(value, index, count, name)


def _room(fields: RequestFields, index: int, count: int) -> int:
    """A scalar room with a batch numbers the prompts from itself on; after the last number comes 0."""
    room = _first_of(fields.bootstrap_room, index, count, "bootstrap_room")
    if room is None:
        return -1
    if not 0 <= room < ROOMS:
        raise RequestError(f"bootstrap_room must be between 0 and 2^63 - 1, got {room}", param="bootstrap_room")
    return room if isinstance(fields.bootstrap_room, list) else (room + index) % ROOMS


def _bootstrap_endpoint(fields: RequestFields, index: int, count: int) -> tuple[str, ...]:
    host = _first_of(fields.bootstrap_host, index, count, "bootstrap_host")
    port = _first_of(fields.bootstrap_port, index, count, "bootstrap_port")
    if not host:
        return ()
    port = DEFAULT_BOOTSTRAP_PORT if port is None else port
    if not _HOST.fullmatch(host):
        raise RequestError(f"bootstrap_host must be a host name or address, got {host!r}", param="bootstrap_host")
    if not 0 < port < 65536:
        raise RequestError(f"bootstrap_port must be between 1 and 65535, got {port}", param="bootstrap_port")
    return (url_of("tcp", host, port),)


@dataclass(frozen=True)
class PromptBuilder:
    """Turns token ids into prompts to submit, with what the request as a whole carries."""

    context: Context
    fields: RequestFields
    prefills: tuple[str, ...]
    rid: str

    def build(
        self,
        tokens: list[int],
        wishes: Wishes,
        index: int,
        count: int,
        *,
        field: str,
        default_max_tokens: int | None = None,
        logprob_start: int = -1,
        prompt_top_logprobs: int = 0,
        shown_tokens: frozenset[int] = frozenset(),
    ) -> Prompt:
        """`field` is the prompt's name in this API, for errors."""
        limits = self.context.served.limits
        if not -(1 << 31) <= (self.fields.priority or 0) < 1 << 31:
            raise RequestError(f"priority must be a 32-bit number, got {self.fields.priority}", param="priority")
        if not tokens:
            raise RequestError(f"{field} must not be empty", param=field)
        if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
            raise RequestError(f"{field} must be token ids from 0 to {limits.vocab_size - 1}", param=field)
        most = self.context.limits.prompts
        if count * wishes.n > most:
            raise RequestError(
                f"n times the number of prompts must be at most {most}, got {wishes.n} x {count}", param="n"
            )
        max_tokens = self._max_tokens(len(tokens), wishes, field, default_max_tokens)
        room = _room(self.fields, index, count)
        prefills = self.prefills
        if room >= 0:
            prefills += _bootstrap_endpoint(self.fields, index, count)
        sampling = wishes.sampling
        if index and not wishes.seeded:
            # Equal prompts of one batch are different draws, unless the client fixed them.
            sampling = msgspec.structs.replace(sampling, seed=mint_seed())
        score_only = max_tokens == 0
        max_tokens = max(1, max_tokens)  # one is always sampled: that of a scored prompt is dropped
        min_tokens = min(sampling.min_tokens, max_tokens)
        return Prompt(
            tokens=tokens,
            sampling=msgspec.structs.replace(sampling, max_tokens=max_tokens, min_tokens=min_tokens),
            rid=self._name(index, count),
            stop=wishes.stop,
            include_stop=wishes.include_stop,
            skip_special_tokens=wishes.skip_special_tokens,
            logprob_start=logprob_start,
            prompt_top_logprobs=prompt_top_logprobs,
            prefills=prefills,
            room=room,
            priority=self.fields.priority or 0,
            salt=self._salt(index, count),
            shown_tokens=shown_tokens,
            score_only=score_only,
            choices=wishes.n,
        )

    def _name(self, index: int, count: int) -> str:
        """The client's own for each prompt, or the request's with the prompt's number."""
        own = nth(self.fields.rid, index, count, "rid") if isinstance(self.fields.rid, list) else None
        return own or (self.rid if count == 1 else f"{self.rid}-{index}")

    def _salt(self, index: int, count: int) -> str:
        """Prompts share KV where both fields are the same."""
        parts = (nth(getattr(self.fields, name), index, count, name) for name in ("cache_salt", "extra_key"))
        return "\n".join(part for part in parts if part)

    def _max_tokens(self, prompt: int, wishes: Wishes, field: str, default: int | None) -> int:
        """The client's, else the model's or the API's default; without any, what context and pool have room for."""
        context = self.context.served.limits.context_length
        pool = self.context.engine.info.max_total_tokens
        if prompt >= context:
            raise RequestError(
                f"{field} has {prompt} tokens, but the model's context is {context} tokens, output included",
                param=field,
                code="context_length_exceeded",
            )
        if wishes.max_tokens_name:
            wanted = wishes.max_tokens or 0
            if prompt + wanted > context:
                raise RequestError(
                    f"{wishes.max_tokens_name} is {wanted} and {field} has {prompt} tokens: together they exceed "
                    f"the model's context of {context} tokens",
                    param=wishes.max_tokens_name,
                    code="context_length_exceeded",
                )
            return wanted
        # The scheduler refuses what can never fit, so a default must not ask for it.
        room = min(context, pool) - prompt if pool else context - prompt
        default = wishes.max_tokens if wishes.max_tokens is not None else default
        return max(1, room if default is None else min(default, room))


def mint_rid() -> str:
    return uuid.uuid4().hex


def request_id(http: Http, fields: RequestFields) -> str | None:
    """The client's id for the request as a whole; None where it gave none, or one for each prompt."""
    return (fields.rid if isinstance(fields.rid, str) else None) or http.request_id()
