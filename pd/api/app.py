"""The ASGI application: which path and method goes where, who may ask, and how errors become answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgspec

from pd.api import answers, openapi
from pd.api.chat import ChatRequest, plan_chat
from pd.api.completions import CompletionRequest, plan_completion
from pd.api.context import Context, request_id
from pd.api.generate import Generator, Writers
from pd.api.http import ClientDisconnected, Http, Receive, Scope, Send, http_error
from pd.api.native import GenerateRequest, plan_generate
from pd.api.operations import Operations
from pd.api.routes import GET, POST, Endpoint, Route, Table
from pd.errors import RequestError


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
        self.table = Table([*self._routes(), *Operations(context).routes()])

    def _routes(self) -> list[Route]:
        completion: dict[str, Any] = {"body": CompletionRequest, "answer": answers.CompletionAnswer, "streams": True}
        chat: dict[str, Any] = {"body": ChatRequest, "answer": answers.ChatAnswer, "streams": True}
        either = answers.GenerateAnswer | list[answers.GenerateAnswer]
        native: dict[str, Any] = {"body": GenerateRequest, "answer": either, "streams": True}
        return [
            Route("/v1/completions", POST, self.completions, "OpenAI's completions", **completion),
            Route("/v1/chat/completions", POST, self.chat_completions, "OpenAI's chat", **chat),
            Route("/generate", ("POST", "PUT"), self.generate, "SGLang's native interface", **native),
            Route("/openapi.json", GET, self.openapi, "This description", dict[str, Any]),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        http = Http(scope, receive, send)
        self._active += 1
        self.idle.clear()
        try:
            await self._answer(http)
        except RequestError as error:
            await http.respond_error(error, [(b"www-authenticate", b"Bearer")] if error.status == 401 else None)
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

    async def _answer(self, http: Http) -> None:
        access = self.context.access
        origin = http.headers.get("origin", "") if access.origins else ""
        http.extra_headers = access.cors(origin)
        route = self.table.find(http.path)
        if http.method == "OPTIONS" and origin and "access-control-request-method" in http.headers:
            await self._preflight(http, route, origin)
            return
        if not access.permits(http.path, http.headers.get("authorization", "")):
            raise http_error(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        await self._endpoint(http, route)(http)

    async def _preflight(self, http: Http, route: Route | None, origin: str) -> None:
        """A browser asks first; it has no key yet."""
        methods = route.methods if route is not None else ()
        wanted = http.headers.get("access-control-request-headers", "")
        headers = self.context.access.preflight(origin, methods, wanted)
        if headers is None:
            raise http_error(403, "pages of this origin may not ask (--allowed-origins)", "origin_not_allowed")
        http.extra_headers = headers
        await http.respond(200, b"", "text/plain")

    def _endpoint(self, http: Http, route: Route | None) -> Endpoint:
        if route is None:
            raise http_error(404, f"there is no {http.path}", "not_found")
        methods = route.methods
        # What may also be posted does something, which HEAD must not.
        if http.method not in methods and not (http.method == "HEAD" and methods == GET):
            http.extra_headers = [*http.extra_headers, (b"allow", ", ".join(methods).encode())]
            raise http_error(405, f"{http.path} takes {' or '.join(methods)}, not {http.method}", "method_not_allowed")
        return route.endpoint

    # --- generating --------------------------------------------------------------------------------------------------

    async def completions(self, http: Http) -> None:
        arrived, request = await self._read(http, self._completion)
        rid = request_id(http, request)
        await self._generator.run(http, arrived, rid, lambda rid: plan_completion(self.context, http, request, rid))

    async def chat_completions(self, http: Http) -> None:
        arrived, request = await self._read(http, self._chat)
        rid = request_id(http, request)
        await self._generator.run(http, arrived, rid, lambda rid: plan_chat(self.context, http, request, rid))

    async def generate(self, http: Http) -> None:
        arrived, request = await self._read(http, self._generate)
        rid = request_id(http, request)
        await self._generator.run(http, arrived, rid, lambda rid: plan_generate(self.context, http, request, rid))

    async def _read(self, http: Http, decoder: msgspec.json.Decoder[Any]) -> tuple[float, Any]:
        arrived = self.context.engine.clock()
        self.context.engine.check_ready()
        return arrived, await http.json(decoder, self.context.limits.body_bytes)

    # --- describing --------------------------------------------------------------------------------------------------

    async def openapi(self, http: Http) -> None:
        await http.respond(200, self._document)

    @cached_property
    def _document(self) -> bytes:
        return msgspec.json.encode(openapi.document(self.table.routes, self.context))
