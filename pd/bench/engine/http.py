"""The same load through HTTP: a router and an instance as `pd up` starts them, and a client in its own process."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from pd.bench.engine import cases
from pd.errors import PdError

#: Seconds for the cluster to start, for the load, and for the cluster to end.
START, LOAD, END = 300.0, 600.0, 60.0


def throughput(model: str, options: Sequence[str], folder: Path) -> float:
    """Output tokens per second of the throughput case, as streams of token ids. `options` go to `pd up`."""
    report = folder / "http.json"
    with cluster(model, options) as url:
        load = ["bench", "serve", url, "--endpoint", "generate", "--no-progress", "--json", str(report)]
        load += ["--rate", "inf", "--max-concurrency", str(cases.AT_ONCE), "--num-requests", str(cases.REQUESTS)]
        load += ["--input-len", str(cases.INPUT), "--output-len", str(cases.OUTPUT), "--warmup", "2"]
        done = subprocess.run(_pd(*load), capture_output=True, text=True, timeout=LOAD)
        if done.returncode:
            raise PdError(f"the load failed: {done.stderr.strip()[-500:]}")
    return out_tok_s(report.read_text())


def out_tok_s(report: str) -> float:
    """Of the only run in a report of `pd bench serve`. Raises PdError where a request failed."""
    (run,) = json.loads(report)["runs"]
    if run["completed"] != cases.REQUESTS:
        raise PdError(f"{cases.REQUESTS - run['completed']} requests failed through HTTP")
    return float(run["output_tok_s"])


@contextlib.contextmanager
def cluster(model: str, options: Sequence[str]) -> Iterator[str]:
    """The router's URL, once it is healthy; what was started ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(_pd("up", model, "--unified", "1", "--port", str(port), *options))
    try:
        deadline = time.monotonic() + START
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise PdError(f"pd up is not healthy after {START:g} s, or has ended")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _pd(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pd", *arguments]
