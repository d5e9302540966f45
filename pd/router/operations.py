"""What the router answers itself: health, models, workers, metrics, and operations that go to every worker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec

import pd
from pd.logs import get_logger
from pd.router.client import ClientConnection
from pd.router.http import Request, Response, error
from pd.router.metrics import Exposition
from pd.router.prompt import NOT_JSON
from pd.router.proxy import Core
from pd.router.upstream import fetch
from pd.router.workers import Fleet, Health, Worker

log = get_logger()

#: An operation that every worker carries out is given this long.
_FAN_OUT_TIMEOUT = 30.0

#: A trace is written by then: longer than an instance allows itself.
_PROFILE_TIMEOUT = 610.0

#: Bytes of an answer that may be as long as the request.
_LARGE = 256 << 20

#: What the path of one model begins with.
_MODEL = "/v1/models/"

Operation = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class _Loads(msgspec.Struct):
    """What is read of a worker's /v1/loads."""

    loads: list[dict[str, Any]]
    aggregate: dict[str, int | float]


def _json(value: Any, status: int = 200) -> Response:
    return Response(status, msgspec.json.encode(value))


class Operations:
    """The table of local operations by path, each with the methods that it allows."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._exposition = Exposition(core.stats, core.fleet)
        get, post, both = (b"GET", b"HEAD"), (b"POST",), (b"GET", b"POST")
        self.table: dict[str, tuple[tuple[bytes, ...], Operation]] = {
            "/health": (get, self.health),
            "/v1/models": (get, self.models),
            "/server_info": (get, self.server_info),
            "/get_server_info": (get, self.server_info),
            "/model_info": (get, self.model_info),
            "/get_model_info": (get, self.model_info),
            "/metrics": (get, self.metrics),
            "/version": (get, self.version),
            "/openapi.json": (get, self.anyone),
            "/tokenize": (post, self.anyone),
            "/v1/tokenize": (post, self.anyone),
            "/detokenize": (post, self.anyone),
            "/v1/detokenize": (post, self.anyone),
            "/loads": (get, self.loads),
            "/v1/loads": (get, self.loads),
            "/get_load": (get, self.get_load),
            "/flush_cache": (both, self.fan_out),
            "/abort_request": (post, self.fan_out),
            "/pause_generation": (post, self.fan_out),
            "/continue_generation": (both, self.fan_out),
            "/start_profile": (both, self.profile),
            "/stop_profile": (both, self.profile),
        }
        self._model = (get, self.model)

    def find(self, path: str) -> tuple[tuple[bytes, ...], Operation] | None:
        """The id of a model is the rest of its path, slashes and all."""
        is_model = path.startswith(_MODEL) and len(path) > len(_MODEL)
        return self._model if is_model else self.table.get(path)

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
        models = await self._models(request)
        if not models:
            return error(503, "no worker is available", "no_worker")
        return _json({"object": "list", "data": list(models.values())})

    async def model(self, request: Request) -> Response:
        models = await self._models(request)
        name = unquote(request.path[len(_MODEL) :])
        if not models:
            return error(503, "no worker is available", "no_worker")
        # As instances have it: also by its path, and "default" is what there is.
        for card in models.values():
            if name in ("default", card["id"], card.get("root")):
                return _json(card)
        return error(404, f"the model {name!r} does not exist", "model_not_found")

    async def _models(self, request: Request) -> dict[str, Any]:
        fleet = self.core.fleet
        workers = [worker for worker in fleet.decode + fleet.prefill if worker.health is Health.HEALTHY]
        answers = await self._ask(workers, request, fleet.config.health_timeout, target="/v1/models")
        models: dict[str, Any] = {}
        for answer in answers:
            if isinstance(answer, Response) and answer.status == 200:
                for model in _models(answer.body):
                    models.setdefault(model["id"], model)
        return models

    async def model_info(self, request: Request) -> Response:
        workers = [worker for worker in self.core.fleet.decode if worker.health is Health.HEALTHY]
        timeout = self.core.fleet.config.health_timeout
        for answer in await self._ask(workers, request, timeout):
            if isinstance(answer, Response) and answer.status == 200:
                return answer
        return error(503, "no worker is available", "no_worker")

    async def version(self, request: Request) -> Response:
        return _json({"version": pd.__version__})

    async def anyone(self, request: Request) -> Response:
        """What every decode instance answers alike: the first that does."""
        fleet = self.core.fleet
        for worker in Fleet.candidates(fleet.decode):
            (answer,) = await self._ask([worker], request, _FAN_OUT_TIMEOUT, limit=_LARGE)
            if isinstance(answer, Response) and answer.status != 503:
                return answer
        return error(503, "no decode instance is available", "no_worker")

    async def loads(self, request: Request) -> Response:
        """SGLang's /v1/loads of every worker, as one: its `loads` have the worker's url and pool."""
        found = await self._answers(request, "/v1/loads", _Loads)
        entries = [
            {**entry, "worker": worker.url, "pool": worker.pool} for worker, said in found for entry in said.loads
        ]
        totals: dict[str, Any] = {}
        for _, said in found:
            for name, value in said.aggregate.items():
                totals[name] = totals.get(name, 0) + value
        for name in totals:
            if name.startswith("avg_"):
                totals[name] = round(totals[name] / len(found), 4)
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        return _json({"timestamp": now, "version": pd.__version__, "loads": entries, "aggregate": totals})

    async def get_load(self, request: Request) -> Response:
        found = await self._answers(request, "/get_load", list[dict[str, Any]])
        return _json([entry for _, said in found for entry in said])

    async def _answers(self, request: Request, target: str, form: type[T]) -> list[tuple[Worker, T]]:
        """What every healthy worker says in this form, without those that do not."""
        workers = [worker for worker in self.core.fleet.all() if worker.health is Health.HEALTHY]
        answers = await self._ask(workers, request, self.core.fleet.config.health_timeout, target=target)
        found = []
        for worker, answer in zip(workers, answers, strict=True):
            if isinstance(answer, Response) and answer.status == 200:
                with contextlib.suppress(*NOT_JSON):
                    found.append((worker, msgspec.json.decode(answer.body, type=form)))
        return found

    async def profile(self, request: Request) -> Response:
        """Every worker writes a trace of its own, which takes as long as it takes."""
        return await self.fan_out(request, _PROFILE_TIMEOUT)

    async def fan_out(self, request: Request, timeout: float = _FAN_OUT_TIMEOUT) -> Response:
        """The request to every worker; 200 when all of them did it. What all of them refuse alike is refused so."""
        workers = self.core.fleet.all()
        answers = await self._ask(workers, request, timeout)
        heard = [answer for answer in answers if isinstance(answer, Response)]
        statuses = {answer.status for answer in heard}
        if heard and len(heard) == len(workers) and len(statuses) == 1 and 400 <= heard[0].status < 500:
            return heard[0]
        success = len(heard) == len(workers) and statuses <= {200}
        results = {
            worker.url: answer.status if isinstance(answer, Response) else answer
            for worker, answer in zip(workers, answers, strict=True)
        }
        counts = [_aborted(answer.body) for answer in heard if answer.status == 200]
        more: dict[str, Any] = {} if None in counts else {"aborted": sum(count or 0 for count in counts)}
        files = [name for answer in heard if answer.status == 200 for name in _files(answer.body)]
        if files:
            more["files"] = files
        return _json({"success": success, **more, "workers": results}, 200 if success else 502)

    async def _ask(
        self, workers: Iterable[Worker], request: Request, timeout: float, *, target: str = "", limit: int = 1 << 20
    ) -> list[Response | str]:
        """Every worker's answer to the request, or to a GET of `target`, or why there is none."""
        reads = bool(target) or request.method == b"HEAD"
        method, body = ("GET", b"") if reads else (request.method.decode("latin-1"), request.body)
        where = target or request.target.decode("latin-1")
        key = request.header(b"authorization").encode("latin-1")
        authorization = b"authorization: %b\r\n" % key if key else b""

        async def one(worker: Worker) -> Response | str:
            try:
                async with asyncio.timeout(timeout):
                    return await fetch(
                        worker.connections, method, where, body=body, limit=limit, authorization=authorization
                    )
            except OSError as err:
                return str(err) or "timeout"

        return await asyncio.gather(*map(one, workers))


def _aborted(body: bytes) -> int | None:
    """How many requests an instance says to have ended; None where it says nothing of it."""
    try:
        return int(msgspec.json.decode(body)["aborted"])
    except (*NOT_JSON, KeyError, TypeError, ValueError):
        return None


def _files(body: bytes) -> list[str]:
    """The traces that an instance says to have written."""
    try:
        return [name for name in msgspec.json.decode(body)["files"] if isinstance(name, str)]
    except (*NOT_JSON, KeyError, TypeError):
        return []


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
