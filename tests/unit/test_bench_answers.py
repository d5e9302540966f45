"""Server-sent events in any cut, and what an answer's events count for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pd.bench.serve.sse import Answer, NativeAnswer, OpenAiAnswer, SseParser

STREAM = "text/event-stream; charset=utf-8"


def event(payload: Any) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def piece(text: str | None, finish: str | None = None, **more: Any) -> bytes:
    return event({"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish, **more}], "usage": None})


def chat(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    details = None if cached is None else {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}
    return event({"choices": [], "usage": counts})


def native(text: str, tokens: int, finish: Any = None, ids: list[int] | None = None) -> bytes:
    meta = {"prompt_tokens": 9, "completion_tokens": tokens, "cached_tokens": 4, "finish_reason": finish}
    return event({"text": text, "output_ids": ids, "meta_info": meta})


def answered(answer: Answer, events: list[bytes], status: int = 200, kind: str = STREAM) -> Answer:
    """Event i arrives at second i + 1."""
    answer.head(status, kind)
    for index, data in enumerate(events):
        answer.body(data, index + 1.0)
    answer.settle()
    return answer


DONE = event("[DONE]")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_come_out_whole_however_the_stream_is_cut(size: int, end: bytes) -> None:
    lines = [": comment", "event: x", "data: {'a': 'grüße 🚀'}", ""]
    lines += ["data:second", "data: line", "", "", "id: 3", "", "data: x"]
    stream = end.join(line.encode() for line in lines) + end
    parser = SseParser()
    found = [payload for at in range(0, len(stream), size) for payload in parser.feed(stream[at : at + size])]
    assert found == ["{'a': 'grüße 🚀'}".encode(), b"second\nline"]  # the last event is not complete
    assert parser.feed(end) == [b"x"]


def test_multibyte_text_that_is_cut_inside_a_character_is_put_together() -> None:
    stream = piece("日本") + piece("🚀é", "stop") + usage(3, 2) + DONE
    answer = OpenAiAnswer(keep=True)
    answer.head(200, STREAM)
    for at in range(len(stream)):
        answer.body(stream[at : at + 1], float(at))
    answer.settle()
    assert "".join(answer.text) == "日本🚀é"
    assert answer.error_kind is None and answer.output_tokens == 2


def test_a_complete_answer_has_its_times_counts_and_usage() -> None:
    answer = answered(OpenAiAnswer(True), [piece("a"), piece("b"), piece("c", "length"), usage(7, 3, 4), DONE])
    assert list(answer.times) == [1.0, 2.0, 3.0]
    assert list(answer.counts) == [1, 1, 1]  # as many events as tokens
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (7, 3, 4)
    assert (answer.finish_reason, answer.finished_at, answer.error_kind) == ("length", 3.0, None)
    assert answer.text == ["a", "b", "c"]


def test_text_is_kept_only_on_demand() -> None:
    assert answered(OpenAiAnswer(), [piece("a", "stop"), DONE]).text == []


def test_token_ids_say_how_many_tokens_an_event_carries() -> None:
    events = [piece("ab", token_ids=[5, 6]), piece("", token_ids=[7]), piece("c", "length", token_ids=[8, 9, 10]), DONE]
    answer = answered(OpenAiAnswer(True), events)
    assert list(answer.counts) == [2, 1, 3]
    assert answer.token_ids == [5, 6, 7, 8, 9, 10]
    assert answer.output_tokens == 6


def test_usage_in_every_event_says_how_many_tokens_it_carries() -> None:
    def with_usage(text: str, total: int, finish: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "finish_reason": finish}
        return event({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": total}})

    answer = answered(OpenAiAnswer(), [with_usage("a", 2), with_usage("b", 3), with_usage("c", 6, "length"), DONE])
    assert list(answer.counts) == [2, 1, 3]


def test_events_without_a_count_stay_unknown_when_they_are_fewer_than_the_tokens() -> None:
    answer = answered(OpenAiAnswer(), [piece("ab"), piece("cd", "length"), usage(1, 4), DONE])
    assert list(answer.counts) == [0, 0]
    assert answer.output_tokens == 4


def test_an_empty_piece_is_a_token_whose_bytes_are_held_back() -> None:
    answer = answered(OpenAiAnswer(), [piece(""), piece("é"), piece("", "length"), usage(1, 2), DONE])
    assert list(answer.times) == [1.0, 2.0]
    assert answer.finished_at == 3.0


def test_a_last_token_without_text_is_seen_through_the_usage() -> None:
    answer = answered(OpenAiAnswer(), [piece("a"), piece("b"), piece("", "length"), usage(1, 3), DONE])
    assert list(answer.times) == [1.0, 2.0, 3.0]
    assert list(answer.counts) == [1, 1, 1]


def test_a_chat_answer_starts_with_its_first_content() -> None:
    events = [chat({"role": "assistant", "content": ""}), chat({"reasoning_content": "hm"}), chat({"content": "a"})]
    answer = answered(OpenAiAnswer(True), [*events, chat({}, "stop"), usage(1, 2), DONE])
    assert list(answer.times) == [2.0, 3.0]
    assert answer.text == ["hm", "a"]
    assert answer.finished_at == 4.0


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([piece("a"), piece("b")], "truncated"),
        ([piece("a"), piece("b", "stop")], "truncated"),
        ([piece("a"), DONE], "truncated"),
        ([], "truncated"),
        ([piece("a"), event({"error": {"message": "no memory", "code": 500}}), DONE], "stream_error"),
        ([piece("a"), piece("b", "abort"), DONE], "stream_error"),
        ([piece("a"), event("{not json"), DONE], "protocol"),
        ([event({"choices": [{"text": 5}]})], "protocol"),
    ],
)
def test_an_incomplete_answer_is_an_error_of_its_kind(events: list[bytes], kind: str) -> None:
    answer = answered(OpenAiAnswer(), events)
    assert answer.error_kind == kind and answer.error


def test_an_http_error_carries_the_servers_message() -> None:
    body = json.dumps({"error": {"message": "busy", "type": "x"}}).encode()
    answer = answered(OpenAiAnswer(), [body[:10], body[10:]], status=503, kind="application/json")
    assert (answer.error_kind, answer.error) == ("http_503", "busy")
    assert answered(OpenAiAnswer(), [b"<html>"], status=502, kind="text/html").error == "<html>"
    assert answered(OpenAiAnswer(), [b'{"detail": "no"}'], status=422, kind="application/json").error == "no"


def test_an_answer_that_is_no_stream_is_a_protocol_error() -> None:
    assert answered(OpenAiAnswer(), [b"{}"], kind="application/json").error_kind == "protocol"


def test_the_first_failure_counts() -> None:
    answer = OpenAiAnswer()
    answer.fail("timeout", "late")
    answer.settle()
    assert (answer.error_kind, answer.error) == ("timeout", "late")


def test_a_native_answer_counts_by_its_cumulative_tokens() -> None:
    events = [native("a", 1), native("abc", 3), native("abc", 3), native("abcd", 4, {"type": "length"}, [1, 2, 3, 4])]
    answer = answered(NativeAnswer(True), [*events, DONE])
    assert list(answer.times) == [1.0, 2.0, 4.0]
    assert list(answer.counts) == [1, 2, 1]
    assert answer.text == ["abcd"] and answer.token_ids == [1, 2, 3, 4]
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (9, 4, 4)
    assert (answer.finish_reason, answer.error_kind) == ("length", None)


def test_a_native_answer_can_fail() -> None:
    aborted = native("a", 1, {"type": "abort", "message": "gone"})
    assert answered(NativeAnswer(), [aborted, DONE]).error == "gone"
    assert answered(NativeAnswer(), [event({"error": {"message": "bad"}}), DONE]).error == "bad"
    assert answered(NativeAnswer(True), [native("a", 1)]).error_kind == "truncated"
    partial = answered(NativeAnswer(True), [native("ab", 2, "stop", [2]), DONE])
    assert partial.token_ids == [] and partial.error_kind is None  # only the new ids: not the answer
