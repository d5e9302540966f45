"""Rows to HTTP bodies, and what the target says about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from pd.bench.serve.client import Client
from pd.bench.serve.options import Options
from pd.bench.serve.plan import Row, Run
from pd.bench.serve.sse import Answer, NativeAnswer, OpenAiAnswer
from pd.bench.serve.tokens import DEFAULT_VOCAB_SIZE, WORDS, plain_range, prompt_tokens, words
from pd.errors import ConfigError

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
_INFO_PATHS = ("/server_info", "/get_server_info", "/get_model_info")
_AHEAD_BYTES = 64 << 20  # bodies that are encoded before they are due


@dataclass(frozen=True)
class Target:
    """What requests are built for."""

    model: str | None  # None: /generate does not name one
    token_range: tuple[int, int]  # prompt ids are drawn from [lo, hi)
    range_source: str  # where the range comes from, for the report


class SmallAnswer:
    """A Sink that collects one answer."""

    def __init__(self) -> None:
        self.status, self.data = 0, b""

    def head(self, status: int, content_type: str) -> None:
        self.status = status

    def body(self, data: bytes, now: float) -> None:
        self.data += data


async def discover(client: Client, options: Options) -> Target:
    """Ask the server for what the arguments leave open; raises ConfigError when the model's name stays unknown."""
    models: Any = None
    if options.model is None and options.endpoint != "generate":
        models = await _get_json(client, "/v1/models")
    model = options.model if options.model is not None else _first_model(models, options)
    if options.endpoint == "chat":
        return Target(model, (0, len(WORDS)), "word list")
    if options.token_range is not None:
        return Target(model, options.token_range, "--token-range")
    if options.vocab_size is not None:
        return Target(model, plain_range(options.vocab_size), f"--vocab-size {options.vocab_size}")
    size = _find_size(models)
    for path in _INFO_PATHS:
        if size is None:
            size = _find_size(await _get_json(client, path))
    source = f"the server's vocabulary of {size}" if size is not None else f"default vocabulary of {DEFAULT_VOCAB_SIZE}"
    return Target(model, plain_range(size if size is not None else DEFAULT_VOCAB_SIZE), source)


def _first_model(models: Any, options: Options) -> str | None:
    if options.endpoint == "generate":
        return None
    try:
        return str(models["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        problem = f"{options.url}/v1/models names no model"
        raise ConfigError("--model", problem, "check the server and --url, or give --model") from None


async def _get_json(client: Client, path: str) -> Any:
    """The decoded answer, or None: a server may lack the page."""
    answer = SmallAnswer()
    try:
        await client.get(path, answer)
        return msgspec.json.decode(answer.data) if answer.status == 200 else None
    except (OSError, msgspec.DecodeError):
        return None


def _find_size(document: Any, depth: int = 4) -> int | None:
    """The first positive integer named `vocab_size`, at most `depth` levels down."""
    if isinstance(document, dict):
        size = document.get("vocab_size")
        if isinstance(size, int) and size > 1:
            return size
    children = document.values() if isinstance(document, dict) else document if isinstance(document, list) else ()
    found = (_find_size(child, depth - 1) for child in children) if depth else iter(())
    return next((size for size in found if size is not None), None)


def path_of(options: Options) -> str:
    return _PATHS[options.endpoint]


def new_answer(options: Options) -> Answer:
    """An empty answer for the endpoint; it keeps text and ids only when they are recorded."""
    keep = options.record_path is not None
    return NativeAnswer(keep) if options.endpoint == "generate" else OpenAiAnswer(keep)


def prompt_of(row: Row, run: Run, target: Target, options: Options) -> list[int] | str:
    """The row's prompt: token ids, or words for chat. The same whenever it is called."""
    ids = prompt_tokens(row.hash_ids, row.input_len, row.block_len, run.token_seed, target.token_range)
    return words(ids) if options.endpoint == "chat" else ids.tolist()


def body_of(row: Row, run: Run, target: Target, options: Options) -> bytes:
    """The JSON body of the row's request."""
    prompt = prompt_of(row, run, target, options)
    if options.endpoint == "generate":
        sampling: dict[str, Any] = {"temperature": options.temperature, "max_new_tokens": row.output_len}
        if options.ignore_eos:
            sampling["ignore_eos"] = True
        return msgspec.json.encode({"input_ids": prompt, "sampling_params": sampling, "stream": True})
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": row.output_len,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if options.ignore_eos:  # not part of OpenAI's API: left out unless it is wanted
        body["ignore_eos"] = True
    if options.return_token_ids:
        body["return_token_ids"] = True
    return msgspec.json.encode(body)


class Ahead:
    """Bodies in order, encoded up to a bound of bytes before they are due.

    Encoding a long prompt takes milliseconds, which must not fall between a request's time and its sending; all of a
    long trace at once would not fit memory.
    """

    def __init__(self, rows: Iterator[Row], encode: Callable[[Row], bytes], limit: int = _AHEAD_BYTES) -> None:
        self._rows, self._encode, self._limit = rows, encode, limit
        self._ready: list[bytes] = []
        self._bytes = 0
        self._next = 0
        self.fill()

    def take(self) -> bytes:
        """The next body."""
        if self._next == len(self._ready):
            self.fill()
        body = self._ready[self._next]
        self._ready[self._next] = b""
        self._next += 1
        self._bytes -= len(body)
        return body

    def fill(self) -> None:
        """Encode until the bound is reached; at least one, if any is left."""
        while self._bytes < self._limit:
            row = next(self._rows, None)
            if row is None:
                return
            self._ready.append(self._encode(row))
            self._bytes += len(self._ready[-1])
