"""A prefill and a decode instance on two hosts: CURVE on the control plane, authenticated TCP on the data plane."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from up_kit import Running, running

from tests.oracle import Oracle, tiny_model

pytestmark = pytest.mark.process

READY = r'"url": "(http://[^"]+)".*"event": "ready"'


def ask(namespace: str, method: str, url: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
    """An HTTP request from inside a namespace."""
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
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", code]
    request = json.dumps([url, method, body, headers])
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout if url.endswith("/metrics") else json.loads(done.stdout)


def serve(stack: ExitStack, host: tuple[str, str], model: str, role: str, folder: Path, secret: str) -> Running:
    namespace, address = host
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "pd", "serve", model, "--role", role]
    command += ["--host", address, "--port", "31500", "--control-port", "8998", "--max-total-tokens", "8192"]
    command += ["--local-prefill", "never"] if role == "decode" else []
    env = {"PD_CLUSTER_SECRET": secret, "PYTHONPATH": str(Path(__file__).parents[2])}
    return stack.enter_context(running(command, folder / role, ready=READY, **env))


def test_two_hosts_share_a_prompt_with_the_secret_and_a_stranger_gets_nothing(
    two_hosts: list[tuple[str, str]],
    tmp_path: Path,
) -> None:
    model = tiny_model(tmp_path / "model", "llama", tokenizer=True)
    prompt = [random.Random(3).randrange(2, 256) for _ in range(150)]
    with ExitStack() as stack:
        prefill = serve(stack, two_hosts[0], model, "prefill", tmp_path, "between us")
        decode = serve(stack, two_hosts[1], model, "decode", tmp_path, "between us")
        endpoint = f"tcp://{two_hosts[0][1]}:8998"
        body = {
            "input_ids": prompt,
            "return_logprob": True,
            "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
        }
        namespace = two_hosts[1][0]
        answer = ask(namespace, "POST", f"{decode.url}/generate", body, **{"x-pd-prefill": endpoint})
        got = [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]]
        assert got == Oracle(model).generate_logprobs(prompt, 8).tokens
        pushed = ask(two_hosts[0][0], "GET", f"{prefill.url}/metrics")
        assert "pd_kv_pushed_bytes_total 0.0" not in pushed
        for secret in ("", "another"):
            with ExitStack() as inner:
                outsider = serve_outsider(inner, two_hosts[1], model, tmp_path / f"out{len(secret)}", secret)
                reply = ask(namespace, "POST", f"{outsider.url}/generate", body, **{"x-pd-prefill": endpoint})
                assert "no prefill instance can take the request" in reply["error"]["message"], reply


def serve_outsider(stack: ExitStack, host: tuple[str, str], model: str, folder: Path, secret: str) -> Running:
    """A decode instance that does not know the secret."""
    namespace, _ = host
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "pd", "serve", model, "--role", "decode"]
    command += ["--host", "127.0.0.1", "--port", "31501", "--max-total-tokens", "2048", "--local-prefill", "never"]
    command += ["--connect-timeout", "1.5"] + ([] if secret else ["--insecure-control-plane"])
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), **({"PD_CLUSTER_SECRET": secret} if secret else {})}
    return stack.enter_context(running(command, folder, ready=READY, **env))
