"""Log lines: their form, their identity, and what must never be in them."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Iterator

import pytest

from pd import logs
from pd.config import LogConfig
from tests.log_kit import Terminal, logs_as_before

SECRET = 'tr"ï\\x secret'


@pytest.fixture(autouse=True)
def _logs_are_as_before() -> Iterator[None]:
    with logs_as_before():
        yield


def test_without_a_terminal_every_line_is_one_json_object_that_says_who_speaks() -> None:
    stream = io.StringIO()
    logs.configure("scheduler", "decode-0", LogConfig(), stream=stream)
    logs.get_logger(peer="p0").warning("peer_lost", reason="it\ndied", count=3)
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "role": "scheduler",
        "instance": "decode-0",
        "level": "warning",
        "event": "peer_lost",
        "peer": "p0",
        "reason": "it\ndied",
        "count": 3,
    }


@pytest.mark.parametrize(
    ("log_format", "stream", "human"),
    [
        ("auto", Terminal(), True),
        ("auto", io.StringIO(), False),
        ("json", Terminal(), False),
        ("human", io.StringIO(), True),
    ],
)
def test_the_form_follows_the_terminal_unless_it_was_chosen(log_format: str, stream: io.StringIO, human: bool) -> None:
    logs.configure("router", "", LogConfig(log_format=log_format), stream=stream)
    logs.get_logger().info("ready")
    assert stream.getvalue().startswith("{") is not human
    assert "ready" in stream.getvalue() and "instance" not in stream.getvalue()


def test_lines_below_the_level_are_not_written() -> None:
    stream = io.StringIO()
    logs.configure("api", "", LogConfig(log_level="warning"), stream=stream)
    logs.get_logger().info("quiet")
    logs.get_logger().warning("loud")
    assert "quiet" not in stream.getvalue() and "loud" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_a_secret_is_seen_nowhere_not_even_in_a_traceback(log_format: str) -> None:
    @dataclasses.dataclass
    class Config:
        cluster_secret: str

    stream = io.StringIO()
    logs.configure("api", "", LogConfig(log_format=log_format), stream=stream, secrets=(SECRET,))
    log = logs.get_logger()
    log.info("started", config=Config(SECRET), text=f"with {SECRET}", cluster_secret="other-value")
    try:
        raise ValueError(f"bad secret {SECRET}")
    except ValueError:
        log.exception("failed")
    logging.getLogger("library").error("its complaint about %s", SECRET)
    text = stream.getvalue()
    assert text.count("***") >= 4
    for form in (SECRET, repr(SECRET)[1:-1], json.dumps(SECRET)[1:-1], "other-value"):
        assert form not in text
    assert "ValueError: bad secret ***" in text


def test_libraries_that_use_logging_appear_in_the_same_form_from_warning_on() -> None:
    stream = io.StringIO()
    logs.configure("api", "a", LogConfig(log_level="debug"), stream=stream)
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("httpx").warning("trouble %d", 7)
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert (event["event"], event["role"], event["level"]) == ("trouble 7", "api", "warning")


def test_a_value_that_json_does_not_know_is_written_as_text() -> None:
    stream = io.StringIO()
    logs.configure("api", "", LogConfig(), stream=stream)
    logs.get_logger().info("x", value={1, 2}, error=OSError("no"))
    assert json.loads(stream.getvalue())["error"] == "no"
