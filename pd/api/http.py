"""One HTTP request over raw ASGI: bounded body, JSON and event-stream answers, the client's disconnect.

There is no framework between a step's tokens and the socket: a streamed chunk is one call into the server.
"""

from __future__ import annotations

import math
import re
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from pd.errors import RequestError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

T = TypeVar("T")

_FIELD_OF_ERROR = re.compile(r" - at `\$\.?([^`]*)`$")
_UNFIT = re.compile(rb"[^\x20-\x7e]")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")

_KINDS = {401: "authentication_error", 404: "not_found_error", 501: "server_error", 503: "server_error"}


def header_value(text: str) -> bytes:
    """`text`, which may be a client's, as far as it is fit for a header."""
    return _UNFIT.sub(b"?", text[:256].encode("latin-1", "replace"))


class ClientDisconnected(Exception):
    """The client went away before its request was complete. Nobody is left to answer."""


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def http_error(status: int, message: str, code: str) -> RequestError:
    return RequestError(message, status=status, kind=_KINDS.get(status, "invalid_request_error"), code=code)


class Http:
    """Read by one task; `until_disconnect` may run beside it once the body has been read."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.started = False
        self.extra_headers: Headers = []  # of whatever answer is given
        self._scope, self._receive, self._send = scope, receive, send

    @cached_property
    def headers(self) -> dict[str, str]:
        """Lower-case names. Of a repeated header all values, joined by commas."""
        found: dict[str, str] = {}
        for raw_name, raw_value in self._scope["headers"]:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            found[name] = f"{found[name]},{value}" if name in found else value
        return found

    @cached_property
    def query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self._scope["query_string"].decode("latin-1"), keep_blank_values=True))

    def request_id(self) -> str | None:
        """`x-request-id` where it is fit to be repeated in headers and logs."""
        value = self.headers.get("x-request-id", "")
        return value if _REQUEST_ID.fullmatch(value) else None

    def timeout_s(self) -> float | None:
        """`x-request-timeout` in seconds."""
        value = self.headers.get("x-request-timeout")
        if value is None:
            return None
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < 1e9:
            raise RequestError(
                f"x-request-timeout must be a positive number of seconds, got {value!r}", param="x-request-timeout"
            )
        return seconds

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises RequestError 413 beyond `limit` bytes, ClientDisconnected."""
        announced = self.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise http_error(413, f"the request body exceeds {limit} bytes", "body_too_large")
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise http_error(413, f"the request body exceeds {limit} bytes", "body_too_large")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def json(self, decoder: msgspec.json.Decoder[T], limit: int, *, empty: bytes = b"") -> T:
        """The body as the decoder's type; `empty` stands for one that is not there. Raises RequestError naming the
        field at fault.
        """
        media = self.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if media != "application/json" and not media.endswith("+json"):
            raise http_error(415, f"the request body must be application/json, got {media!r}", "unsupported_media_type")
        data = await self.body(limit)
        try:
            return decoder.decode(data or empty)
        except msgspec.ValidationError as error:
            raise validation_error(error) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"the request body is not valid JSON: {error}", code="invalid_json") from error

    async def until_disconnect(self) -> None:
        """Returns when the client has gone (or the answer is complete)."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self.extra_headers})

    async def write(self, data: bytes) -> None:
        """Returns when the server has taken it, which waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def respond(
        self, status: int, body: bytes, content_type: str = "application/json", headers: Headers | None = None
    ) -> None:
        fixed = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
        await self.start(status, fixed + (headers or []))
        await self.end(body)

    async def respond_json(self, status: int, value: Any, headers: Headers | None = None) -> None:
        await self.respond(status, msgspec.json.encode(value), headers=headers)

    async def respond_error(self, error: RequestError, headers: Headers | None = None) -> None:
        await self.respond_json(error.status, error_body(error), headers)


def validation_error(error: msgspec.ValidationError) -> RequestError:
    """msgspec says where: "Expected `float`, got `str` - at `$.temperature`"."""
    text = str(error)
    found = _FIELD_OF_ERROR.search(text)
    name = found.group(1) if found else None
    if name is None:
        return RequestError(text)
    return RequestError(f"{name}: {text[: found.start()] if found else text}", param=name or None)
