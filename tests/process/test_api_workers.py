"""Several processes that speak HTTP for one instance, on one port."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from fault_kit import child_name, eventually, gone
from oracle import tiny_model
from up_kit import Running, environment, running

pytestmark = pytest.mark.process

ROOT = str(Path(__file__).parents[2])
WORKERS = 3
TOKENS = 5


def command(model: str, port: str) -> list[str]:
    line = [sys.executable, "-m", "pd", "serve", model, "--port", port, "--api-workers", str(WORKERS)]
    return [*line, "--max-total-tokens", "4000", "--log-format", "json"]


@contextmanager
def instance(tmp_path: Path) -> Iterator[Running]:
    model = tiny_model(tmp_path, "llama", tokenizer=True)
    with running(command(model, "0"), tmp_path / "serve", ready=r'"url": "(http://[^"]+)"', PYTHONPATH=ROOT) as found:
        yield found


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with instance(tmp_path_factory.mktemp("workers")) as found:
        yield found
        assert found.stop() == 0


def generate(url: str) -> str:
    """Over a connection of its own, which any worker may get. Returns the whole text of the stream."""
    sampling = {"max_new_tokens": TOKENS, "ignore_eos": True}
    body = {"input_ids": [5, 6, 7], "sampling_params": sampling, "stream": True}
    response = httpx.post(f"{url}/generate", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.text


def sample(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=10).text
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_workers_share_the_port_and_every_scrape_tells_of_all_of_them(serve: Running) -> None:
    asked = 60
    for _ in range(asked):
        assert generate(serve.url).endswith("data: [DONE]\n\n")
    served = {line["role"] for line in serve.logged("request_finished")}
    assert served == {f"api-{n}" for n in range(WORKERS)}, "each was asked: the kernel spreads connections"
    for _ in range(6):
        assert sample(serve.url, "pd_time_to_first_token_seconds_count") == asked
        assert sample(serve.url, "pd_inter_token_latency_seconds_count") == asked * (TOKENS - 1)


def test_every_worker_says_the_same_of_the_model(serve: Running) -> None:
    cards = [httpx.get(f"{serve.url}/v1/models", timeout=10).text for _ in range(20)]
    assert len(set(cards)) == 1, "each was asked: the kernel spreads connections"


def test_a_worker_that_dies_ends_the_instance(tmp_path: Path) -> None:
    with instance(tmp_path) as serve:
        children = {child_name(child): child for child in psutil.Process(serve.process.pid).children()}
        children["api-2"].kill()
        assert serve.process.wait(25) == 1
        assert "api-2: died (killed by SIGKILL)" in serve.stderr.splitlines()[-1]
        eventually(lambda: all(gone(child) for child in children.values()), 5.0, lambda: children)


def test_a_port_that_another_instance_shares_among_its_workers_is_taken(serve: Running, tmp_path: Path) -> None:
    port = serve.url.rpartition(":")[2]
    line = command(tiny_model(tmp_path, "llama", tokenizer=True), port)
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=60, env=environment(PYTHONPATH=ROOT), check=False
    )
    assert done.returncode == 2
    assert f"--port: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert generate(serve.url)
