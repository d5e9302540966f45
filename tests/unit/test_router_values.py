"""What the router makes of bytes and settings, without a socket."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd.errors import ConfigError
from pd.router.http import HeaderMap, Request, error, error_event, forward_head, relay_head, render
from pd.router.metrics import BUCKETS, Histogram
from pd.router.prompt import Prompt, read_prompt
from pd.router.workers import parse_address


@pytest.mark.parametrize(
    ("body", "text", "ids"),
    [
        (b'{"prompt": "hello", "model": {"any": [1]}}', "hello", None),
        (b'{"prompt": ["one", "two"]}', "one", None),
        (b'{"prompt": [1, 2, 3]}', None, [1, 2, 3]),
        (b'{"prompt": [[1, 2], [3]]}', None, [1, 2]),
        (b'{"text": "hello"}', "hello", None),
        (b'{"text": ["one", "two"]}', "one", None),
        (b'{"input_ids": [[4, 5], [6]]}', None, [4, 5]),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "a\nb", None),
        (
            b'{"messages": [{"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]}',
            "a",
            None,
        ),
        (b'{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}', "", None),
        (b'{"prompt": ""}', "", None),
        (b'{"prompt": []}', None, None),
        (b'{"prompt": [1, "x"]}', None, None),
        (b'{"prompt": [true]}', None, None),
        (b'{"prompt": 7}', None, None),
        (b'{"messages": "no"}', None, None),
        (b"{}", None, None),
        (b"[]", None, None),
        (b"", None, None),
        (b'{"prompt": "cut', None, None),
        (b'{"prompt": "\xff"}', None, None),
        (b'{"prompt": ' + b"[" * 200_000, None, None),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_the_prompt_is_found_wherever_an_api_puts_it_and_nonsense_is_no_prompt(
    body: bytes, text: str | None, ids: list[int] | None
) -> None:
    assert read_prompt(body) == Prompt(text, ids)


@given(st.binary(max_size=60))
def test_no_body_makes_reading_the_prompt_fail(body: bytes) -> None:
    assert isinstance(read_prompt(body), Prompt)


def test_a_forwarded_head_says_where_who_and_how_long() -> None:
    request = Request(b"POST", b"/generate?a=1", [(b"x-a", b"1"), (b"x-a", b"2")], b"body", b"id-1")
    head = forward_head(request, b"[::1]:30000", b"tcp://p:1,tcp://q:2")
    assert head.split(b"\r\n") == [
        b"POST /generate?a=1 HTTP/1.1",
        b"host: [::1]:30000",
        b"x-a: 1",
        b"x-a: 2",
        b"x-request-id: id-1",
        b"x-pd-prefill: tcp://p:1,tcp://q:2",
        b"content-length: 4",
        b"",
        b"",
    ]
    assert b"x-pd-prefill" not in forward_head(request, b"h:1", b"")
    assert b"content-length" not in forward_head(Request(b"GET", b"/health_generate"), b"h:1", b"")


def test_a_relayed_head_drops_what_belongs_to_the_hop_and_keeps_the_rest() -> None:
    headers = [
        (b"connection", b"close"),
        (b"x-pd-prefill-used", b"p"),
        (b"content-length", b"9"),
        (b"set-cookie", b"a"),
    ]
    head = relay_head(200, headers, framing=((b"transfer-encoding", b"chunked"),), close=True)
    assert head == (
        b"HTTP/1.1 200 OK\r\nx-pd-prefill-used: p\r\nset-cookie: a\r\n"
        b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    )


def test_an_error_is_an_openai_error_body() -> None:
    raw = render(error(503, "nobody there", "no_worker", (b"retry-after", b"1")), close=False, request_id=b"r")
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"retry-after: 1" in head
    assert f"content-length: {len(body)}".encode() in head and b"x-request-id: r" in head
    assert json.loads(body) == {
        "error": {"message": "nobody there", "type": "server_error", "param": None, "code": "no_worker"}
    }


@pytest.mark.parametrize("open_event", [True, False])
def test_an_error_event_is_one_whole_chunk_and_closes_an_open_event_first(open_event: bool) -> None:
    size, _, rest = error_event(502, "gone", "worker_failed", open_event=open_event).partition(b"\r\n")
    event = rest[: int(size, 16)]
    assert rest[int(size, 16) :] == b"\r\n"
    assert event.startswith(b"\n\ndata: {" if open_event else b"data: {") and event.endswith(b"}\n\n")


def test_headers_are_a_mapping_that_ignores_case() -> None:
    headers = HeaderMap([(b"x-a", b"1"), (b"x-b", b"\xe9"), (b"x-a", b"2")])
    assert headers["X-A"] == "1" and headers.get("x-b") == "\xe9" and headers.get("x-c") is None
    assert dict(headers) == {"x-a": "1", "x-b": "\xe9"} and len(headers) == 2


def test_histogram_buckets_are_upper_bounds_and_cumulate() -> None:
    histogram = Histogram()
    for value in (0.0, BUCKETS[0], BUCKETS[0] + 1e-9, 1e9):
        histogram.observe(value)
    samples = {s.labels.get("le", s.name): s.value for s in histogram.family("h", "help").samples}
    assert samples[str(BUCKETS[0])] == 2 and samples[str(BUCKETS[1])] == 3 and samples["+Inf"] == 4
    assert samples["h_count"] == 4 and samples["h_sum"] > 1e9


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://a:1", "http://a:1"),
        ("http://a", "http://a:80"),
        ("http://a:1/", "http://a:1"),
        ("http://[::1]:5", "http://[::1]:5"),
    ],
)
def test_worker_urls_are_brought_to_one_form(url: str, normal: str) -> None:
    assert parse_address("--decode", url).url == normal


@pytest.mark.parametrize("url", ["a:1", "ftp://a:1", "http://a:1/v1", "http://:1", "http://a:x", "http://a:99999", ""])
def test_a_bad_worker_url_is_named_with_its_flag(url: str) -> None:
    with pytest.raises(ConfigError, match="--decode: ") as caught:
        parse_address("--decode", url)
    assert repr(url) in str(caught.value)
