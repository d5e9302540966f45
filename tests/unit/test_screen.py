"""What is shown of a start-up: lines, bars, and lines above bars."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator

import pytest

from pd import logs
from pd.config import LogConfig
from pd.screen import GRAPHS, KERNELS, WEIGHTS, BarScreen, LineScreen, Relay, Stage, amount, open_screen
from tests.log_kit import Terminal, logs_as_before


@pytest.fixture(autouse=True)
def _logs_are_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with logs_as_before():
        yield


def plain(text: str) -> str:
    """Without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_amounts_are_bytes_of_weights_and_counts_of_everything_else() -> None:
    assert amount(WEIGHTS, 3_210_000_000, 16_060_000_000) == "3.2 GB/16.1 GB"
    assert amount(WEIGHTS, 3_210_000_000, 0) == "3.2 GB"
    assert amount(GRAPHS, 12, 35) == "12/35"
    assert amount(GRAPHS, 0, 0) == "0"


def test_a_bar_needs_a_terminal_that_can_move_its_cursor_and_logs_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_screen(LogConfig(), Terminal()), BarScreen)
    assert isinstance(open_screen(LogConfig(), io.StringIO()), LineScreen)
    assert isinstance(open_screen(LogConfig(log_format="human"), io.StringIO()), LineScreen)
    assert isinstance(open_screen(LogConfig(log_format="json"), Terminal()), LineScreen)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_screen(LogConfig(), Terminal()), LineScreen)


def test_without_a_terminal_progress_is_lines_and_not_too_many() -> None:
    stream = io.StringIO()
    logs.configure("up", "", LogConfig(), stream=stream)
    often, seldom = LineScreen(stream, interval=0.0), LineScreen(stream, interval=60.0)
    often.progress("decode-0", WEIGHTS, 0, 2_000_000_000)
    often.progress("decode-0", WEIGHTS, 500_000_000, 2_000_000_000)
    often.progress("", GRAPHS, 3, 35)
    for done in range(100):
        seldom.progress("", GRAPHS, done, 100)
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line.get("member"), line["stage"], line["done"]) for line in said] == [
        ("starting", "decode-0", "weights", "0 bytes/2.0 GB"),
        ("starting", "decode-0", "weights", "500.0 MB/2.0 GB"),
        ("starting", None, "CUDA graphs", "3/35"),
    ]


def test_in_a_terminal_bars_say_who_is_where_and_go_when_all_have_started() -> None:
    terminal = Terminal()
    screen = BarScreen(terminal)
    screen.progress("prefill-0", WEIGHTS, 1_000_000_000, 4_000_000_000)
    screen.progress("decode-0", KERNELS, 2, 5)
    shown = plain(terminal.getvalue())
    assert re.search(r"prefill-0 weights .*━.* 1\.0 GB/4\.0 GB", shown)
    assert re.search(r"decode-0 kernels .*━.* 2/5", shown)
    screen.started("prefill-0")
    screen.progress("decode-0", GRAPHS, 0, 0)
    assert "decode-0 CUDA graphs" in plain(terminal.getvalue())
    screen.started("decode-0")
    screen.started("router")  # had no progress
    before = len(terminal.getvalue())
    screen.write("ready\n")
    assert terminal.getvalue()[before:] == "ready\n", "nothing is drawn any more"
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l"), "the cursor is there"


def test_lines_of_this_process_and_its_children_come_whole_above_the_bar() -> None:
    terminal = Terminal()
    screen = BarScreen(terminal)
    logs.configure("unified", "", LogConfig(), stream=screen.stream)
    screen.progress("", WEIGHTS, 0, 1)
    long = "a line that is longer than the terminal is wide " * 4
    logs.get_logger().info("model_found", path="/models/x")
    screen.lines(f"\x1b[32m{long}\x1b[0m\nand another\n".encode())
    shown = plain(terminal.getvalue())
    for line in ("model_found", "path", long, "and another"):
        assert line in shown
    assert shown.rindex("weights") > shown.index("and another"), "the bar is drawn again below"
    screen.started("")


def test_a_child_hands_on_what_it_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    Relay(io.StringIO(), lambda *said: told.append(said)).progress("", GRAPHS, 3, 35)
    assert told == [(GRAPHS, 3, 35)]


def test_a_stage_reports_its_begin_its_total_and_its_end_and_not_every_step_between() -> None:
    told: list[tuple[str, int, int]] = []
    stage = Stage(lambda *said: told.append(said), WEIGHTS, interval=60.0)
    for done in range(0, 1000, 100):
        stage(done, 1000)
    stage.end()
    assert told == [(WEIGHTS, 0, 0), (WEIGHTS, 0, 1000), (WEIGHTS, 1000, 1000)]
    eager = Stage(lambda *said: told.append(said), GRAPHS, 2, interval=0.0)
    eager(1, 2)
    eager(2, 2)
    assert told[3:] == [(GRAPHS, 0, 2), (GRAPHS, 1, 2), (GRAPHS, 2, 2)]
