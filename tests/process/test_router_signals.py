"""`pd route` as a process: starts, says where it listens, drains on SIGTERM, dies on the second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from router_kit import Call, Client, FakeWorker, eventually, workers

from pd.child import ChildContext
from pd.config import HttpConfig, LogConfig, RouteConfig
from pd.process import Child, ChildSpec
from pd.router import service

Run = Callable[..., Any]


class Process:
    """`pd route`, its log lines read as they come."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            with contextlib.suppress(json.JSONDecodeError):
                self.events.append(json.loads(line))

    async def event(self, name: str) -> dict[str, Any]:
        await eventually(lambda: any(event.get("event") == name for event in self.events), 20.0)
        return next(event for event in self.events if event.get("event") == name)

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading


@contextlib.asynccontextmanager
async def route(*arguments: str) -> AsyncIterator[tuple[Process, int]]:
    process = Process(
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pd", "route", "--port", "0", "--log-format", "json", *arguments),
            stderr=asyncio.subprocess.PIPE,
        )
    )
    try:
        url = (await process.event("router_listening"))["url"]
        yield process, int(url.rpartition(":")[2])
    finally:
        await process.end()


async def connect(port: int) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port))


async def one_then_wait(call: Call) -> None:
    call.start_events()
    call.event("one")
    await call.connection.worker.release.wait()  # type: ignore[attr-defined]
    call.event("two")
    call.end()


@pytest.mark.process
def test_sigterm_stops_accepting_and_lets_running_answers_end(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker(script=one_then_wait)
        decode.release = asyncio.Event()  # type: ignore[attr-defined]
        async with workers(decode), route("--decode", decode.url, "--policy", "random") as (process, port):
            idle, busy = await connect(port), await connect(port)
            busy.post()
            await busy.head()
            assert await busy.chunk() == b"data: one\n\n"
            process.process.send_signal(signal.SIGTERM)
            await process.event("router_draining")
            assert await idle.reader.read() == b""
            with pytest.raises(OSError):
                await connect(port)
            assert process.process.returncode is None
            decode.release.set()  # type: ignore[attr-defined]
            assert await busy.chunk() == b"data: two\n\n"
            assert await busy.chunk() == b""
            assert await busy.reader.read() == b""
            assert await process.process.wait() == 0
            idle.close()
            busy.close()

    run_async(main(), 40.0)


@pytest.mark.process
def test_an_idle_router_stops_at_once(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode), route("--decode", decode.url) as (process, _):
            process.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(5):
                assert await process.process.wait() == 0

    run_async(main(), 40.0)


@pytest.mark.process
def test_the_drain_is_bounded_and_a_second_signal_does_not_wait_for_it(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker(script=one_then_wait)
        decode.release = asyncio.Event()  # type: ignore[attr-defined]
        async with workers(decode):
            for bound, second in (("0.3", False), ("60", True)):
                arguments = ("--decode", decode.url, "--policy", "random", "--drain-timeout", bound)
                async with route(*arguments) as (process, port):
                    client = await connect(port)
                    client.post()
                    await client.head()
                    process.process.send_signal(signal.SIGINT)
                    await process.event("router_draining")
                    if second:
                        process.process.send_signal(signal.SIGINT)
                    async with asyncio.timeout(5):
                        code = await process.process.wait()
                    assert code == (-signal.SIGINT if second else 0)
                    client.close()

    run_async(main(), 40.0)


@pytest.mark.process
def test_as_a_child_it_reports_its_address_and_stops_when_asked(run_async: Run) -> None:
    async def main() -> None:
        decode = FakeWorker()
        async with workers(decode):
            config = RouteConfig(decode=(decode.url,), http=HttpConfig(port=0))
            child = await Child.start(
                ChildSpec("router", "pd.router.service:main", config, log=LogConfig(log_format="json"))
            )
            try:
                address = await child.ready(20.0)
                client = await connect(address["port"])
                client.post()
                assert (await client.answer()).status == 200
                client.send(b"GET /server_info HTTP/1.1\r\nhost: r\r\n\r\n")
                policies = (await client.answer()).json["policies"]
                assert policies == {"prefill": "cache_aware", "decode": "power_of_two"}  # pd-policies is installed
                client.close()
            finally:
                assert await child.terminate(10.0) == 0

    run_async(main(), 40.0)
    assert service.main.__annotations__["context"] == ChildContext.__name__


@pytest.mark.process
def test_the_router_loads_neither_torch_nor_a_tokenizer_nor_a_web_framework(run_async: Run) -> None:
    async def main() -> None:
        code = (
            "import sys, pd.router.service\n"
            "heavy = {'torch', 'transformers', 'tokenizers', 'starlette', 'uvicorn', 'httpx', 'zmq'}\n"
            "print(sorted(heavy & sys.modules.keys()))"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        assert output.strip() == b"[]"

    run_async(main(), 40.0)
