"""Everything that does not generate for a client: what is served, how it is, and what an operator may do with it."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

import msgspec

import pd
from pd.api import answers, metrics
from pd.api.chat import ChatRequest, render_chat
from pd.api.context import Context, Served, check_model, mint_rid, named_prefills
from pd.api.exchange import Exchange, Prompt
from pd.api.http import Http, error_body
from pd.api.profile import ProfileRequest, Profiles
from pd.api.routes import BOTH, GET, POST, Route
from pd.errors import RequestError
from pd.messages import AbortMatching, Continue, Pause
from pd.types import FinishReason, Role, SamplingParams

_TRUE = ("1", "true", "yes")
#: Before everything else that waits.
_PROBE_PRIORITY = 1 << 30
_ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


class AbortRequest(msgspec.Struct, kw_only=True):
    rid: str | list[str] | None = None
    abort_all: bool = False


class PauseRequest(msgspec.Struct, kw_only=True):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """`prompt` or `messages`; the latter with the fields of a chat that shape the prompt."""

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int | list[int]]
    model: str | None = None
    skip_special_tokens: bool | None = None


class Operations:
    """Endpoints by `routes()`."""

    def __init__(self, context: Context) -> None:
        self.context, self.profiles = context, Profiles(context)
        self._abort = msgspec.json.Decoder(AbortRequest)
        self._pause = msgspec.json.Decoder(PauseRequest)
        self._tokenize = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize = msgspec.json.Decoder(DetokenizeRequest)

    def routes(self) -> list[Route]:
        takes: dict[str, dict[str, Any]] = {
            "info": {"answer": dict[str, Any], "query": (("audit", "1: the KV blocks are counted anew, as `audit`"),)},
            "model": {"answer": answers.ModelInfoAnswer},
            "loads": {"answer": answers.LoadsAnswer},
            "abort": {"body": AbortRequest, "answer": answers.AbortAnswer},
            "pause": {"body": PauseRequest, "answer": answers.PauseAnswer, "optional_body": True},
            "go_on": {"answer": answers.PauseAnswer},
            "profile": {"body": ProfileRequest, "answer": answers.ProfileAnswer, "optional_body": True},
            "tokens": {"body": TokenizeRequest, "answer": answers.TokenizeAnswer},
            "text": {"body": DetokenizeRequest, "answer": answers.DetokenizeAnswer},
        }
        return [
            Route("/v1/models", GET, self.models, "What is served", answers.ModelList),
            Route("/v1/models/{model}", GET, self.model, "One of what is served", answers.ModelCard),
            Route("/health", GET, self.health, "200 when requests are taken", answers.HealthAnswer),
            Route("/health_generate", GET, self.health_generate, "Generates one token", answers.HealthAnswer),
            Route("/server_info", GET, self.server_info, "Role, state, load, settings", **takes["info"]),
            Route("/get_server_info", GET, self.server_info, "As /server_info", **takes["info"]),
            Route("/model_info", GET, self.model_info, "The model", **takes["model"]),
            Route("/get_model_info", GET, self.model_info, "As /model_info", **takes["model"]),
            Route("/version", GET, self.version, "pd's version", answers.VersionAnswer),
            Route("/metrics", GET, self.metrics, "Prometheus"),
            Route("/v1/loads", GET, self.loads, "Requests and KV tokens now", **takes["loads"]),
            Route("/loads", GET, self.loads, "As /v1/loads", **takes["loads"]),
            Route("/get_load", GET, self.get_load, "SGLang's older form", list[answers.RankLoad]),
            Route("/flush_cache", BOTH, self.flush_cache, "Empties the prefix cache", answers.FlushAnswer),
            Route("/abort_request", POST, self.abort_request, "Ends requests by id, or all", **takes["abort"]),
            Route("/pause_generation", POST, self.pause, "No more steps until continued", **takes["pause"]),
            Route("/continue_generation", BOTH, self.go_on, "The end of a pause", **takes["go_on"]),
            Route("/tokenize", POST, self.tokenize, "Token ids of a prompt or a chat", **takes["tokens"]),
            Route("/v1/tokenize", POST, self.tokenize, "As /tokenize", **takes["tokens"]),
            Route("/detokenize", POST, self.detokenize, "Text of token ids", **takes["text"]),
            Route("/v1/detokenize", POST, self.detokenize, "As /detokenize", **takes["text"]),
            Route("/start_profile", BOTH, self.profiles.start, "Begins a trace of the runner", **takes["profile"]),
            Route("/stop_profile", BOTH, self.profiles.stop, "Ends and writes it", answers.ProfileAnswer),
        ]

    # --- describing --------------------------------------------------------------------------------------------------

    def _card(self) -> answers.ModelCard:
        served = self.context.served
        return answers.ModelCard(
            id=served.name, created=served.created, root=served.path, max_model_len=served.limits.context_length
        )

    async def models(self, http: Http) -> None:
        await http.respond_json(200, answers.ModelList(data=[self._card()]))

    async def model(self, http: Http) -> None:
        name = http.path.partition("/v1/models/")[2]
        check_model(name, self.context.served)
        await http.respond_json(200, self._card())

    async def health(self, http: Http) -> None:
        error = self.context.engine.not_ready()
        if error is None:
            await http.respond_json(200, answers.HealthAnswer())
        else:
            await http.respond_json(503, {"status": error.code, **error_body(error)})

    async def health_generate(self, http: Http) -> None:
        """One token is generated: here, or by the prefill instances that the router names. On an instance so busy that
        its turn does not come, anybody's tokens will do, whichever of its api workers they go through.
        """
        engine, bound, latencies = self.context.engine, self.context.limits.probe_s, self.context.latencies
        engine.check_ready()
        if engine.info.paused:
            raise _unhealthy("generation is paused", "paused")
        prefills = named_prefills(http) if self.context.served.role == Role.DECODE.value else ()
        rid, began, tokens = f"health-{mint_rid()}", engine.clock(), latencies.tokens()
        prompt = Prompt([1], _ONE_TOKEN, rid, prefills=prefills, priority=_PROBE_PRIORITY, probe=not prefills)
        exchange = Exchange(rid, began, deadline=began + bound)
        try:
            engine.submit(exchange, [prompt])
            async with asyncio.timeout(bound):
                await exchange.wait_over()
        except TimeoutError:
            if latencies.tokens() <= tokens:
                raise _unhealthy(f"no token within {bound:g} s", "timeout") from None
        finally:
            engine.abort(exchange, "the health check is over")
        if exchange.failure is not None:
            raise _unhealthy(exchange.failure.message, exchange.failure.code or "failed")
        if any(c.finish is not None and c.finish.reason is FinishReason.ABORT for c in exchange.choices()):
            raise _unhealthy("it was aborted", "aborted")
        await http.respond_json(200, answers.HealthAnswer())

    async def server_info(self, http: Http) -> None:
        engine, served = self.context.engine, self.context.served
        info = describe(served) | {
            "state": engine.info.state.value,
            "paused": engine.info.paused,
            "load": msgspec.structs.asdict(engine.info.load),
            "control_endpoint": engine.info.control_endpoint,
            "max_total_tokens": engine.info.max_total_tokens,
            "page_size": self._page_size,
        }
        if http.query.get("audit", "").lower() in _TRUE:
            info["audit"] = await engine.ask("audit", self.context.limits.scrape_s)
        await http.respond_json(200, info)

    async def model_info(self, http: Http) -> None:
        served = self.context.served
        answer = answers.ModelInfoAnswer(
            model_path=served.path,
            tokenizer_path=served.path,
            served_model_name=served.name,
            max_model_len=served.limits.context_length,
            vocab_size=served.limits.vocab_size,
        )
        await http.respond_json(200, answer)

    async def version(self, http: Http) -> None:
        await http.respond_json(200, answers.VersionAnswer(version=pd.__version__))

    async def metrics(self, http: Http) -> None:
        # A scrape without the scheduler's figures would show them as zero: a failed scrape says what is the case.
        figures = await self.context.engine.ask("metrics", self.context.limits.scrape_s)
        body, content_type = metrics.exposition(figures, self.context.latencies, http.headers.get("accept", ""))
        await http.respond(200, body, content_type)

    @property
    def _page_size(self) -> int:
        return self.context.engine.info.page_size or self.context.served.info.get("page_size", 0)

    async def loads(self, http: Http) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        most = self.context.served.info.get("max_running_requests", 0)
        load = self.context.engine.info.load
        await http.respond_json(200, answers.loads(load, self._page_size, most, timestamp=now, version=pd.__version__))

    async def get_load(self, http: Http) -> None:
        await http.respond_json(200, [answers.rank_load(self.context.engine.info.load, self._page_size)])

    # --- operating ---------------------------------------------------------------------------------------------------

    async def flush_cache(self, http: Http) -> None:
        await http.respond_json(200, await self.context.engine.ask("flush_cache", self.context.limits.flush_s))

    async def abort_request(self, http: Http) -> None:
        """Unknown ids are no error, as in SGLang: the request may just have ended."""
        request = await http.json(self._abort, self.context.limits.body_bytes)
        rids = [request.rid] if isinstance(request.rid, str) else request.rid or []
        if not request.abort_all and not any(rids):
            raise RequestError("rid must name a request, or abort_all must be true", param="rid")
        count = 0
        for rid in [""] if request.abort_all else dict.fromkeys(rids):
            if rid or request.abort_all:
                count += await self._abort_one(rid)
        await http.respond_json(200, answers.AbortAnswer(aborted=count))

    async def _abort_one(self, rid: str) -> int:
        """By a request's own id, or by that of an answer, which is made of it."""
        count = 0
        for name in dict.fromkeys((rid, rid.removeprefix("chatcmpl-").removeprefix("cmpl-"))):
            if not count and (name or not rid):
                count = (await self._command(lambda token, name=name: AbortMatching(token, name), "abort"))["aborted"]
        return count

    async def pause(self, http: Http) -> None:
        request = await http.json(self._pause, self.context.limits.body_bytes, empty=b"{}")
        answer = await self._command(lambda token: Pause(token, request.mode), "pause")
        await http.respond_json(200, answers.PauseAnswer(message=f"generation is paused ({request.mode})", **answer))

    async def go_on(self, http: Http) -> None:
        answer = await self._command(Continue, "continue")
        await http.respond_json(200, answers.PauseAnswer(message="generation goes on", **answer))

    async def _command(self, make: Any, what: str) -> dict[str, Any]:
        return await self.context.engine.command(make, what, self.context.limits.flush_s)

    # --- tokens ------------------------------------------------------------------------------------------------------

    async def tokenize(self, http: Http) -> None:
        request = await http.json(self._tokenize, self.context.limits.body_bytes)
        check_model(request.model, self.context.served)
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("exactly one of prompt and messages must be given", param="prompt")
        tokenizer = self.context.tokenizer
        if request.messages is not None:
            # Templates write the begin-of-text token themselves.
            texts, special = [render_chat(self.context, _as_chat(request))], bool(request.add_special_tokens)
        else:
            given = request.prompt or ""
            texts = [given] if isinstance(given, str) else given
            special = request.add_special_tokens is not False
        if len(texts) > self.context.limits.prompts:
            raise RequestError(f"prompt must be at most {self.context.limits.prompts} prompts", param="prompt")
        many = await tokenizer.encode(texts, add_special_tokens=special)
        strings = [[tokenizer.piece(token) for token in ids] for ids in many] if request.return_token_strs else None
        batch = isinstance(request.prompt, list)
        counts = [len(ids) for ids in many]
        answer = answers.TokenizeAnswer(
            tokens=[*many] if batch else [*many[0]],
            count=counts if batch else counts[0],
            max_model_len=self.context.served.limits.context_length,
            token_strs=None if strings is None else [*strings] if batch else [*strings[0]],
        )
        await http.respond_json(200, answer)

    async def detokenize(self, http: Http) -> None:
        request = await http.json(self._detokenize, self.context.limits.body_bytes)
        check_model(request.model, self.context.served)
        kinds = {type(item) for item in request.tokens}
        if len(kinds) > 1:
            raise RequestError("tokens must not mix token ids and lists of them", param="tokens")
        batch = kinds == {list}
        many: list[Any] = request.tokens if batch else [request.tokens]
        most = self.context.served.limits.vocab_size
        if not all(0 <= min(ids) and max(ids) < most for ids in many if ids):
            raise RequestError(f"tokens must be token ids from 0 to {most - 1}", param="tokens")
        skips = (False, True) if request.skip_special_tokens is None else (request.skip_special_tokens,) * 2
        tokenizer = self.context.tokenizer
        whole, shown = [await tokenizer.decode_many(many, skip_special_tokens=skip) for skip in skips]
        answer = answers.DetokenizeAnswer(prompt=whole if batch else whole[0], text=shown if batch else shown[0])
        await http.respond_json(200, answer)


def _as_chat(request: TokenizeRequest) -> ChatRequest:
    return ChatRequest(
        messages=request.messages or [],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        chat_template_kwargs=request.chat_template_kwargs,
        tools=request.tools,
    )


def _unhealthy(reason: str, code: str) -> RequestError:
    return RequestError(f"the health check failed: {reason}", status=503, kind="server_error", code=code)


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
