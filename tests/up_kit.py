"""`pd up`, `pd serve` and `pd route` as a user runs them: a process, its logs, its address, and a bounded end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT, STOP_TIMEOUT = 180.0, 60.0


def environment(**more: str) -> dict[str, str]:
    """One thread per numeric library, and nothing that points at a checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}


@dataclass
class Running:
    """One started command. `seconds`: from start to ready."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str = ""
    seconds: float = 0.0

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Log lines of this event, from whatever process of the tree."""
        lines = [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def instance(self, name: str) -> str:
        """The last known URL of an instance of `pd up`."""
        return str([line["url"] for line in self.logged("ready") if line["instance"] == name and "url" in line][-1])

    def metric(self, url: str, name: str) -> float:
        """One sample of `url`/metrics, by its name with labels."""
        text = httpx.get(f"{url}/metrics", timeout=10).text
        (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(value)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT)


@contextmanager
def running(
    command: Sequence[str | Path], folder: Path, *, ready: str = r"pd is ready at (http://[^\s]+?)\. ", **env: str
) -> Iterator[Running]:
    """Start `command` and wait until `ready` matches what it prints; its first group is the address."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, env=environment(**env))
    one = Running(process, folder)
    try:
        while (match := re.search(ready, one.stdout + one.stderr)) is None:
            assert process.poll() is None, one.stderr
            assert time.monotonic() - began < START_TIMEOUT, f"not ready: {one.stderr}"
            time.sleep(0.05)
        one.url, one.seconds = match[1], time.monotonic() - began
        yield one
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT)
            finally:
                process.kill()  # its children die with it
                process.wait(STOP_TIMEOUT)


def run(command: Sequence[str | Path], folder: Path, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """A command that ends by itself: exit code, stdout, stderr."""
    done = subprocess.run(
        command, cwd=folder, env=environment(**(env or {})), capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr
