"""What the router answers itself: health, models, workers, metrics, and operations that go to every worker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

import pd
from pd.logs import get_logger
from pd.router.client import ClientConnection
from pd.router.http import Request, Response, error
from pd.router.metrics import Exposition
from pd.router.prompt import NOT_JSON
from pd.router.proxy import Core
from pd.router.upstream import fetch
from pd.router.workers import Health, Worker

log = get_logger()

#: An operation that every worker carries out is given this long.
_FAN_OUT_TIMEOUT = 30.0

Operation = Callable[[Request], Awaitable[Response]]


def _json(value: Any, status: int = 200) -> Response:
    return Response(status, msgspec.json.encode(value))


class Operations:
    """The table of local operations by path, each with the methods that it allows."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._exposition = Exposition(core.stats, core.fleet)
        get, both = (b"GET", b"HEAD"), (b"GET", b"POST")
        self.table: dict[str, tuple[tuple[bytes, ...], Operation]] = {
            "/health": (get, self.health),
            "/v1/models": (get, self.models),
            "/server_info": (get, self.server_info),
            "/get_server_info": (get, self.server_info),
            "/model_info": (get, self.model_info),
            "/get_model_info": (get, self.model_info),
            "/metrics": (get, self.metrics),
            "/flush_cache": (both, self.fan_out),
            "/start_profile": (both, self.fan_out),
            "/stop_profile": (both, self.fan_out),
        }

    async def health(self, request: Request) -> Response:
        fleet = self.core.fleet
        ready = fleet.ready
        pools = {
            name: {"healthy": sum(worker.routable for worker in workers), "total": len(workers)}
            for name, workers in (("prefill", fleet.prefill), ("decode", fleet.decode))
        }
        return _json({"status": "ok" if ready else "unavailable", **pools}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(200, self._exposition.render(), self._exposition.content_type)

    async def server_info(self, request: Request) -> Response:
        """`workers` is what the router knows; `prefill` and `decode` what the workers last said of themselves."""
        fleet, selection = self.core.fleet, self.core.selection
        now = asyncio.get_running_loop().time()
        return _json(
            {
                "role": "router",
                "version": pd.__version__,
                "policies": {"prefill": selection.prefill.name, "decode": selection.decode.name},
                "active_requests": self.core.stats.active,
                "workers": [_describe(worker, now) for worker in fleet.all()],
                "prefill": [worker.info for worker in fleet.prefill],
                "decode": [worker.info for worker in fleet.decode],
            }
        )

    async def models(self, request: Request) -> Response:
        """The union of what the workers serve, decode's first."""
        fleet = self.core.fleet
        workers = [worker for worker in fleet.decode + fleet.prefill if worker.health is Health.HEALTHY]
        answers = await self._ask(workers, "GET", "/v1/models", b"", self.core.fleet.config.health_timeout)
        models: dict[str, Any] = {}
        for answer in answers:
            if isinstance(answer, Response) and answer.status == 200:
                for model in _models(answer.body):
                    models.setdefault(model["id"], model)
        if not models:
            return error(503, "no worker is available", "no_worker")
        return _json({"object": "list", "data": list(models.values())})

    async def model_info(self, request: Request) -> Response:
        workers = [worker for worker in self.core.fleet.decode if worker.health is Health.HEALTHY]
        timeout = self.core.fleet.config.health_timeout
        for answer in await self._ask(workers, "GET", request.path, b"", timeout):
            if isinstance(answer, Response) and answer.status == 200:
                return answer
        return error(503, "no worker is available", "no_worker")

    async def fan_out(self, request: Request) -> Response:
        """The request to every worker; 200 when all of them did it."""
        workers = self.core.fleet.all()
        target = request.target.decode("latin-1")
        answers = await self._ask(workers, request.method.decode(), target, request.body, _FAN_OUT_TIMEOUT)
        done = [isinstance(answer, Response) and answer.status == 200 for answer in answers]
        results = {
            worker.url: answer.status if isinstance(answer, Response) else answer
            for worker, answer in zip(workers, answers, strict=True)
        }
        return _json({"success": all(done), "workers": results}, 200 if all(done) else 502)

    async def _ask(
        self, workers: Iterable[Worker], method: str, target: str, body: bytes, timeout: float
    ) -> list[Response | str]:
        """Every worker's answer, or why there is none."""

        async def one(worker: Worker) -> Response | str:
            try:
                async with asyncio.timeout(timeout):
                    return await fetch(worker.connections, method, target, body=body)
            except OSError as err:
                return str(err) or "timeout"

        return await asyncio.gather(*map(one, workers))


def _models(body: bytes) -> list[dict[str, Any]]:
    try:
        data = msgspec.json.decode(body)["data"]
    except (*NOT_JSON, KeyError, TypeError):
        return []
    return [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]


def _describe(worker: Worker, now: float) -> dict[str, Any]:
    load = worker.load
    return {
        "url": worker.url,
        "pool": worker.pool,
        "role": worker.role,
        "health": worker.health.value,
        "state": worker.state.value,
        "routable": worker.routable,
        "in_flight": worker.in_flight,
        "control_endpoint": worker.control_endpoint,
        "load": None if load is None else {name: getattr(load, name) for name in load.__struct_fields__},
        "load_age": None if load is None else round(now - worker.load_at, 3),
    }


class LocalAnswer:
    """Handler of a request that the router answers itself."""

    def __init__(self, core: Core, client: ClientConnection, request: Request, operation: Operation) -> None:
        self.core, self.client, self.request, self.operation = core, client, request, operation
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = self.core.spawn(self.client, self._run())

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def expire(self) -> None:
        self.cancel()
        self.client.answer(error(504, "the request took too long", "timeout"))

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    async def _run(self) -> None:
        response = await self.operation(self.request)
        self.client.answer(response)


class Refusal:
    """Handler of a request that is nobody's: the answer is known at once."""

    def __init__(self, client: ClientConnection, response: Response) -> None:
        self.client, self.response = client, response

    def start(self) -> None:
        self.client.answer(self.response)

    def cancel(self) -> None:
        pass

    def expire(self) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass
