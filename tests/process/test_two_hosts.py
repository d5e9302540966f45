"""A prefill and a decode instance on two hosts: CURVE on the control plane, authenticated TCP on the data plane."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_kit import LANDED, ROOT, ask, block_bytes, check_logprobs, prompt
from up_kit import Running, running

from tests.oracle import Oracle, tiny_model

pytestmark = pytest.mark.process

READY = r'"url": "(http://[^"]+)".*"event": "ready"'
PAGE = 16


@dataclass(frozen=True)
class Host:
    """A network namespace and its address."""

    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "pd", *words]

    def request(self, method: str, url: str, body: dict[str, Any] | None = None, **headers: str) -> str:
        """An HTTP request from here, and what came back."""
        code = (
            "import json, sys, urllib.request as u\n"
            "url, method, body, headers = json.loads(sys.stdin.read())\n"
            "data = json.dumps(body).encode() if body is not None else None\n"
            "request = u.Request(url, data, {'Content-Type': 'application/json', **headers}, method=method)\n"
            "try:\n"
            "    print(u.urlopen(request, timeout=30).read().decode())\n"
            "except u.HTTPError as error:\n"
            "    print(error.read().decode())\n"
        )
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-c", code]
        words = json.dumps([url, method, body, headers])
        done = subprocess.run(command, input=words, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    def metrics(self, url: str) -> dict[str, float]:
        lines = self.request("GET", f"{url}/metrics").splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x and x[0] != "#")}

    def at_rest(self, url: str, bound: float = 2.0) -> bool:
        """Within the bound the books balance and no block belongs to a request."""
        end = time.monotonic() + bound
        while True:
            asked_at = time.monotonic()
            books = json.loads(self.request("GET", f"{url}/server_info?audit=1"))["audit"]
            if books["balanced"] and not books["owned"] + books["incoming"] + books["quarantined"]:
                return True
            if asked_at > end:
                return False


def serve(stack: ExitStack, host: Host, model: str, role: str, folder: Path, *more: str, **env: str) -> Running:
    command = host.command("serve", model, "--role", role, "--page-size", str(PAGE), "--max-total-tokens", "4096")
    command += ["--chunked-prefill-size", "64", "--port", "31500", "--log-format", "json"]
    command += ["--local-prefill", "never"] if role == "decode" else ["--control-port", "8998"]
    return stack.enter_context(running([*command, *more], folder, ready=READY, PYTHONPATH=ROOT, **env))


def test_two_hosts_share_a_prompt_with_the_secret_and_a_stranger_gets_nothing(
    two_hosts: list[tuple[str, str]], tmp_path: Path
) -> None:
    one, other = (Host(*host) for host in two_hosts)
    model = tiny_model(tmp_path / "model", "llama", tokenizer=True)
    asked, secret = prompt(150, 3), {"PD_CLUSTER_SECRET": "between us"}
    body = ask(asked, 8, return_logprob=True, logprob_start_len=0)
    with ExitStack() as stack:
        prefill = serve(stack, one, model, "prefill", tmp_path / "prefill", "--host", one.address, **secret)
        decode = serve(stack, other, model, "decode", tmp_path / "decode", "--host", other.address, **secret)
        route = other.command("route", "--prefill", prefill.url, "--decode", decode.url, "--port", "0")
        router = stack.enter_context(
            running(
                [*route, "--log-format", "json"],
                tmp_path / "router",
                ready=r'"url": "(http://[^"]+)"',
                PYTHONPATH=ROOT,
            )
        )
        answer = json.loads(other.request("POST", f"{router.url}/generate", body))
        check_logprobs(Oracle(model), asked, answer, 8)
        nbytes = -(-len(asked) // PAGE) * block_bytes(PAGE)
        assert one.metrics(prefill.url)["pd_kv_pushed_bytes_total"] == nbytes
        landed = other.metrics(decode.url)
        assert (landed["pd_kv_landed_bytes_total"], landed[LANDED]) == (nbytes, len(asked))
        assert one.at_rest(prefill.url) and other.at_rest(decode.url)
        endpoint = {"x-pd-prefill": f"tcp://{one.address}:8998"}
        more = ("--host", "127.0.0.1", "--port", "31501", "--connect-timeout", "1.5")
        for knows, stranger in (("nothing", {}), ("another", {"PD_CLUSTER_SECRET": "another"})):
            with ExitStack() as inner:
                insecure = [] if stranger else ["--insecure-control-plane"]
                outsider = serve(inner, other, model, "decode", tmp_path / knows, *more, *insecure, **stranger)
                reply = json.loads(other.request("POST", f"{outsider.url}/generate", body, **endpoint))
                assert "no prefill instance can take the request" in reply["error"]["message"], reply
        assert one.metrics(prefill.url)["pd_kv_pushed_bytes_total"] == nbytes
