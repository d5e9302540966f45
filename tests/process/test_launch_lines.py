"""SGLang's launch lines started as they are, on free ports, with the built-in model, and asked by SGLang's curl."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from launch_lines import CURL_12, ROUTE_3, ROUTE_11, ROUTE_14, SERVE_9, SERVE_10, SERVE_13A, SERVE_13B, Line
from up_kit import Running, running

from pd.rules import builtin_model

pytestmark = pytest.mark.process

ROOT = str(Path(__file__).parents[2])
#: Nobody listens there.
NOWHERE = "http://127.0.0.1:9"


class Machine:
    """Starts lines: any free port instead of a fixed one, 127.0.0.1 instead of every address, peers where they are."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack

    def start(self, line: Line, *, drop: tuple[str, ...] = (), peers: Mapping[str, str] | None = None) -> Running:
        command, arguments, environ = line.command(builtin_model())
        text = shlex.join(arguments)
        for flag in drop:
            text = re.sub(rf" {flag} \S+", "", text)
        text = re.sub(r"(--port|--disaggregation-bootstrap-port) \d+", r"\1 0", text).replace("0.0.0.0", "127.0.0.1")
        for named, real in (peers or {}).items():
            assert named in text, (named, text)
            text = text.replace(named, real)
        words = [sys.executable, "-m", "pd", command, *shlex.split(text)]
        # For lines that name no port; a flag wins over these.
        environ |= {"PD_PORT": "0", "PD_CONTROL_PORT": "0", "PD_LOG_FORMAT": "json", "PYTHONPATH": ROOT}
        folder = self.folder / line.number
        return self.stack.enter_context(running(words, folder, ready=r'"url": "(http://[^"]+)"', **environ))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(tmp_path, stack)


def wait_for_workers(router: Running, bound: float = 30.0) -> dict[str, Any]:
    """Until the router has found a prefill and a decode instance; what it says of itself."""
    end = time.monotonic() + bound
    while True:
        info: dict[str, Any] = httpx.get(f"{router.url}/server_info", timeout=30).json()
        if {worker["pool"] for worker in info["workers"] if worker["routable"]} == {"prefill", "decode"}:
            return info
        assert time.monotonic() < end, router.stderr
        time.sleep(0.05)


def test_two_instances_and_their_routers_work(machine: Machine) -> None:
    """Rows 13 and 14, and the router of row 3 before the same instances. Of row 14's second pair nobody is there."""
    prefill, decode = machine.start(SERVE_13A), machine.start(SERVE_13B)
    peers = {"http://prefill1:30001": prefill.url, "http://decode1:30011": decode.url}
    absent = {"http://prefill2:30002": NOWHERE, "http://decode2:30012": NOWHERE}
    body = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    answers, policies = [], []
    for router in (
        machine.start(ROUTE_14, peers={**peers, **absent}),
        machine.start(ROUTE_3, peers={"http://127.0.0.1:30000": prefill.url, "http://127.0.0.1:30001": decode.url}),
    ):
        info = wait_for_workers(router)
        policies.append((info["policies"]["prefill"], info["policies"]["decode"]))
        response = httpx.post(f"{router.url}/generate", json=body, timeout=60)
        assert response.status_code == 200 and response.headers["x-pd-prefill-used"], response.text
        answers.append(response.json()["text"])
    assert answers[0] == answers[1]
    assert policies[0] == ("cache_aware", "power_of_two")


def test_the_mini_load_balancers_lines_answer_sglangs_curl(machine: Machine) -> None:
    """Rows 9 to 12, over Mooncake as they say, without the RDMA device, which is not there."""
    drop = ("--disaggregation-ib-device",)
    prefill, decode = machine.start(SERVE_9, drop=drop), machine.start(SERVE_10, drop=drop)
    (ready,) = [line for line in prefill.logged("ready") if "control_endpoint" in line and "url" in line]
    peers = {
        "http://127.0.0.1:7000": prefill.url,
        "http://127.0.0.1:7001": decode.url,
        "--prefill-bootstrap-ports 8998": f"--prefill-bootstrap-ports {ready['control_endpoint'].rpartition(':')[2]}",
    }
    router = machine.start(ROUTE_11, peers=peers)
    wait_for_workers(router)
    words = shlex.split(CURL_12.replace("http://localhost:8000", router.url))
    done = subprocess.run([*words, "--silent", "--show-error", "--fail"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert isinstance(answer["text"], str) and 0 < answer["meta_info"]["completion_tokens"] <= 32
    assert answer["meta_info"]["finish_reason"]["type"] in ("length", "stop")
