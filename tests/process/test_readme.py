"""The README is true: its commands run, its curl lines are answered, its tables name what is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from up_kit import Running, environment, running

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: What follows `pd up` in `make up`, on any port and with a small KV pool.
UP = [sys.executable, "-m", "pd", "up", "--port", "0", "--max-total-tokens", "20000"]
#: Seconds for any start but a machine's first, which compiles bytecode and reads torch from disk.
SECOND_START = 15.0


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(text: str) -> list[str]:
    """The lines of the shell blocks (those without a language), continued lines joined, comments dropped."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


CURLS = [line for line in commands(section("Quick start")) if line.startswith("curl")]


def up(folder: Path) -> Iterator[Running]:
    with running(UP, folder, PYTHONPATH=str(ROOT)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from up(tmp_path_factory.mktemp("up"))


def answer(curl: str, url: str) -> str:
    """What the line prints when it is aimed at `url`."""
    words = shlex.split(curl.replace("http://127.0.0.1:8000", url))
    done = subprocess.run([*words, "--silent", "--show-error", "--fail"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (curl, done.stderr)
    return done.stdout


def test_there_are_curl_lines_for_every_way_to_ask() -> None:
    paths = {match[1] for line in CURLS if (match := re.search(r":8000(/\S+)", line))}
    assert {"/v1/chat/completions", "/v1/completions", "/generate", "/health", "/server_info", "/metrics"} <= paths


@pytest.mark.parametrize("curl", CURLS, ids=lambda line: re.search(r":8000(/\S+)", line)[1])  # type: ignore[index]
def test_a_curl_line_of_the_quick_start_is_answered(cluster: Running, curl: str) -> None:
    text = answer(curl, cluster.url)
    if "/chat/" in curl:
        assert "7" in json.loads(text)["choices"][0]["message"]["content"]
    elif "/v1/completions" in curl:
        assert text.startswith("data: {") and text.rstrip().endswith("data: [DONE]")
    elif "/generate" in curl:
        assert json.loads(text)["meta_info"]["completion_tokens"] > 0
    else:
        assert text


def test_the_line_that_pd_up_prints_is_answered(cluster: Running) -> None:
    (line,) = [line.strip() for line in cluster.stdout.splitlines() if line.strip().startswith("curl ")]
    assert "7" in json.loads(answer(line, cluster.url))["choices"][0]["message"]["content"]


def test_a_second_start_is_ready_in_time(cluster: Running, tmp_path: Path) -> None:
    with running(UP, tmp_path, PYTHONPATH=str(ROOT)) as second:
        assert second.seconds <= SECOND_START


def test_every_pd_command_of_the_readme_has_only_flags_that_exist() -> None:
    lines = [line for line in commands(README) if re.match(r"(\.venv/bin/)?pd ", line)]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.replace("/models/Llama", "/nowhere/Llama"))[1:]
        words = [word for word in words if word != "..."]
        done = subprocess.run(
            [sys.executable, "-m", "pd", *words, "--no-such-flag"],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr.partition(":")[2].split(":")[0]) == (2, " --no-such-flag"), line
