"""HTTP as values: requests as parsed, heads as written, the OpenAI error body. No sockets, no state."""

from __future__ import annotations

import http
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

#: Longest head (request line and headers, or status line and headers) that is read.
MAX_HEAD = 64 << 10

#: An `x-request-timeout` of so many seconds is none: workers refuse it.
MAX_TIMEOUT = 1e9

#: Names the prefill candidates to the decode instance: control endpoints in order, comma separated.
PREFILL_HEADER = b"x-pd-prefill"

#: Headers of one hop (RFC 9110, 7.6.1), those that the router writes itself, and `expect`, which it answers itself.
HOP_HEADERS = frozenset(
    [
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
        b"host",
        b"content-length",
        b"expect",
    ]
)

REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus} | {499: b"Client Closed Request"}

_KINDS = {401: "authentication_error", 404: "not_found_error"}


class HeaderMap(Mapping[str, str]):
    """Headers as a mapping, decoded only when somebody looks: most policies never do."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: list[tuple[bytes, bytes]]) -> None:
        self._pairs = pairs

    def __getitem__(self, name: str) -> str:
        wanted = name.lower().encode("latin-1")
        for key, value in self._pairs:
            if key == wanted:
                return value.decode("latin-1")
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter({key.decode("latin-1"): None for key, _ in self._pairs})

    def __len__(self) -> int:
        return len({key for key, _ in self._pairs})


@dataclass(slots=True)
class Request:
    """A client's request, complete. `headers` has lower-case names and what may be forwarded only."""

    method: bytes = b""
    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    request_id: bytes = b""
    old: bool = False  # HTTP/1.0: understands no chunks and gets its connection closed
    keep_alive: bool = True
    started: float = 0.0
    timeout: float | None = None  # what the client asked for, seconds
    extra: list[tuple[bytes, bytes]] = field(default_factory=list)  # headers of its answer: what a web page needs

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")

    def header(self, name: bytes) -> str:
        """The first of that name; "" without one."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response: what the router answers itself, and what it reads from workers off the hot path."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


def origin_form(target: bytes) -> bytes:
    """The path and query of a request target: a client may name the whole URL (RFC 9112, 3.2.2)."""
    scheme, found, rest = target.partition(b"://")
    if not found or scheme.lower() not in (b"http", b"https"):
        return target
    end = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    return rest[end:] if rest[end : end + 1] == b"/" else b"/" + rest[end:]


def parse_timeout(value: bytes) -> float | None:
    """Seconds of an `x-request-timeout`; None where it is malformed: the worker answers what is wrong with it."""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 < seconds < MAX_TIMEOUT else None


def error_body(status: int, message: str, code: str) -> bytes:
    """The OpenAI error body."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def error(status: int, message: str, code: str, *headers: tuple[bytes, bytes]) -> Response:
    return Response(status, error_body(status, message, code), headers=headers)


def error_event(status: int, message: str, code: str, *, open_event: bool) -> bytes:
    """An SSE event with the error, as one HTTP chunk. `open_event`: what came before did not end with a blank line."""
    event = (b"\n\n" if open_event else b"") + b"data: " + error_body(status, message, code) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def render(
    response: Response, *, close: bool, request_id: bytes = b"", extra: Sequence[tuple[bytes, bytes]] = ()
) -> bytes:
    """A whole response as bytes."""
    lines = [
        b"HTTP/1.1 %d %b\r\n" % (response.status, REASONS.get(response.status, b"")),
        b"content-type: %b\r\ncontent-length: %d\r\n" % (response.content_type.encode(), len(response.body)),
        *[b"%b: %b\r\n" % pair for pair in (*response.headers, *extra)],
    ]
    if request_id:
        lines.append(b"x-request-id: %b\r\n" % request_id)
    lines.append(b"connection: close\r\n\r\n" if close else b"\r\n")
    return b"".join(lines) + response.body


def forward_head(request: Request, host: bytes, prefills: bytes) -> bytes:
    """The head for a worker: the client's own headers, where it goes, who it is, which prefills it may ask."""
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (request.method, request.target, host)]
    lines += [b"%b: %b\r\n" % pair for pair in request.headers]
    lines.append(b"x-request-id: %b\r\n" % request.request_id)
    if prefills:
        lines.append(b"x-pd-prefill: %b\r\n" % prefills)
    if request.body or request.method == b"POST":
        lines.append(b"content-length: %d\r\n" % len(request.body))
    lines.append(b"\r\n")
    return b"".join(lines)


def _relayed(name: bytes) -> bool:
    return name not in HOP_HEADERS and not name.startswith(b"access-control-")


def relay_head(
    status: int, headers: list[tuple[bytes, bytes]], *, framing: tuple[tuple[bytes, bytes], ...], close: bool
) -> bytes:
    """A worker's head for the client. `framing` delimits the body: the worker's own, since it is relayed raw.

    What web pages may do is the router's to say.
    """
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, REASONS.get(status, b""))]
    lines += [b"%b: %b\r\n" % pair for pair in headers if _relayed(pair[0])]
    lines += [b"%b: %b\r\n" % pair for pair in framing]
    lines.append(b"connection: close\r\n\r\n" if close else b"\r\n")
    return b"".join(lines)
