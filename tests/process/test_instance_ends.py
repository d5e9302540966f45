"""`pd serve` ends as a whole when a part of it dies or freezes, and says which."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from fault_kit import Ask, child_name, eventually, find, gone
from oracle import tiny_model
from up_kit import Running, running

pytestmark = pytest.mark.process

ROOT = str(Path(__file__).parents[2])
PROMPT = [value % 254 + 2 for value in range(40)]
LONG = 800  # tokens: some seconds
PARTS = ("scheduler", "runner", "api")
#: Seconds until an instance whose part died or froze is gone; its own bounds are 3 s and 5 s, and 5 s for each part.
BOUND = 25.0


@contextmanager
def instance(folder: Path, *more: str, **env: str) -> Iterator[Running]:
    model = tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=1024)
    command = [sys.executable, "-m", "pd", "serve", model, "--port", "0", "--dtype", "float32"]
    command += ["--max-total-tokens", "4000", "--log-format", "json", *more]
    with running(command, folder / "serve", ready=r'"url": "(http://[^"]+)"', PYTHONPATH=ROOT, **env) as serve:
        yield serve


def test_a_gpus_number_that_a_variable_gives_to_a_cpu_is_accepted_and_said_to_have_no_effect(tmp_path: Path) -> None:
    with instance(tmp_path, PD_BASE_GPU_ID="1") as serve:
        (line,) = serve.logged("setting_without_effect")
        assert (line["setting"], line["level"]) == ("base_gpu_id", "warning")
        assert serve.stop() == 0


def parts(serve: Running) -> dict[str, psutil.Process]:
    """The children by name."""
    found = {child_name(child): child for child in psutil.Process(serve.process.pid).children()}
    assert sorted(found) == sorted(PARTS)
    return found


def streaming(serve: Running) -> Ask:
    """A request whose first token has come and whose last has not."""
    ask = Ask(serve.url, PROMPT, stream=True, max_tokens=LONG, deadline=60.0).start()
    assert ask.first.wait(20.0)
    assert not ask.outcome, ask
    return ask


def case(number: signal.Signals, name: str, last_words: str, *marks: pytest.MarkDecorator) -> object:
    return pytest.param(number, name, last_words, marks=marks, id=f"{number.name} of {name}")


@pytest.mark.parametrize(
    ("number", "name", "last_words"),
    [
        case(signal.SIGKILL, "runner", "runner: died (killed by SIGKILL)", pytest.mark.slow),
        case(signal.SIGSTOP, "runner", "the runner died: its connection is gone"),
        case(signal.SIGKILL, "scheduler", "scheduler: died (killed by SIGKILL)"),
        case(signal.SIGSTOP, "scheduler", "the scheduler is gone: its connection ended", pytest.mark.slow),
        case(signal.SIGKILL, "api", "api: died (killed by SIGKILL)", pytest.mark.slow),
        case(signal.SIGSTOP, "api", "api: died (killed by SIGKILL: its event loop gave no sign of life for 4 s)"),
    ],
)
def test_an_instance_whose_part_dies_or_freezes_ends_and_says_why(
    tmp_path: Path, number: signal.Signals, name: str, last_words: str
) -> None:
    more = ["--watchdog-timeout", "4"] if (name, number) == ("api", signal.SIGSTOP) else []
    with instance(tmp_path, *more) as serve:
        everyone, ask = parts(serve), streaming(serve)
        everyone[name].send_signal(number)
        assert serve.process.wait(BOUND) == 1
        assert ask.wait().outcome in ("error", "cut"), ask
        if name != "api":
            assert ask.problem, ask
        eventually(lambda: all(gone(one) for one in everyone.values()), 5.0, lambda: everyone)
        last = serve.stderr.splitlines()[-1]
        assert last.startswith("pd: ") and last_words in last, serve.stderr


@pytest.mark.parametrize("name", ["router", pytest.param("unified-0", marks=pytest.mark.slow)])
def test_a_member_of_a_cluster_that_freezes_is_replaced(tmp_path: Path, name: str) -> None:
    model = tiny_model(tmp_path, "llama", tokenizer=True, max_position_embeddings=1024)
    command = [sys.executable, "-m", "pd", "up", model, "--unified", "1", "--port", "0", "--dtype", "float32"]
    command += ["--max-total-tokens", "4000", "--log-format", "json", "--watchdog-timeout", "2"]
    with running(command, tmp_path / "up", PYTHONPATH=ROOT) as up:
        top = psutil.Process(up.process.pid)
        frozen = find(top, name)
        tree = [frozen, *frozen.children(recursive=True)]
        frozen.send_signal(signal.SIGSTOP)
        eventually(lambda: all(gone(one) for one in tree), 15.0, lambda: tree)
        eventually(lambda: len(up.logged("restarted")) == 1, BOUND, lambda: up.stderr)
        assert "no sign of life" in up.logged("restarting")[0]["how"]
        eventually(lambda: Ask(up.url, PROMPT, stream=False).start().wait().outcome == "tokens", BOUND)
