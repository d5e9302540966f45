"""What is answered, as types: operations answer with these, and the API's description is made of them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pd.types import Load


class ErrorDetail(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, kw_only=True):
    error: ErrorDetail


# --- describing -----------------------------------------------------------------------------------------------------


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "pd"
    parent: None = None


class ModelList(msgspec.Struct, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class HealthAnswer(msgspec.Struct, kw_only=True):
    status: Literal["ready"] = "ready"


class VersionAnswer(msgspec.Struct, kw_only=True):
    version: str


class ModelInfoAnswer(msgspec.Struct, kw_only=True):
    model_path: str
    tokenizer_path: str
    served_model_name: str
    max_model_len: int
    vocab_size: int
    is_generation: bool = True
    preferred_sampling_params: None = None


class RankLoad(msgspec.Struct, kw_only=True):
    """An entry of SGLang's /get_load. `num_tokens`: in use, and of prompts that wait."""

    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    dp_rank: int = 0


class LoadEntry(msgspec.Struct, kw_only=True):
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    max_running_requests: int
    utilization: float
    dp_rank: int = 0


class LoadSum(msgspec.Struct, kw_only=True):
    total_running_reqs: int
    total_waiting_reqs: int
    total_reqs: int
    total_used_tokens: int
    total_tokens: int
    avg_token_usage: float
    avg_utilization: float


class LoadsAnswer(msgspec.Struct, kw_only=True):
    timestamp: str
    version: str
    loads: list[LoadEntry]
    aggregate: LoadSum
    dp_rank_count: int = 1


def rank_load(load: Load, page_size: int) -> RankLoad:
    used = (load.total_blocks - load.free_blocks) * page_size
    return RankLoad(
        num_reqs=load.running + load.waiting, num_waiting_reqs=load.waiting, num_tokens=used + load.queued_tokens
    )


def loads(load: Load, page_size: int, max_running: int, *, timestamp: str, version: str) -> LoadsAnswer:
    usage = (load.total_blocks - load.free_blocks) / max(1, load.total_blocks)
    entry = LoadEntry(
        num_running_reqs=load.running,
        num_waiting_reqs=load.waiting,
        num_total_reqs=load.running + load.waiting,
        num_used_tokens=(load.total_blocks - load.free_blocks) * page_size,
        max_total_num_tokens=load.total_blocks * page_size,
        token_usage=round(usage, 4),
        max_running_requests=max_running,
        utilization=round(load.running / max(1, max_running), 4),
    )
    whole = LoadSum(
        total_running_reqs=entry.num_running_reqs,
        total_waiting_reqs=entry.num_waiting_reqs,
        total_reqs=entry.num_total_reqs,
        total_used_tokens=entry.num_used_tokens,
        total_tokens=entry.max_total_num_tokens,
        avg_token_usage=entry.token_usage,
        avg_utilization=entry.utilization,
    )
    return LoadsAnswer(timestamp=timestamp, version=version, loads=[entry], aggregate=whole)


# --- operating ------------------------------------------------------------------------------------------------------


class FlushAnswer(msgspec.Struct, kw_only=True):
    freed_blocks: int


class AbortAnswer(msgspec.Struct, kw_only=True):
    aborted: int


class PauseAnswer(msgspec.Struct, kw_only=True):
    message: str
    aborted: int
    paused: bool
    status: Literal["ok"] = "ok"


class ProfileAnswer(msgspec.Struct, kw_only=True):
    """`files`: the traces, on the host of the instance."""

    message: str
    files: list[str] = []
    success: bool = True


class TokenizeAnswer(msgspec.Struct, kw_only=True):
    """One prompt, or a list of them, as it was asked."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int
    token_strs: list[str | list[str]] | None = None


class DetokenizeAnswer(msgspec.Struct, kw_only=True):
    """`prompt` as vLLM has it, `text` as SGLang has it: they differ in the special tokens unless the request says."""

    prompt: str | list[str]
    text: str | list[str]


# --- generating -----------------------------------------------------------------------------------------------------


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class CompletionLogprobsAnswer(msgspec.Struct, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]
    top_logprobs: list[dict[str, float | None] | None] | None


class CompletionChoice(msgspec.Struct, kw_only=True, omit_defaults=True):
    index: int
    text: str
    logprobs: CompletionLogprobsAnswer | None
    finish_reason: str
    matched_stop: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionAnswer(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str
    matched_stop: str | int | None
    token_ids: list[int] | None = None


class ChatAnswer(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class GenerateAnswer(msgspec.Struct, kw_only=True):
    """For a list of prompts (or several outputs of one) a list of these."""

    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]
