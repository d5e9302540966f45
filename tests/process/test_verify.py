"""`pd verify` as a user runs it: against real clusters, sound and damaged."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_kit import ROOT, Deployment, deploy
from up_kit import environment

pytestmark = pytest.mark.process

COMMON = ("--page-size", "16", "--chunked-prefill-size", "64", "--max-total-tokens", "32768")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = ("--local-prefill", "never", "--transfer-memory", "shm")
    with deploy(tmp_path_factory.mktemp("pair"), "llama", *COMMON, *settings) as found:
        yield found


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deploy(tmp_path_factory.mktemp("unified"), "llama", "--unified", "1", "--max-total-tokens", "32768") as found:
        yield found


def verify(folder: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what it printed, and its JSON file."""
    file = folder / "found.json"
    command = [sys.executable, "-m", "pd", "verify", *arguments, "--json", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=environment(PYTHONPATH=ROOT), check=False
    )
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.exists() else {}


def test_a_sound_pair_equals_transformers(pair: Deployment, tmp_path: Path) -> None:
    code, text, found = verify(tmp_path, pair.url)
    assert code == 0, text
    assert found["differs"] == found["failed"] == found["tie"] == 0
    assert found["equal"] > 70 and not found["skipped"]
    assert {entry["round"] for entry in found["findings"]} == {"one by one", "all at once"}
    assert all(entry["prefill"] for entry in found["findings"] if entry["status"] == "equal")
    assert all(entry["worst"] < 1e-4 for entry in found["findings"])


def test_a_sound_pair_equals_one_instance(pair: Deployment, unified: Deployment, tmp_path: Path) -> None:
    code, text, found = verify(tmp_path, pair.url, "--reference", unified.url)
    assert code == 0, text
    assert found["differs"] == found["failed"] == found["skipped"] == 0 and found["equal"] > 70


def scribble(deployment: Deployment, url: str) -> None:
    """Overwrite the whole KV pool of the instance at `url`: it is a memfd of its runner."""
    port = int(url.rpartition(":")[2])
    (pid,) = {c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    parent = psutil.Process(pid).parent()
    assert parent is not None
    pools = []
    for child in parent.children(recursive=True):
        for link in Path(f"/proc/{child.pid}/fd").iterdir():
            if "memfd:pd-kv" in os.readlink(link) and child.cmdline()[-2] == "runner":
                pools.append(link)
    (pool, *_) = pools
    with pool.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:] = os.urandom(4096) * (len(memory) // 4096)


def test_damaged_kv_on_the_decode_instance_is_found_and_named(
    pair: Deployment, unified: Deployment, tmp_path: Path
) -> None:
    only = ("--only", "shared prefix, 1", "--seed", "77", "--reference", unified.url)
    assert verify(tmp_path, pair.url, *only)[0] == 0
    scribble(pair, pair.decode)  # of the prompt, the full blocks are in the decode instance's cache: it need not ask
    code, text, found = verify(tmp_path, pair.url, *only)
    pair.flush(pair.decode)
    assert code == 1, text
    assert "prompt KV: the first step that reads it on the decode instance 1" in found["first_divergence"]["detail"]
    assert "first divergence: greedy, shared prefix, 1" in text
    assert verify(tmp_path, pair.url, *only)[0] == 0, "what is computed anew is right again"


def test_another_model_is_found_at_the_first_token(
    pair: Deployment, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.oracle import tiny_model

    other = tiny_model(tmp_path_factory.mktemp("other"), "llama", tokenizer=True, rms_norm_eps=1e-2)
    code, text, found = verify(tmp_path, pair.url, "--model", other, "--only", "greedy, prompt of 17")
    assert code == 1, text
    assert "prefill: the first token 0" in found["first_divergence"]["detail"]


@pytest.mark.parametrize("url", ["", "--reference"])
def test_a_prefill_instance_is_no_deployment_to_ask(pair: Deployment, tmp_path: Path, url: str) -> None:
    arguments = (pair.url, "--reference", pair.prefill) if url else (pair.prefill,)
    code, text, found = verify(tmp_path, *arguments)
    assert code == 2 and f"{url or 'URL'}: {pair.prefill} is a prefill instance" in text and not found


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<html>", "/model_info does not answer in JSON"),
        (b"[]", "/model_info answers in an unknown form"),
        (b'{"model_path": "m"}', "is no deployment of pd: /model_info lacks 'vocab_size'"),
    ],
)
def test_a_server_of_another_kind_is_an_error_in_one_line(tmp_path: Path, body: bytes, problem: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            code, text, found = verify(tmp_path, f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert code == 1 and problem in text and text.count("\n") == 1 and not found


def test_a_deployment_that_is_not_there_is_an_error_and_not_a_success(tmp_path: Path) -> None:
    code, text, found = verify(tmp_path, "http://127.0.0.1:9", "--timeout", "5")
    assert code == 1 and "no answer to compare" in text and not found
