"""How late the schedulers' event loops are while large KV caches are pushed without a pause.

    python tests/bench/bench_pushes.py [--seconds 60] [--memory shm|tcp]

A prefill and a decode instance, each a tree of real processes, with a model that computes little and has a large KV
cache (32 KiB a token). The prefill instance has every prompt cached, the decode instance's pool is too small to keep
them, so that each request is a push of 128 MiB and next to no computation. The lag is what the schedulers themselves
measure, over the last minute. The floor is the lag of a process beside them that does nothing but wait.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from oracle import tiny_model  # noqa: E402
from up_kit import Running, running  # noqa: E402

PROMPTS, TOKENS, CLIENTS = 4, 4096, 2

FLOOR = """
import asyncio, json, sys, time, uvloop
async def main(late=[]):
    end = time.monotonic() + float(sys.argv[1])
    while (due := time.monotonic() + 0.05) < end:
        await asyncio.sleep(0.05)
        late.append(max(0.0, time.monotonic() - due))
    late.sort()
    print(json.dumps([late[len(late) // 2], late[len(late) * 99 // 100], late[-1]]))
uvloop.run(main())
"""


def serve(model: str, folder: Path, role: str, memory: str, pool: int) -> list[str]:
    command = [sys.executable, "-m", "pd", "serve", model, "--role", role, "--port", "0", "--log-format", "json"]
    command += ["--dtype", "float32", "--max-total-tokens", str(pool), "--transfer-memory", memory]
    return [*command, "--local-prefill", "never"] if role == "decode" else command


def ask(client: httpx.Client, url: str, prefill: str, prompt: list[int]) -> None:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    client.post(f"{url}/v1/completions", json=body, headers={"x-pd-prefill": prefill}).raise_for_status()


def lags(instance: Running) -> list[float]:
    """p50, p99 and the largest, seconds."""
    name = 'pd_scheduler_loop_lag_seconds{{quantile="{}"}}'
    return [instance.metric(instance.url, name.format(quantile)) for quantile in ("p50", "p99", "max")]


def show(what: str, seconds: list[float]) -> None:
    print(f"{what}, ms: p50 {seconds[0] * 1e3:.2f}, p99 {seconds[1] * 1e3:.2f}, max {seconds[2] * 1e3:.2f}")


def push(decode: Running, prefill: str, prompts: list[list[int]], seconds: float) -> int:
    """Requests served, each of which pushed its prompt."""
    end, served = time.monotonic() + seconds, itertools.count()
    order, lock = itertools.cycle(prompts), threading.Lock()

    def client() -> None:
        with httpx.Client(timeout=60) as http:
            while time.monotonic() < end:
                with lock:
                    prompt = next(order)
                ask(http, decode.url, prefill, prompt)
                next(served)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next(served)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of pushing (default %(default)s)")
    parser.add_argument(
        "--memory", default="shm", choices=("shm", "tcp"), help="way of the bytes (default %(default)s)"
    )
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    source = random.Random(3)
    prompts = [[source.randrange(2, 256) for _ in range(TOKENS)] for _ in range(PROMPTS)]
    url = r'"url": "(http://[^"]+)"'
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
        model = tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=8192, **shape)
        with (
            running(serve(model, folder, "prefill", args.memory, 20_000), folder / "p", ready=url) as p,
            running(serve(model, folder, "decode", args.memory, 10_000), folder / "d", ready=url) as d,
        ):
            prefill = str(p.logged("ready")[-1]["control_endpoint"])
            with httpx.Client(timeout=60) as http:
                for prompt in prompts:
                    ask(http, d.url, prefill, prompt)
            landed, began = d.metric(d.url, "pd_kv_landed_bytes_total"), time.monotonic()
            waiting = [sys.executable, "-c", FLOOR, str(args.seconds)]
            with subprocess.Popen(waiting, stdout=subprocess.PIPE) as floor:
                os.nice(10)  # users are elsewhere: the load should not take the cores that are measured
                served = push(d, prefill, prompts, args.seconds)
                floor_lags = json.loads(floor.communicate(timeout=60)[0])
            seconds = time.monotonic() - began
            landed = d.metric(d.url, "pd_kv_landed_bytes_total") - landed
            print(
                f"{served} requests in {seconds:.1f} s, {landed / 1e9:.1f} GB landed, {landed / seconds / 1e9:.2f} GB/s"
            )
            show("lag of the prefill scheduler's loop", lags(p))
            show("lag of the decode scheduler's loop", lags(d))
            show("lag of a loop that only waits", floor_lags)


if __name__ == "__main__":
    main()
