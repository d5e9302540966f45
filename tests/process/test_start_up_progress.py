"""What a person at a terminal sees while an instance starts, and what a log file gets instead."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from up_kit import STOP_TIMEOUT, environment

from tests.oracle import tiny_model

pytestmark = pytest.mark.process

ROOT = str(Path(__file__).parents[2])
BOUND = 120.0


def command(folder: Path, what: str, *more: str) -> list[str]:
    model = tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=1024)
    return [sys.executable, "-m", "pd", what, model, "--port", "0", "--max-total-tokens", "2000", *more]


def in_terminal(argv: Sequence[str], until: str) -> str:
    """What a terminal of 100 columns is sent until that comes, and the command is ended."""
    master, slave = pty.openpty()
    env = environment(PYTHONPATH=ROOT, TERM="xterm-256color", COLUMNS="100", LINES="40")
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave, env=env)
    os.close(slave)
    seen, end = b"", time.monotonic() + BOUND
    try:
        while re.search(until, plain(seen.decode(errors="replace"))) is None:
            assert time.monotonic() < end and process.poll() is None, seen.decode(errors="replace")
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 65536)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            assert time.monotonic() < end
            if select.select([master], [], [], 0.1)[0]:
                try:
                    os.read(master, 65536)
                except OSError:  # nobody has the terminal open any more
                    break
        assert process.wait(STOP_TIMEOUT) == 0
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT)
        os.close(master)
    return seen.decode(errors="replace")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_a_bar_of_each_stage_until_the_instance_is_ready(tmp_path: Path) -> None:
    sent = in_terminal(command(tmp_path, "serve"), r"\bready\b.*url=")
    shown = plain(sent)
    places = [shown.index(stage) for stage in ("weights ", "KV pool ", "kernels ")]
    assert places == sorted(places) and "━" in shown
    assert re.search(r"weights .*━.*\S+ kB/\S+ kB", shown)
    ready = re.search(r"\bready\b.*url=", shown)
    assert ready is not None and "━" not in shown[ready.start() :], "the bar is gone"
    assert re.search(r"model loaded .*seconds=", shown), "log lines come through"
    assert sent.rfind("\x1b[?25h") > sent.rfind("\x1b[?25l"), "the cursor is there"


def test_a_terminal_shows_a_bar_of_each_member_of_a_cluster(tmp_path: Path) -> None:
    shown = plain(in_terminal(command(tmp_path, "up"), r"cluster_ready"))
    for member in ("prefill-0", "decode-0"):
        assert re.search(rf"{member} (weights|KV pool|kernels) .*━", shown), shown
    assert "━" not in shown[shown.index("cluster_ready") :]


def test_without_a_terminal_there_are_lines_and_nothing_that_moves_a_cursor(tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            command(tmp_path, "serve"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment(PYTHONPATH=ROOT, TERM="xterm-256color"),
        )
    try:
        end = time.monotonic() + BOUND
        while '"url"' not in (said := (tmp_path / "stderr").read_text()):
            assert time.monotonic() < end and process.poll() is None, said
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT) == 0
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT)
    assert "\x1b" not in said and "━" not in said
    events = [json.loads(line)["event"] for line in said.splitlines()]
    assert {"loading model", "model loaded", "kv pool", "ready"} <= set(events)
