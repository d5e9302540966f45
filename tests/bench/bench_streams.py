"""What api and router cost, and add, when 256 streams get 50 tokens a second each.

    OMP_NUM_THREADS=1 python tests/bench/bench_streams.py [--streams 256] [--seconds 10] [--api-workers 1]

One unified instance with a scripted runner (no model, a token for every stream each 20 ms) behind `pd route`. The age
of each event is measured where it is received: from the moment at which the runner gave out the step to the moment at
which the client has read the event, in processes of one machine. The floor is the same client against a process that
writes the same events straight into its sockets, every 20 ms. Ratios travel between machines, absolute figures do not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import uvloop

ROOT = str(Path(__file__).parents[2])
sys.path[:0] = [ROOT]

from pd.config import CacheConfig, HttpConfig, LogConfig, ModelConfig, SchedulerConfig, ServeConfig  # noqa: E402
from pd.instance import Plan, check, serve  # noqa: E402
from pd.logs import configure  # noqa: E402
from pd.plugins import load_plugins  # noqa: E402
from pd.process import ChildSpec  # noqa: E402
from tests.bench.scripted_runner import STEP_S, STEPS, SYMBOLS, times_file  # noqa: E402
from tests.oracle import tiny_model  # noqa: E402

_WARM_UP_S = 2.0
_TEXT = re.compile(rb'"text":"(.)"')


class ScriptedPlan(Plan):
    """An instance whose runner follows the script."""

    def runner(self) -> ChildSpec:
        print(json.dumps({"folder": str(self.folder)}), flush=True)
        return replace(super().runner(), target="tests.bench.scripted_runner:main")


async def instance(model: str, workers: int) -> None:
    """The process of the instance: prints where its folder is and where it listens."""
    config = ServeConfig(
        model=ModelConfig(model=model),
        cache=CacheConfig(page_size=32),
        scheduler=SchedulerConfig(max_running_requests=1024),
        http=HttpConfig(port=0, api_workers=workers),
        log=LogConfig(log_level="error", log_format="json"),
    )
    configure("bench", "bench", config.log)
    info = check(config, load_plugins())
    await serve(config, info, asyncio.Event(), lambda found: print(json.dumps(found), flush=True), ScriptedPlan)


class Floor(asyncio.Protocol):
    """Writes an event into every socket each step: what any server must do at least."""

    opened: list[asyncio.Transport] = []  # noqa: RUF012  (one server per process)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if b"POST " in data:
            self.transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            self.opened.append(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport in self.opened:
            self.opened.remove(self.transport)


async def floor(folder: str) -> None:
    sent = np.memmap(times_file(Path(folder)), dtype="<f8", mode="w+", shape=(STEPS,))
    server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", 0, backlog=1024)
    print(json.dumps({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}), flush=True)
    for step in range(1, STEPS):
        await asyncio.sleep(STEP_S)
        event = (
            b'data: {"id":"x","choices":[{"index":0,"text":"%c","logprobs":null}]}\n\n' % SYMBOLS[step % len(SYMBOLS)]
        )
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        sent[step] = time.monotonic()
        for transport in Floor.opened:
            transport.write(chunk)


class Stream(asyncio.Protocol):
    """One request; keeps what came and when, and reads it only afterwards."""

    def __init__(self, request: bytes) -> None:
        self.request, self.packets = request, list[tuple[float, bytes]]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.packets.append((time.monotonic(), data))


async def client(url: str, streams: int, seconds: float) -> None:
    """The process of the load: prints (time, symbol) of every event that came, as it ends."""
    host, port = url.removeprefix("http://").split(":")
    tokens = int((_WARM_UP_S + seconds + 30) / STEP_S)
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": tokens, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    opened = []
    loop = asyncio.get_running_loop()
    for _ in range(streams):
        transport, stream = await loop.create_connection(lambda: Stream(request), host, int(port))
        opened.append((transport, stream))
    await asyncio.sleep(_WARM_UP_S)
    print("go", flush=True)
    begin = time.monotonic()
    await asyncio.sleep(seconds)
    end = time.monotonic()
    print("done", flush=True)
    found = []
    for transport, stream in opened:
        transport.abort()
        assert stream.packets and b" 200 " in stream.packets[0][1][:20], stream.packets[:1]
        found += [(at, s.decode()) for at, data in stream.packets if begin <= at < end for s in _TEXT.findall(data)]
    print(json.dumps(found), flush=True)


@contextlib.asynccontextmanager
async def process(*arguments: str, stderr: int | None = None) -> AsyncIterator[asyncio.subprocess.Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        limit=1 << 28,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    try:
        yield child
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(child.pid).children(recursive=True):
                one.kill()
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def line(child: asyncio.subprocess.Process) -> str:
    assert child.stdout is not None
    async with asyncio.timeout(120):
        text = (await child.stdout.readline()).decode().strip()
    assert text, "the process has ended"
    return text


@dataclass
class Figures:
    events: int
    ages_ms: list[float]
    cpu: dict[str, float]  # seconds by part

    def show(self, name: str) -> str:
        cpu = "   ".join(f"{part} {1e6 * seconds / self.events:.1f}" for part, seconds in self.cpu.items())
        p50, p99 = statistics.median(self.ages_ms), float(np.percentile(self.ages_ms, 99))
        text = f"{name:22s} {self.events:7d} events   age p50 {p50:5.1f} ms   p99 {p99:5.1f} ms"
        return f"{text}   CPU ms per 1,000 events: {cpu}" if cpu else text


def cpu_seconds(pids: dict[str, list[int]]) -> dict[str, float]:
    def one(pid: int) -> float:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system

    return {name: sum(map(one, members)) for name, members in pids.items()}


async def load(url: str, sent_file: Path, parts: dict[str, list[int]], options: argparse.Namespace) -> Figures:
    async with process(__file__, "--client", url, *_numbers(options)) as child:
        assert await line(child) == "go"
        before = cpu_seconds(parts)
        assert await line(child) == "done"
        cpu = {name: value - before[name] for name, value in cpu_seconds(parts).items()}
        events = json.loads(await line(child))
    sent = np.fromfile(sent_file, dtype="<f8")
    ages = [_age(at, symbol, sent) for at, symbol in events]
    return Figures(len(events), [1000 * age for age in ages], cpu)


def _age(at: float, symbol: str, sent: np.ndarray) -> float:
    """From the last step before `at` that gave out this symbol: a turn of all symbols takes longer than any delay."""
    last = int(np.searchsorted(sent[1 : 1 + np.count_nonzero(sent)], at, side="right"))
    back = (last - SYMBOLS.index(symbol.encode())) % len(SYMBOLS)
    return float(at - sent[last - back])


def _numbers(options: argparse.Namespace) -> list[str]:
    return ["--streams", str(options.streams), "--seconds", str(options.seconds)]


def children(pid: int) -> dict[str, list[int]]:
    """Pids by what a process is called on its command line: api, api-1, scheduler, …"""
    found: dict[str, list[int]] = {}
    for child in psutil.Process(pid).children(recursive=True):
        arguments = child.cmdline()
        if "pd.child" in arguments:
            name = arguments[arguments.index("pd.child") + 1].partition("-")[0]
            found.setdefault(name, []).append(child.pid)
    return found


async def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with process(__file__, "--floor", folder) as server:
            url = json.loads(await line(server))["url"]
            least = await load(url, times_file(Path(folder)), {}, options)
        print(least.show("floor"), flush=True)
        model = tiny_model(Path(folder) / "model", "llama", tokenizer=True, max_position_embeddings=1 << 16)
        async with process(__file__, "--instance", model, "--api-workers", str(options.api_workers)) as server:
            sent = times_file(Path(json.loads(await line(server))["folder"]))
            url = json.loads(await line(server))["url"]
            parts = children(server.pid)
            print((await load(url, sent, parts, options)).show("instance"), flush=True)
            arguments = ("-m", "pd", "route", "--port", "0", "--decode", url, "--log-format", "json")
            async with process(*arguments, stderr=asyncio.subprocess.STDOUT) as router:
                where = await _listening(router)
                await asyncio.sleep(3)  # its first health check
                parts = {"router": [router.pid], **parts}
                through = await load(where, sent, parts, options)
    print(through.show("router and instance"), flush=True)
    added = float(np.percentile(through.ages_ms, 99) - np.percentile(least.ages_ms, 99))
    print(f"p99 added to the floor: {added:.1f} ms")
    if options.json:
        document = {name: vars(figures) for name, figures in (("floor", least), ("routed", through))}
        Path(options.json).write_text(json.dumps(document))  # noqa: ASYNC240  (nothing else runs any more)


async def _listening(router: asyncio.subprocess.Process) -> str:
    while True:
        text = await line(router)
        if '"router_listening"' in text:
            return str(json.loads(text)["url"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--api-workers", type=int, default=1)
    parser.add_argument("--json", metavar="F", help="write every figure to F")
    for role in ("--client", "--instance", "--floor"):
        parser.add_argument(role, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if parsed.client:
            runner.run(client(parsed.client, parsed.streams, parsed.seconds))
        elif parsed.instance:
            runner.run(instance(parsed.instance, parsed.api_workers))
        elif parsed.floor:
            runner.run(floor(parsed.floor))
        else:
            runner.run(measure(parsed))
