"""SGLang's own router as its package ships it, in front of the instances of a cluster, and the legs that it sends.

with sglang_router(cluster, folder) as url:             # the router
with sglang_router(cluster, folder, "--mini-lb") as url:
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fault_kit import Cluster
from up_kit import running

#: One answer, on a busy machine.
PATIENCE = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def router_command(prefills: list[tuple[str, int]], decodes: list[str], port: int, *more: str) -> list[str]:
    """`prefills`: URL and bootstrap port, which is pd's control port."""
    words = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--policy", "random"]
    for url, bootstrap in prefills:
        words += ["--prefill", url, str(bootstrap)]
    for url in decodes:
        words += ["--decode", url]
    return [*words, "--host", "127.0.0.1", "--port", str(port), *more]


@contextmanager
def sglang_router(cluster: Cluster, folder: Path, *more: str) -> Iterator[str]:
    """Its URL, once it serves. Health checks are quick, so that a killed instance is back soon after its restart."""
    port = free_port()
    if "--mini-lb" not in more:
        checks = ("--health-check-interval-secs", "1", "--health-success-threshold", "1", "--cb-timeout-duration-secs")
        more += (*checks, "1", "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
    prefills = [(cluster.urls[n], bootstrap_port(cluster, n)) for n in ("prefill-0", "prefill-1")]
    command = router_command(prefills, [cluster.urls[n] for n in ("decode-0", "decode-1")], port, *more)
    url = f"http://127.0.0.1:{port}"
    with running(command, folder, ready="()"):  # at once: it is asked until it answers
        _until_it_serves(url)
        yield url


def bootstrap_port(cluster: Cluster, name: str) -> int:
    return int(cluster.control[name].rpartition(":")[2])


def _until_it_serves(url: str, bound: float = 60.0) -> None:
    """The router looks for its workers first; a request shows that it has found a pair."""
    end = time.monotonic() + bound
    body = {"text": "a", "sampling_params": {"max_new_tokens": 2}}
    while True:
        try:
            if httpx.post(f"{url}/generate", json=body, timeout=PATIENCE).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"the router does not serve within {bound:g} s"
        time.sleep(0.2)


def with_room(cluster: Cluster, body: dict[str, Any], room: Any, prefill: str = "prefill-0") -> dict[str, Any]:
    """What a router sends to both instances."""
    return {
        **body,
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": bootstrap_port(cluster, prefill),
        "bootstrap_room": room,
    }
