"""The real app on real sockets, with a scripted scheduler on the other end of its channel."""

import asyncio
import contextlib
import json
import ssl
from dataclasses import dataclass, field

import httpx

from pd.access import Access
from pd.api.app import App
from pd.api.context import ChatFormats, Context, Limits, Served
from pd.api.engine import Engine
from pd.api.metrics import Latencies
from pd.api.params import ModelLimits
from pd.api.server import HttpServer, bind
from pd.api.tokenizer import Tokenizer
from pd.messages import Finish
from pd.testing import tiny_tokenizer
from pd.testing.scripted_scheduler import Reply, ScriptedScheduler, channel_pair
from pd.types import FinishReason, InstanceState

BOUND_S = 15
STOP = Finish(FinishReason.STOP, stop_id=tiny_tokenizer.EOS)


def encode(text):
    return tuple(tiny_tokenizer.byte_level().encode(text, add_special_tokens=False).ids)


def says(text, **options):
    """A script that answers every prompt with this text and the end token."""
    reply = Reply(tokens=(*encode(text), tiny_tokenizer.EOS), finish=STOP, **options)
    return lambda submit: reply


@dataclass
class Running:
    client: httpx.AsyncClient
    scheduler: ScriptedScheduler
    engine: Engine
    app: App
    port: int
    summaries: list = field(default_factory=list)
    reports: list = field(default_factory=list)

    async def until(self, condition):
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(
    model,
    script,
    *,
    state=InstanceState.READY,
    role="unified",
    limits=None,
    idle_timeout_s=600.0,
    context=256,
    access=None,
    chat=None,
    tls=None,
    latencies=None,
    bound_s=BOUND_S,
):
    api_end, scheduler_end = channel_pair()
    tokenizer = Tokenizer(model)
    latencies = latencies or Latencies()

    def detokenizer(prompt):
        skip, shown = prompt.skip_special_tokens, prompt.shown_tokens
        return tokenizer.detokenizer(prompt.tokens, skip_special_tokens=skip, shown=shown)

    engine = Engine(api_end, detokenizer, latencies, idle_timeout_s=idle_timeout_s)
    scheduler = ScriptedScheduler(scheduler_end, script)
    served = Served("tiny", str(model), role, ModelLimits(tokenizer.vocab_size, context, (tiny_tokenizer.EOS,)))
    summaries, reports = [], []
    app_context = Context(
        engine,
        tokenizer,
        latencies,
        served,
        limits or Limits(),
        summaries.append,
        chat or ChatFormats(),
        access=access or Access(),
    )
    app = App(app_context, reports.append)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    ready = asyncio.Event()
    server = HttpServer(app, ready.set, tls)
    tasks = []
    async with asyncio.timeout(bound_s), asyncio.TaskGroup() as group:
        tasks = [group.create_task(c) for c in (engine.run(), scheduler.run(state), server.run_until_exit(sock))]
        await ready.wait()
        await asyncio.sleep(0)
        verify = tls is None or ssl.create_default_context(cafile=tls.ssl_certfile)
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=BOUND_S, verify=verify) as client:
            yield Running(client, scheduler, engine, app, port, summaries, reports)
        server.should_exit = True
        await tasks[2]
        for task in tasks:
            task.cancel()
    tokenizer.close()
    assert not reports, reports


def events(text):
    """The data of each server-sent event; the stream's form is checked on the way."""
    assert text.endswith("\n\n")
    blocks = text[:-2].split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block[6:] == "[DONE]" else json.loads(block[6:]) for block in blocks]
