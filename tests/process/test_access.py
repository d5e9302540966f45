"""API key, web pages and HTTPS, on an instance and on the router, over real sockets."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from api_kit import says, serving
from router_kit import FakeWorker, eventually, prefill_worker, routing, workers
from up_kit import running

from pd.access import Access
from pd.config import HttpConfig
from pd.testing import tiny_tokenizer
from tests.oracle import tiny_model

pytestmark = pytest.mark.process

Run = Callable[..., Any]
KEY = "sk-very-secret"
RIGHT = {"authorization": f"Bearer {KEY}"}
PAGE = {"origin": "https://app.example"}
ASKS = {**PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization,x-a"}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority's certificate, and a key and certificate that it issued for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=bool(number))
    return folder


def https(files: Path) -> HttpConfig:
    return HttpConfig(port=0, ssl_certfile=str(files / "cert.pem"), ssl_keyfile=str(files / "key.pem"))


# --- the key ---------------------------------------------------------------------------------------------------------


def test_an_instance_with_a_key_answers_only_who_brings_it(run_async: Run, model: Any) -> None:
    async def main() -> None:
        async with serving(model, says("x"), access=Access(KEY)) as at:
            for path in ("/health", "/health_generate", "/version"):
                assert (await at.client.get(path)).status_code == 200, path
            wrong = ("", KEY, "Bearer", f"Bearer {KEY}x", "Bearer " + KEY[:-1], f"Basic {KEY}", "Bearer é")
            for path in ("/v1/models", "/server_info", "/openapi.json", "/flush_cache", "/nothing"):
                for given in wrong:
                    answer = await at.client.get(path, headers={"authorization": given.encode("latin-1")})
                    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                    error = answer.json()["error"]
                    assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
            assert (await at.client.post("/v1/completions", content=b"{")).status_code == 401, "before it is read"
            body = {"prompt": "a"}
            assert (await at.client.post("/v1/completions", json=body, headers=RIGHT)).status_code == 200
            lower = {"authorization": f"bearer  {KEY}"}
            info = await at.client.get("/server_info", headers=lower)
            assert info.status_code == 200 and KEY not in info.text
            described = (await at.client.get("/openapi.json", headers=RIGHT)).json()
            assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
            assert "security" not in described["paths"]["/health"]["get"]

    run_async(main())


def test_a_router_with_a_key_asks_its_workers_with_it_and_lets_nobody_in_without(run_async: Run) -> None:
    async def main() -> None:
        decode, prefill = FakeWorker(key=KEY), prefill_worker(key=KEY)
        http = HttpConfig(port=0, api_key=KEY)
        async with workers(decode, prefill), routing([decode], [prefill], http=http, audited=False) as gate:
            bearer = f"authorization: Bearer {KEY}"
            for path in ("/health", "/metrics", "/version"):
                assert (await gate.get(path)).status == 200, path
            for path in ("/v1/models", "/server_info", "/flush_cache", "/nothing"):
                answer = await gate.get(path)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json["error"]["code"] == "invalid_api_key"
            assert (await gate.post("/v1/completions")).status == 401 and not decode.calls
            answer = await gate.post("/v1/completions", b"{}", bearer)
            assert answer.status == 200 and answer.json["headers"]["authorization"] == f"Bearer {KEY}"
            assert "x-pd-prefill" in answer.json["headers"], "what prefill says of itself was read with the key"
            assert (await gate.get("/v1/models", "GET", bearer)).json["data"]
            assert (await gate.get("/flush_cache", "POST", bearer)).json["success"]
            assert KEY not in (await gate.get("/server_info", "GET", bearer)).body.decode()

    run_async(main())


def test_a_router_without_the_workers_key_knows_why_they_are_out(run_async: Run, caplog: Any) -> None:
    async def main() -> None:
        decode = FakeWorker(key=KEY)
        async with workers(decode), routing([decode], health_failures=1) as gate:
            await eventually(lambda: _is_out(gate, decode.url))
            assert (await gate.get("/health")).status == 503

    run_async(main())


async def _is_out(gate: Any, url: str) -> bool:
    return (await gate.worker(url))["health"] == "out"  # type: ignore[no-any-return]


def test_a_clients_key_reaches_the_workers_through_a_router_that_has_none(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), routing([decode]) as gate:
            bearer = f"authorization: Bearer {KEY}"
            assert (await gate.post("/generate", b"{}", bearer)).json["headers"]["authorization"] == f"Bearer {KEY}"
            await gate.post("/tokenize", b"{}", bearer)
            assert decode.calls[-1].headers["authorization"] == f"Bearer {KEY}"

    run_async(main())


# --- web pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "asked", "answered"),
    [
        ({"allowed_origins": ("*",)}, "https://app.example", "*"),
        ({"allowed_origins": ("https://app.example",)}, "https://app.example", "https://app.example"),
        ({"allowed_origins": ("https://app.example",)}, "https://other.example", None),
        ({"allowed_origins": ("*",), "allow_credentials": True}, "https://app.example", "https://app.example"),
        ({"allowed_origins": ("none",)}, "https://app.example", None),
    ],
)
def test_pages_of_allowed_origins_may_ask_an_instance_and_the_router(
    run_async: Run, model: Any, settings: dict[str, Any], asked: str, answered: str | None
) -> None:
    http = HttpConfig(port=0, api_key=KEY, **settings)
    page = {"origin": asked}
    preflight = {**ASKS, **page}

    def check(simple: dict[str, str], status: int, first: dict[str, str]) -> None:
        assert simple.get("access-control-allow-origin") == answered
        assert first.get("access-control-allow-origin") == answered
        if answered is None:
            assert status >= 400
            return
        assert status == 200 and "POST" in first["access-control-allow-methods"]
        assert first["access-control-allow-headers"] == "authorization,x-a"
        for headers in (simple, first):
            allowed = "true" if "allow_credentials" in settings else None
            assert headers.get("access-control-allow-credentials") == allowed
            assert ("Origin" in headers.get("vary", "")) is (answered != "*")

    async def main() -> None:
        async with serving(model, says("x"), access=Access.of(http)) as at:
            body = {"prompt": "a", "stream": True}
            simple = await at.client.post("/v1/completions", json=body, headers={**RIGHT, **page})
            refused = await at.client.post("/v1/completions", json=body, headers=page)
            assert refused.headers.get("access-control-allow-origin") == answered and refused.status_code == 401
            first = await at.client.options("/v1/completions", headers=preflight)  # without a key
            check(dict(simple.headers), first.status_code, dict(first.headers))

        async def script(call: Any) -> None:
            call.answer(200, b"{}", "access-control-allow-origin: worker")  # the router's word counts

        decode = FakeWorker(key=KEY, script=script)
        async with workers(decode), routing([decode], http=http, audited=False) as gate:
            lines = [f"{name}: {value}" for name, value in {**RIGHT, **page}.items()]
            relayed = await gate.post("/v1/completions", b"{}", *lines)
            own = await gate.get("/v1/models", "GET", *lines)
            assert relayed.status == own.status == 200
            for path in ("/v1/completions", "/tokenize"):
                first = await gate.get(path, "OPTIONS", *(f"{name}: {value}" for name, value in preflight.items()))
                check(relayed.headers, first.status, first.headers)
                check(own.headers, first.status, first.headers)

    run_async(main())


def test_a_page_learns_which_methods_and_headers_are_allowed(run_async: Run, model: Any) -> None:
    access = Access.of(HttpConfig(allowed_methods=("GET",), allowed_headers=("authorization", "content-type")))

    async def main() -> None:
        async with serving(model, says("x"), access=access) as at:
            answer = await at.client.options("/flush_cache", headers=ASKS)
            assert answer.headers["access-control-allow-methods"] == "GET"
            assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
            assert (await at.client.options("/flush_cache")).status_code == 405, "nobody's page"

    run_async(main())


# --- HTTPS -----------------------------------------------------------------------------------------------------------


def test_an_instance_speaks_https(run_async: Run, model: Any, files: Path) -> None:
    async def main() -> None:
        async with serving(model, says("Hello"), tls=https(files)) as at:
            trusting = ssl.create_default_context(cafile=files / "ca.pem")
            async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{at.port}", verify=trusting) as client:
                answer = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
                assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{at.port}", timeout=5) as client:
                with pytest.raises(httpx.HTTPError):
                    await client.get("/health")

    run_async(main())


def test_a_router_speaks_https_to_clients_and_workers_that_it_can_trust(run_async: Run, files: Path) -> None:
    async def main() -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(files / "cert.pem", files / "key.pem")
        trusting = ssl.create_default_context(cafile=files / "ca.pem")

        async def script(call: Any) -> None:
            call.start_events()
            for number in range(50):
                call.event("x" * 2000 + str(number))
            call.end()

        decode = FakeWorker(tls=server, script=script)
        settings = {"http": https(files), "worker_ca_certs": str(files / "ca.pem"), "audited": False}
        async with workers(decode), routing([decode], **settings) as gate:
            async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{gate.port}", verify=trusting) as client:
                assert (await client.get("/health")).status_code == 200
                for _ in range(2):
                    answer = await client.post("/v1/completions", json={"prompt": "a"})
                    assert answer.text.count("data: ") == 50
                assert (await client.get("/nothing")).status_code == 404
        async with workers(decode), routing([decode], health_failures=1) as gate:  # an authority that nobody knows
            await eventually(lambda: _is_out(gate, decode.url))

    run_async(main())


# --- HTTP/2 ----------------------------------------------------------------------------------------------------------


def test_an_http2_preface_gets_an_error_at_once(run_async: Run, model: Any) -> None:
    async def preface(port: int, pause: float) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        await asyncio.sleep(pause)
        async with asyncio.timeout(2):
            data = await reader.read(4096)
        assert time.monotonic() - began < 2
        writer.close()
        return data

    async def main() -> None:
        decode = FakeWorker()
        async with serving(model, says("x")) as at, workers(decode), routing([decode]) as gate:
            assert (await preface(at.port, 0)).startswith(b"HTTP/1.1 400 ")
            assert (await preface(gate.port, 0)).startswith(b"HTTP/1.1 505 ")
            assert (await at.client.get("/health")).status_code == 200 and (await gate.get("/health")).status == 200

    run_async(main())


# --- operations through the router -----------------------------------------------------------------------------------


def test_the_router_offers_the_workers_operations(run_async: Run) -> None:
    loads = {"num_running_reqs": 2, "num_used_tokens": 10}
    answers: dict[str, Any] = {
        "/v1/loads": {"loads": [loads], "aggregate": {"total_running_reqs": 2, "avg_token_usage": 0.5}},
        "/get_load": [{"num_tokens": 7}],
        "/abort_request": {"aborted": 2},
        "/pause_generation": {"aborted": 1, "paused": True},
        "/continue_generation": {"aborted": 0, "paused": False},
        "/flush_cache": {"freed_blocks": 1},
        "/stop_profile": {"success": True, "files": ["/t"]},
        "/openapi.json": {"openapi": "3.1.0"},
    }

    async def script(call: Any) -> None:
        path = call.target.partition("?")[0]
        if call.body == b"{":
            call.answer(400, b'{"error": {"code": "invalid_json"}}')
        elif path in answers:
            call.answer(200, json.dumps(answers[path]).encode())
        else:
            call.answer(200, json.dumps({"asked": call.target, "body": call.body.decode()}).encode())

    async def main() -> None:
        decodes = [FakeWorker(script=script, models=("org/tiny",)) for _ in range(2)]
        prefill = prefill_worker(script=script)
        async with workers(*decodes, prefill), routing(decodes, [prefill]) as gate:
            body = (await gate.get("/v1/loads")).json
            assert [(e["worker"], e["pool"]) for e in body["loads"]] == [
                (prefill.url, "prefill"),
                *((decode.url, "decode") for decode in decodes),
            ]
            assert body["aggregate"] == {"total_running_reqs": 6, "avg_token_usage": 0.5}
            assert (await gate.get("/loads")).json["aggregate"] == body["aggregate"]
            assert (await gate.get("/get_load")).json == [{"num_tokens": 7}] * 3
            assert (await gate.post("/abort_request", b'{"rid": "a"}')).json["aborted"] == 6
            assert (await gate.post("/pause_generation", b"{}")).json["aborted"] == 3
            assert (await gate.get("/continue_generation", "POST")).json["success"]
            assert "aborted" not in (await gate.get("/flush_cache")).json
            refused = await gate.post("/abort_request", b"{")
            assert refused.status == 400 and refused.json["error"]["code"] == "invalid_json", "as the workers say"
            before = [len(decode.calls) for decode in decodes]
            for path in ("/tokenize", "/v1/detokenize"):
                assert (await gate.post(path, b'{"x": 1}')).json == {"asked": path, "body": '{"x": 1}'}
            assert sum(len(decode.calls) for decode in decodes) == sum(before) + 2, "one of them is enough"
            assert (await gate.get("/openapi.json")).json["openapi"] == "3.1.0"
            assert (await gate.get("/v1/models/org/tiny")).json["id"] == "org/tiny"
            assert (await gate.get("/v1/models/org%2Ftiny")).json["id"] == "org/tiny"
            assert (await gate.get("/v1/models/default")).json["id"] == "org/tiny"
            assert (await gate.get("/v1/models/other")).status == 404
            client = await gate.client()
            client.send(b"HEAD /v1/loads HTTP/1.1\r\nhost: router\r\n\r\n")
            assert (await client.head()).status == 200
            stopped = await gate.post("/stop_profile", b"{}")
            assert stopped.json["success"] and stopped.json["files"] == ["/t"] * 3

    run_async(main())


# --- the whole instance ----------------------------------------------------------------------------------------------


def test_pd_serve_takes_key_and_certificate_and_shows_neither(tmp_path: Path, files: Path) -> None:
    model = tiny_model(tmp_path / "models", tokenizer=True)
    command = [
        sys.executable,
        "-m",
        "pd",
        "serve",
        model,
        "--port",
        "0",
        "--log-format",
        "json",
        "--log-level",
        "debug",
    ]
    tls = ["--ssl-certfile", str(files / "cert.pem"), "--ssl-keyfile", str(files / "key.pem")]
    root, ready = str(Path(__file__).parents[2]), r'"url": "(https://[^"]+)"'
    limit = ["--max-request-bytes", "2000", "--log-level", "debug"]
    with running([*command, *tls, *limit], tmp_path / "logs", ready=ready, PYTHONPATH=root, PD_API_KEY=KEY) as one:
        trusting = ssl.create_default_context(cafile=files / "ca.pem")
        with httpx.Client(base_url=one.url, verify=trusting, timeout=30) as client:
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401
            answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers=RIGHT)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
            assert client.post("/v1/completions", json={"prompt": "a" * 3000}, headers=RIGHT).status_code == 413
        assert one.stop() == 0
    assert KEY not in one.stdout + one.stderr


def test_a_cluster_with_a_key_works_as_one_without(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "models", tokenizer=True)
    command = [sys.executable, "-m", "pd", "up", model, "--port", "0", "--log-format", "json", "--api-key", KEY]
    with running(command, tmp_path / "logs", PYTHONPATH=str(Path(__file__).parents[2])) as one:
        assert httpx.get(f"{one.url}/health", timeout=30).status_code == 200
        assert httpx.get(f"{one.url}/v1/models", timeout=30).status_code == 401
        body = {"prompt": "abc", "max_tokens": 3}
        answer = httpx.post(f"{one.url}/v1/completions", json=body, headers=RIGHT, timeout=30)
        assert answer.status_code == 200 and answer.headers["x-pd-prefill-used"] == "prefill-0"
        assert one.stop() == 0
    assert KEY not in one.stdout + one.stderr
