"""`pd bench serve` against a small real HTTP server that speaks OpenAI's and SGLang's streams with known delays."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pd.bench.serve import add_arguments, run
from pd.bench.serve.__main__ import main
from pd.errors import ConfigError

pytestmark = pytest.mark.process

SAMPLE = Path(__file__).parent.parent / "data" / "conversation_sample.jsonl"
FIRST, GAP = 0.03, 0.01  # seconds to the first token and between tokens
REFUSED, CUT, BROKEN, STUCK = 91, 92, 93, 94  # values of max_tokens that ask for trouble


def _data(payload: Any) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


class Fake:
    """Answers with as many tokens as asked for; keeps the bodies that came."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.profiles: list[tuple[str, Any, int]] = []  # path, body, requests so far
        self.no_profile = 200
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/server_info", self.info),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.completions, methods=["POST"]),
                Route("/generate", self.generate, methods=["POST"]),
                Route("/start_profile", self.profile, methods=["POST"]),
                Route("/stop_profile", self.profile, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def info(self, request: Request) -> Response:
        return JSONResponse({"workers": [{"model": {"vocab_size": 512}}]})

    async def completions(self, request: Request) -> Response:
        body = await self._keep(request)
        if body["max_tokens"] == REFUSED:
            return JSONResponse({"error": {"message": "too busy"}}, status_code=503)
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def generate(self, request: Request) -> Response:
        return StreamingResponse(self._native(await self._keep(request)), media_type="text/event-stream")

    async def profile(self, request: Request) -> Response:
        self.profiles.append((request.url.path, await request.json(), len(self.bodies)))
        assert request.headers["authorization"] == "Bearer s3cret"
        return JSONResponse({"files": ["/d/a.gz"]}, status_code=self.no_profile)

    async def _keep(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return body

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        wanted = body["max_tokens"]
        for index in range(wanted):
            await asyncio.sleep(GAP if index else FIRST)
            if wanted == STUCK and index == 3:
                await asyncio.sleep(30)
            if wanted in (CUT, BROKEN) and index == 3:
                if wanted == BROKEN:
                    yield _data({"error": {"message": "worker died"}})
                return
            finish = "length" if index == wanted - 1 else None
            text = {"delta": {"content": "é "}} if "messages" in body else {"text": "é ", "token_ids": [index]}
            yield _data({"choices": [{"index": 0, **text, "finish_reason": finish}], "usage": None})
        prompt = len(body["prompt"]) if "prompt" in body else len(body["messages"][0]["content"].split())
        counts = {"prompt_tokens": prompt, "completion_tokens": wanted, "prompt_tokens_details": {"cached_tokens": 2}}
        yield _data({"choices": [], "usage": counts})
        yield _data(b"[DONE]")

    async def _native(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        wanted = body["sampling_params"]["max_new_tokens"]
        for index in range(wanted):
            await asyncio.sleep(GAP if index else FIRST)
            finish = {"type": "length"} if index == wanted - 1 else None
            meta = {"prompt_tokens": len(body["input_ids"]), "completion_tokens": index + 1, "cached_tokens": 0}
            ids = list(range(index + 1))
            yield _data({"text": "x" * (index + 1), "output_ids": ids, "meta_info": {**meta, "finish_reason": finish}})
        yield _data(b"[DONE]")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Fake]]:
    fake = Fake()
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(fake.app, log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    instance = uvicorn.Server(config)
    thread = threading.Thread(target=instance.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", fake
    instance.should_exit = True
    thread.join(10)
    listener.close()


def bench(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([*argv, "--no-progress"]))


def test_a_curve_of_two_rates_is_reported_recorded_and_plotted(
    server: tuple[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, fake = server
    fake.bodies.clear()
    load = "--rate 20,40 --poisson --num-requests 12 --input-len 8:16 --output-len 10 --warmup 2 --return-token-ids"
    report = f"--slo-ttft-ms 2000 --slo-itl-ms 0.001 --json {tmp_path}/o.json --plot {tmp_path}/o.png"
    secret = ("--header", "Authorization: Bearer s3cret")
    code = bench(url, *load.split(), *report.split(), "--record", str(tmp_path / "o.jsonl"), *secret)
    assert code == 0
    text = (tmp_path / "o.json").read_text()
    assert "s3cret" not in text and fake.headers[-1]["authorization"] == "Bearer s3cret"
    document = json.loads(text)
    assert document["config"]["model"] == "fake" and document["config"]["token_range"] == [64, 480]
    assert document["environment"]["cpu_count"] >= 1
    for entry, rate in zip(document["runs"], (20, 40), strict=True):
        assert (entry["offered_rps"], entry["completed"], entry["failed"]) == (rate, 12, 0)
        assert entry["output_tokens"] == 120 and 0 < entry["achieved_rps"] < 1000
        assert FIRST * 1e3 * 0.9 <= entry["ttft_ms"]["p50"] < 2000
        assert GAP * 1e3 * 0.5 <= entry["itl_ms"]["mean"] < 500
        assert (FIRST + 9 * GAP) * 1e3 * 0.9 <= entry["e2e_ms"]["p50"] < 5000
        assert entry["goodput"]["requests"] == 0 and entry["cached_tokens"] == 24
        assert entry["tokens_per_event"] == 1.0
    assert (tmp_path / "o.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(fake.bodies) == 2 + 24

    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [record["run"] for record in records] == [0] * 12 + [1] * 12
    sent = [body["prompt"] for body in fake.bodies[2:]]
    assert sorted(record["prompt_token_ids"] for record in records) == sorted(sent)
    assert all(64 <= token < 480 for prompt in sent for token in prompt)
    for record in records:
        assert record["output_text"] == "é " * 10 and record["output_token_ids"] == list(range(10))
        assert len(record["event_ms"]) == 10 and record["error"] is None and record["cached_tokens"] == 2
    assert "TTFT p99" in capsys.readouterr().out


def test_a_trace_is_replayed_with_its_prefixes(server: tuple[str, Fake], tmp_path: Path) -> None:
    url, fake = server
    fake.bodies.clear()
    code = bench(
        *(url, "--trace", str(SAMPLE), "--rows", "14", "--length-scale", "1/64", "--time-scale", "0.1"),
        *("--token-range", "100:200", "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")),
    )
    assert code == 0
    entry = json.loads((tmp_path / "o.json").read_text())["runs"][0]
    assert entry["completed"] == 14 and entry["send_window_s"] == 0.3
    lines = [json.loads(line) for line in SAMPLE.read_text().splitlines()[:14]]
    assert sorted(len(body["prompt"]) for body in fake.bodies) == sorted(round(x["input_length"] / 64) for x in lines)
    assert entry["output_tokens"] == sum(max(1, round(line["output_length"] / 64)) for line in lines)
    assert len({tuple(body["prompt"][:8]) for body in fake.bodies}) == 1  # all begin with hash id 0


@pytest.mark.parametrize("endpoint", ["chat", "generate"])
def test_the_other_endpoints_stream_too(server: tuple[str, Fake], tmp_path: Path, endpoint: str) -> None:
    url, _ = server
    record = tmp_path / "o.jsonl"
    arguments = (
        "--rate",
        "inf",
        "--num-requests",
        "3",
        "--input-len",
        "5",
        "--output-len",
        "4",
        "--record",
        str(record),
    )
    assert bench(url, "--endpoint", endpoint, *arguments) == 0
    for line in map(json.loads, record.read_text().splitlines()):
        assert line["prompt_tokens"] == 5 and line["completion_tokens"] == 4
        assert line["output_text"] == ("é é é é " if endpoint == "chat" else "xxxx")
        assert line["event_tokens"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("wanted", "kind", "message"),
    [
        (REFUSED, "http_503", "too busy"),
        (CUT, "truncated", "without a finish reason"),
        (BROKEN, "stream_error", "worker died"),
        (STUCK, "timeout", "within 0.5 s"),
    ],
)
def test_failures_are_counted_by_kind_and_shown(
    server: tuple[str, Fake],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wanted: int,
    kind: str,
    message: str,
) -> None:
    url, _ = server
    out = tmp_path / "o.json"
    arguments = ("--rate", "50", "--num-requests", "3", "--output-len", str(wanted), "--timeout", "0.5")
    assert bench(url, *arguments, "--json", str(out)) == 1
    entry = json.loads(out.read_text())["runs"][0]
    assert entry["errors"].keys() == {kind} and entry["errors"][kind]["count"] == 3
    assert message in entry["errors"][kind]["messages"][0]
    assert f"3 x {kind}" in capsys.readouterr().out


def test_a_cap_on_concurrency_is_kept_and_reported(server: tuple[str, Fake], tmp_path: Path) -> None:
    url, _ = server
    arguments = ("--rate", "inf", "--num-requests", "6", "--input-len", "4", "--output-len", "3")
    assert bench(url, *arguments, "--max-concurrency", "2", "--json", str(tmp_path / "o.json")) == 0
    entry = json.loads((tmp_path / "o.json").read_text())["runs"][0]
    assert entry["concurrency"] == {"peak": 2, "cap": 2, "held": 4}
    assert "not an open loop" in entry["warnings"][0]


PROFILE = ("--rate", "inf", "--num-requests", "3", "--input-len", "4", "--output-len", "3", "--warmup", "1")
SECRET = ("--header", "Authorization: Bearer s3cret")


def test_the_instances_of_one_leg_record_while_the_load_runs(
    server: tuple[str, Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, fake = server
    fake.bodies.clear()
    fake.profiles.clear()
    flags = (
        "--profile --pd-separated --profile-activities CPU GPU --profile-steps 7 --profile-prefix p --profile-by-stage"
    )
    more = ("--profile-prefix", "p", "--profile-by-stage")
    where = ("--profile-prefill-url", url, f"{url}/", "--profile-output-dir", "traces", "--json", str(tmp_path / "o"))
    assert bench("http://127.0.0.1:1", *PROFILE, *SECRET, *flags.split(), *more, *where, "--model", "m") == 1
    assert fake.profiles[0][1] == {
        "activities": ["CPU", "GPU"],
        "num_steps": 7,
        "profile_by_stage": True,
        "output_dir": str(Path("traces").absolute()),
        "profile_prefix": "p",
    }
    paths = [path for path, _, _ in fake.profiles]
    assert paths == ["/start_profile"] * 2 + ["/stop_profile"] * 2
    assert json.loads((tmp_path / "o").read_text())["config"]["profile"]["urls"] == [["prefill", url]] * 2
    fake.profiles.clear()
    assert bench(url, *PROFILE, *SECRET, "--profile") == 0
    assert fake.profiles == [("/start_profile", {}, 1), ("/stop_profile", {}, 4)], "around the load, after the warm-up"
    assert f"profile of target {url}: /d/a.gz" in capsys.readouterr().err
    fake.no_profile = 400
    with pytest.raises(ConfigError, match=r"--profile: target .*HTTP 400"):
        bench(url, *PROFILE, *SECRET, "--profile")
    fake.no_profile = 200


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--pd-separated", "--pd-separated"),
        ("--profile-prefill-url http://a:1", "--profile-prefill-url"),
        ("--profile-num-steps 0", "--profile-num-steps"),
        ("--profile-output-dir d", "--profile-output-dir"),
        ("--profile --pd-separated", "--pd-separated"),
        ("--profile --profile-decode-url http://a:1", "--profile-decode-url"),
        ("--profile --pd-separated --profile-decode-url http://a:1 --profile-prefill-url http://b:1", "-decode-url"),
        ("--profile --pd-separated --profile-decode-url a", "--profile-decode-url"),
        ("--profile --profile-steps 0", "--profile-num-steps"),
        ("--profile --profile-stages decode", "--profile-stages"),
        ("--profile --profile-activities MEM", "--profile-activities"),
    ],
)
def test_a_profile_flag_acts_or_is_refused_by_name(flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["http://127.0.0.1:1", "--rate", "1", *flags.split()]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert named in capsys.readouterr().err


def test_a_dead_server_fails_every_request_or_leaves_the_model_unknown(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    arguments = ("--rate", "100", "--num-requests", "3", "--json", str(tmp_path / "o.json"))
    assert bench(url, *arguments, "--model", "m") == 1
    assert json.loads((tmp_path / "o.json").read_text())["runs"][0]["errors"]["connection"]["count"] == 3
    with pytest.raises(ConfigError, match="--model"):
        bench(url, *arguments)


def test_a_kept_connection_that_the_server_closed_costs_no_request() -> None:
    """The server answers one request per connection and closes without saying so."""
    seen = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await reader.readuntil(b"\r\n\r\n")
        seen += 1
        body = _data({"choices": [{"text": "a", "finish_reason": "stop"}]}) + _data(b"[DONE]")
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        await reader.read(10)  # the next request arrives: close instead of answering it
        writer.transport.abort()

    async def scenario() -> list[str | None]:
        from pd.bench.serve.client import Client
        from pd.bench.serve.sse import OpenAiAnswer

        listener = await asyncio.start_server(handle, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        kinds = []
        for _ in range(3):
            answer = OpenAiAnswer()
            await client.post("/v1/completions", b"", answer, "id")
            answer.settle()
            kinds.append(answer.error_kind)
        client.close()
        listener.close()
        await asyncio.sleep(0.05)  # lets the last handler see its connection end
        return kinds

    assert asyncio.run(scenario()) == [None, None, None]
    assert seen == 3


def test_the_module_runs_as_a_program(server: tuple[str, Fake], capsys: pytest.CaptureFixture[str]) -> None:
    url, _ = server
    command = [sys.executable, "-m", "pd.bench.serve", url, "--rate", "50", "--num-requests", "2", "--output-len", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "TTFT p50" in done.stdout and "fake" in done.stderr
    assert main([url]) == 2
    assert "--rate: no load is described" in capsys.readouterr().err


def test_neither_torch_nor_a_plotting_library_is_loaded_without_need() -> None:
    code = (
        "import sys, pd.bench.serve.command; sys.exit(bool({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
