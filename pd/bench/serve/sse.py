"""Server-sent events and what their payloads say, for the OpenAI endpoints and SGLang's /generate.

This is the client's hot path (one call per token): bytes in, a few appended numbers out, no object kept per token.
"""

from __future__ import annotations

import abc
from array import array
from typing import Any

import msgspec

_ERROR_BODY_LIMIT = 4096  # bytes of an error answer that are kept


class SseParser:
    """Splits a byte stream into the `data` of its events. Lines may end with LF or CRLF, and be cut anywhere."""

    __slots__ = ("_data", "_tail")

    def __init__(self) -> None:
        self._tail = b""  # the line that is not complete yet
        self._data: list[bytes] = []  # data lines of the event that is not complete yet

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads of the events that `chunk` completes."""
        if self._tail:
            chunk = self._tail + chunk
        lines = chunk.split(b"\n")
        self._tail = lines.pop()
        events: list[bytes] = []
        for line in lines:
            if line[:5] == b"data:":
                self._data.append(line[5:].strip())
            elif not line or line == b"\r":
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
        return events


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Meta(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: Any = None


class _NativeChunk(msgspec.Struct):
    meta_info: _Meta | None = None
    error: Any = None


class _NativeOutput(msgspec.Struct):
    text: str | None = None
    output_ids: list[int] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_native = msgspec.json.Decoder(_NativeChunk).decode
_decode_native_output = msgspec.json.Decoder(_NativeOutput).decode


class Answer(abc.ABC):
    """One streamed answer as its bytes arrive (the client's `Sink`), and afterwards the facts about it.

    `times` holds the arrival (time.perf_counter, seconds) of every event that carries output; `counts` how many tokens
    each carried, 0 where the server does not say.
    """

    __slots__ = (
        "_body",
        "_content_type",
        "_finish_only",
        "_keep",
        "_known",
        "_sse",
        "_total",
        "cached_tokens",
        "completion_tokens",
        "counts",
        "done",
        "error",
        "error_kind",
        "finish_reason",
        "finished_at",
        "prompt_tokens",
        "status",
        "text",
        "times",
        "token_ids",
    )

    def __init__(self, keep: bool = False) -> None:
        self.status = 0
        self.times = array("d")
        self.counts = array("l")
        self.text: list[str] = []  # pieces; filled only when `keep`
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.finished_at = 0.0
        self.done = False  # the [DONE] mark came
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.error_kind: str | None = None
        self.error = ""
        self._keep = keep
        self._sse = SseParser()
        self._body = b""
        self._content_type = ""
        self._finish_only = 0.0  # arrival of an event that said only that the answer is finished
        self._known = True  # every event so far said how many tokens it carried
        self._total = 0  # tokens so far, an unknown count taken as 1

    # ---- the client's Sink

    def head(self, status: int, content_type: str) -> None:
        self.status, self._content_type = status, content_type

    def body(self, data: bytes, now: float) -> None:
        if self.status != 200 or (self._content_type and "event-stream" not in self._content_type):
            self._body = (self._body + data)[:_ERROR_BODY_LIMIT]
            return
        for payload in self._sse.feed(data):
            if payload == b"[DONE]":
                self.done = True
            else:
                try:
                    self._event(payload, now)
                except msgspec.DecodeError as error:  # ValidationError included
                    self.fail("protocol", f"{error}: {payload[:120]!r}")

    # ---- outcome

    def fail(self, kind: str, message: str) -> None:
        """The first failure counts; what follows from it is not another one."""
        if self.error_kind is None:
            self.error_kind, self.error = kind, message

    def settle(self) -> None:
        """Call once when the exchange is over: turns an incomplete answer into an error and completes the counts."""
        if self.status == 0:
            self.fail("protocol", "no answer")
        elif self.status != 200:
            self.fail(f"http_{self.status}", _message(_json_or_text(self._body)))
        elif self._content_type and "event-stream" not in self._content_type:
            self.fail("protocol", f"{self._content_type} instead of an event stream: {_message(self._body)}")
        elif self.finish_reason is None:
            self.fail("truncated", "the stream ended without a finish reason")
        elif not self.done:
            self.fail("truncated", "the stream ended without [DONE]")
        # The last token may have come with the finish reason in an event without text.
        if self._finish_only and (not self.times or self.completion_tokens == self._total + 1):
            self._arrived(self._finish_only, 1 if self.times and self._known else 0)
        if not self._known and self.completion_tokens == len(self.times):
            self.counts = array("l", [1]) * len(self.times)

    @property
    def output_tokens(self) -> int:
        """Tokens that came: what the server reports, else known counts, else one per event."""
        if self.completion_tokens is not None and self.error_kind is None and self.done:
            return self.completion_tokens
        return self._total

    def _arrived(self, now: float, count: int) -> None:
        self.times.append(now)
        self.counts.append(count)
        self._known = self._known and count > 0
        self._total += count or 1

    @abc.abstractmethod
    def _event(self, payload: bytes, now: float) -> None:
        """One event's payload."""


class OpenAiAnswer(Answer):
    """/v1/completions and /v1/chat/completions."""

    __slots__ = ()

    def _event(self, payload: bytes, now: float) -> None:
        chunk = _decode_chunk(payload)
        if chunk.error is not None:
            self.fail("stream_error", _message(chunk.error))
            return
        reported = None
        if chunk.usage is not None:
            usage = chunk.usage
            reported = usage.completion_tokens
            self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.delta is None:
            text = choice.text
            held_back = text == "" and choice.finish_reason is None  # a token whose bytes are not a character yet
        else:
            text = choice.delta.content or choice.delta.reasoning_content
            held_back = False  # an empty delta only names the role
        if text or choice.token_ids or held_back:
            self._arrived(now, self._count(choice, reported))
        elif choice.finish_reason is not None:
            self._finish_only = now
        if choice.finish_reason is not None:
            self.finish_reason, self.finished_at = choice.finish_reason, now
            if choice.finish_reason in ("abort", "error"):
                self.fail("stream_error", f"the server ended the answer: {choice.finish_reason}")
        if self._keep:
            if text:
                self.text.append(text)
            if choice.token_ids:
                self.token_ids += choice.token_ids

    def _count(self, choice: _Choice, reported: int | None) -> int:
        """Tokens in this event: its ids, or the rise of a usage count that comes with every event; 0: not said."""
        if choice.token_ids:
            return len(choice.token_ids)
        if reported is not None and self._known:
            return max(0, reported - self._total)
        return 0


class NativeAnswer(Answer):
    """SGLang's /generate: every event repeats the whole text, so only the last one's is decoded, in `settle`."""

    __slots__ = ("_last",)

    def __init__(self, keep: bool = False) -> None:
        super().__init__(keep)
        self._last = b""

    def _event(self, payload: bytes, now: float) -> None:
        chunk = _decode_native(payload)
        meta = chunk.meta_info
        if chunk.error is not None or meta is None:
            self.fail("stream_error", _message(chunk.error or "an event without meta_info"))
            return
        self._last = payload
        before = self.completion_tokens
        self.prompt_tokens, self.completion_tokens = meta.prompt_tokens, meta.completion_tokens
        self.cached_tokens = meta.cached_tokens
        if meta.completion_tokens is None:
            self._arrived(now, 0)
        elif meta.completion_tokens > (before or 0):
            self._arrived(now, meta.completion_tokens - (before or 0))
        if meta.finish_reason is not None:
            reason = meta.finish_reason
            kind = str(reason.get("type")) if isinstance(reason, dict) else str(reason)
            self.finish_reason, self.finished_at = kind, now
            self._finish_only = now if not self.times else 0.0
            if kind in ("abort", "error"):
                self.fail("stream_error", _message(reason))

    def settle(self) -> None:
        super().settle()
        if self._keep and self._last:
            try:
                output = _decode_native_output(self._last)
            except msgspec.DecodeError as error:
                self.fail("protocol", str(error))
                return
            self.text = [output.text or ""]
            ids = output.output_ids or []
            # Some servers send only the new ids of each event; such a list is not the answer.
            self.token_ids = ids if len(ids) == self.completion_tokens else []


def _json_or_text(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body


def _message(error: Any) -> str:
    """The text of an error object of any server, at most 300 characters."""
    if isinstance(error, dict):
        inner = error.get("error", error.get("message", error.get("detail", error)))
        return _message(inner) if inner is not error else str(error)[:300]
    return (error.decode("utf-8", "replace") if isinstance(error, bytes) else str(error))[:300]
