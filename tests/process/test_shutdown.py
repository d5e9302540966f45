"""`pd up` ends as it is told: drained, at once, with its terminal, or killed; and never leaves a process behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from fault_kit import Ask, eventually, gone
from oracle import tiny_model
from up_kit import Running, running

pytestmark = pytest.mark.process

ROOT = str(Path(__file__).parents[2])
PROMPT = [value % 254 + 2 for value in range(40)]
LONG = 800  # tokens: some seconds
#: Half the processes of a pair, for what does not depend on it.
UNIFIED = ("--unified", "1")


@contextmanager
def cluster(folder: Path, *more: str, prefix: tuple[str, ...] = ()) -> Iterator[Running]:
    model = tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=1024)
    command = [*prefix, sys.executable, "-m", "pd", "up", model, "--port", "0", "--dtype", "float32"]
    command += ["--max-total-tokens", "20000", "--log-format", "json", *more]
    with running(command, folder / "up", PYTHONPATH=ROOT) as up:
        yield up


def processes(up: Running) -> list[psutil.Process]:
    """All that `pd up` started: instances of four processes each and the router."""
    found = psutil.Process(up.process.pid).children(recursive=True)
    assert len(found) in (5, 9), found
    return found


def streaming(up: Running) -> Ask:
    """A request whose first token has come and whose last has not."""
    ask = Ask(up.url, PROMPT, stream=True, max_tokens=LONG, deadline=60.0).start()
    assert ask.first.wait(20.0)
    assert not ask.outcome, ask
    return ask


def ended(all_of_them: list[psutil.Process], bound: float = 5.0) -> None:
    eventually(
        lambda: all(gone(one) for one in all_of_them), bound, lambda: [one for one in all_of_them if not gone(one)]
    )


def test_sigterm_lets_a_stream_end_with_all_its_tokens(tmp_path: Path) -> None:
    with cluster(tmp_path) as up:
        whole = Ask(up.url, PROMPT, stream=False, max_tokens=LONG, deadline=60.0).start().wait()
        everyone, ask = processes(up), streaming(up)
        assert up.stop() == 0
        ask.wait()
        assert (ask.outcome, ask.finish, ask.text) == ("tokens", "length", whole.text), ask
        ended(everyone)


def test_a_second_sigterm_kills_at_once(tmp_path: Path) -> None:
    with cluster(tmp_path, *UNIFIED) as up:
        everyone, ask = processes(up), streaming(up)
        up.process.send_signal(signal.SIGTERM)
        eventually(lambda: up.logged("cluster_stopping"), 10.0)
        assert not ask.outcome, ask
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(5.0) == -signal.SIGTERM
        ended(everyone)
        assert ask.wait().outcome == "cut", ask


def test_ctrl_c_in_a_terminal_ends_every_process(tmp_path: Path) -> None:
    with cluster(
        tmp_path, *UNIFIED, prefix=("setsid",)
    ) as up:  # the foreground group of a terminal: a group of its own
        everyone = processes(up)
        assert {os.getpgid(one.pid) for one in everyone} == {up.process.pid}
        os.killpg(up.process.pid, signal.SIGINT)
        assert up.process.wait(30.0) == 0
        ended(everyone)


def test_kill_9_of_pd_up_leaves_no_process_behind(tmp_path: Path) -> None:
    with cluster(tmp_path, *UNIFIED) as up:
        everyone, ask = processes(up), streaming(up)
        up.process.kill()
        ended(everyone)
        assert ask.wait().outcome == "cut", ask
