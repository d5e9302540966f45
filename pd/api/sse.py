"""Server-sent events as preformatted bytes: per request a template, per chunk only the new text is encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pd.errors import RequestError

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


def event(value: Any) -> bytes:
    return b"data: %b\n\n" % encode(value)


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed after its first byte; no [DONE] follows."""
    return event(
        {
            "error": {
                "message": error.message,
                "type": error.kind,
                "param": error.param,
                "code": error.code if error.code is not None else error.status,
            }
        }
    )


class ChunkTemplate:
    """OpenAI stream chunks of one request, cut around what changes.

    `text_form` is the choice's text member, `text` for completions or the delta object for chat, as bytes around the
    JSON string: (b'"text":', b"") or (b'"delta":{"content":', b"}"). `empty` is the member of a chunk without text.
    """

    __slots__ = ("_after", "_before", "_empty", "_head", "_null_usage")

    def __init__(
        self,
        *,
        id: str,
        object: str,
        created: int,
        model: str,
        text_form: tuple[bytes, bytes],
        empty: bytes,
        null_usage: bool,
    ) -> None:
        common = encode({"id": id, "object": object, "created": created, "model": model})
        self._head = b'data: %b,"choices":[' % common[:-1]
        self._before, self._after = text_form
        self._empty = empty
        self._null_usage = b',"usage":null' if null_usage else b""

    def text(self, index: int, text: str) -> bytes:
        """The chunk of every ordinary token."""
        return b'%b{"index":%d,%b%b%b,"logprobs":null,"finish_reason":null}]%b}\n\n' % (
            self._head,
            index,
            self._before,
            encode(text),
            self._after,
            self._null_usage,
        )

    def chunk(
        self,
        index: int,
        *,
        text: str = "",
        member: bytes | None = None,
        extra: Mapping[str, Any] | None = None,
        outer: Mapping[str, Any] | None = None,
        logprobs: Any = None,
        finish: str | None = None,
        matched: str | int | None = None,
        usage: Any = None,
    ) -> bytes:
        """Any chunk. `member` replaces the text member (chat's role delta); `extra` are further members of the choice,
        `outer` of the chunk.
        """
        if member is None:
            member = b"%b%b%b" % (self._before, encode(text), self._after) if text else self._empty
        stop = b"" if finish is None else b',"matched_stop":%b' % encode(matched)
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b%b}]%b%b}\n\n' % (
            self._head,
            index,
            member,
            encode(logprobs),
            encode(finish),
            stop,
            b"," + encode(extra)[1:-1] if extra else b"",
            b"," + encode(outer)[1:-1] if outer else b"",
            self._null_usage if usage is None else b',"usage":%b' % encode(usage),
        )

    def usage(self, usage: Any) -> bytes:
        """The last chunk with `stream_options.include_usage`: no choices."""
        return b'%b],"usage":%b}\n\n' % (self._head, encode(usage))
