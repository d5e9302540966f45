"""The ASGI application: which path and method goes where, and how errors become answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

import pd
from pd.api import metrics
from pd.api.chat import ChatRequest, plan_chat
from pd.api.completions import CompletionRequest, plan_completion
from pd.api.context import Context, Served
from pd.api.generate import Generator, Writers
from pd.api.http import ClientDisconnected, Http, Receive, Scope, Send, error_body, http_error
from pd.api.native import GenerateRequest, plan_generate
from pd.errors import RequestError
from pd.types import Role

Endpoint = Callable[[Http], Awaitable[None]]

_TRUE = ("1", "true", "yes")


class App:
    """One per process. `report` is called with what an endpoint raised against all expectation."""

    def __init__(self, context: Context, report: Callable[[BaseException], None]) -> None:
        self.context = context
        self.writers = Writers(context.limits.write_s, context.engine.clock)
        self.idle = asyncio.Event()  # set while no request is being answered
        self.idle.set()
        self._active = 0
        self._report = report
        self._generator = Generator(context, self.writers)
        self._completion = msgspec.json.Decoder(CompletionRequest)
        self._chat = msgspec.json.Decoder(ChatRequest)
        self._generate = msgspec.json.Decoder(GenerateRequest)
        get, post, both = ("GET",), ("POST",), ("GET", "POST")
        self._routes: dict[str, tuple[tuple[str, ...], Endpoint]] = {
            "/v1/completions": (post, self.completions),
            "/v1/chat/completions": (post, self.chat_completions),
            "/generate": (("POST", "PUT"), self.generate),
            "/v1/models": (get, self.models),
            "/health": (get, self.health),
            "/server_info": (get, self.server_info),
            "/get_server_info": (get, self.server_info),
            "/model_info": (get, self.model_info),
            "/get_model_info": (get, self.model_info),
            "/metrics": (get, self.metrics),
            "/flush_cache": (both, self.flush_cache),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        http = Http(scope, receive, send)
        self._active += 1
        self.idle.clear()
        try:
            await self._endpoint(http)(http)
        except RequestError as error:
            await http.respond_error(error)
        except ClientDisconnected:
            return
        except Exception as error:
            # A mistake in this program: reported in full, and the client gets an end rather than a hang.
            self._report(error)
            if http.started:
                raise
            await http.respond_error(RequestError("internal error", status=500, kind="server_error", code="internal"))
        finally:
            self._active -= 1
            if not self._active:
                self.idle.set()

    def _endpoint(self, http: Http) -> Endpoint:
        methods, endpoint = self._routes.get(http.path.rstrip("/") or "/", ((), None))
        if endpoint is None:
            raise http_error(404, f"there is no {http.path}", "not_found")
        if http.method not in methods and not (http.method == "HEAD" and "GET" in methods):
            raise http_error(405, f"{http.path} takes {' or '.join(methods)}, not {http.method}", "method_not_allowed")
        return endpoint

    # --- generating --------------------------------------------------------------------------------------------------

    async def completions(self, http: Http) -> None:
        arrived, request = await self._read(http, self._completion)
        rid = http.request_id() or request.rid
        await self._generator.run(http, arrived, rid, lambda rid: plan_completion(self.context, http, request, rid))

    async def chat_completions(self, http: Http) -> None:
        arrived, request = await self._read(http, self._chat)
        rid = http.request_id() or request.rid
        await self._generator.run(http, arrived, rid, lambda rid: plan_chat(self.context, http, request, rid))

    async def generate(self, http: Http) -> None:
        arrived, request = await self._read(http, self._generate)
        rid = http.request_id() or (request.rid if isinstance(request.rid, str) else None)
        await self._generator.run(http, arrived, rid, lambda rid: plan_generate(self.context, http, request, rid))

    async def _read(self, http: Http, decoder: msgspec.json.Decoder[Any]) -> tuple[float, Any]:
        arrived = self.context.engine.clock()
        self.context.engine.check_ready()
        return arrived, await http.json(decoder, self.context.limits.body_bytes)

    # --- describing --------------------------------------------------------------------------------------------------

    async def models(self, http: Http) -> None:
        served = self.context.served
        model = {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "pd",
            "root": served.path,
            "parent": None,
            "max_model_len": served.limits.context_length,
        }
        await http.respond_json(200, {"object": "list", "data": [model]})

    async def health(self, http: Http) -> None:
        error = self.context.engine.not_ready()
        if error is None:
            await http.respond_json(200, {"status": "ready"})
        else:
            await http.respond_json(503, {"status": error.code, **error_body(error)})

    async def server_info(self, http: Http) -> None:
        engine, served = self.context.engine, self.context.served
        info = describe(served) | {
            "state": engine.info.state.value,
            "load": msgspec.structs.asdict(engine.info.load),
            "control_endpoint": engine.info.control_endpoint,
            "max_total_tokens": engine.info.max_total_tokens,
            "page_size": engine.info.page_size or served.info.get("page_size", 0),
        }
        if http.query.get("audit", "").lower() in _TRUE:
            info["audit"] = await engine.ask("audit", self.context.limits.scrape_s)
        await http.respond_json(200, info)

    async def model_info(self, http: Http) -> None:
        served = self.context.served
        info = {
            "model_path": served.path,
            "tokenizer_path": served.path,
            "served_model_name": served.name,
            "is_generation": True,
            "max_model_len": served.limits.context_length,
            "vocab_size": served.limits.vocab_size,
            "preferred_sampling_params": None,
        }
        await http.respond_json(200, info)

    async def metrics(self, http: Http) -> None:
        # A scrape without the scheduler's figures would show them as zero: a failed scrape says what is the case.
        figures = await self.context.engine.ask("metrics", self.context.limits.scrape_s)
        body, content_type = metrics.exposition(figures, self.context.latencies, http.headers.get("accept", ""))
        await http.respond(200, body, content_type)

    async def flush_cache(self, http: Http) -> None:
        await http.respond_json(200, await self.context.engine.ask("flush_cache", self.context.limits.flush_s))


def describe(served: Served) -> dict[str, Any]:
    """What /server_info says that does not change."""
    return {
        "role": served.role,
        "disaggregation_mode": "null" if served.role == Role.UNIFIED.value else served.role,
        "model": served.name,
        "served_model_name": served.name,
        "model_path": served.path,
        "tokenizer_path": served.path,
        "max_model_len": served.limits.context_length,
        "version": pd.__version__,
        **served.info,
    }
