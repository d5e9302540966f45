"""The api as a child process, and its end: drained, stopped, or without its scheduler."""

import asyncio
import contextlib
import subprocess
import sys

import httpx
import pytest
import zmq

from pd.api.service import ApiConfig, Service
from pd.config import HttpConfig
from pd.errors import ConfigError, ProcessError
from pd.ipc.channel import Router
from pd.ipc.codec import Codec
from pd.ipc.zmq import Sockets
from pd.messages import Answer, ApiToScheduler, Ask, Finish, InstanceInfo, SchedulerToApi, Submit
from pd.process import Child, ChildSpec
from pd.testing import tiny_tokenizer
from pd.testing.scripted_scheduler import Reply, ScriptedScheduler, channel_pair, row
from pd.types import FinishReason, InstanceState, Load, ModelInfo

pytestmark = pytest.mark.process


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = str(tiny_tokenizer.write(tmp_path_factory.mktemp("model")))
    vocab = tiny_tokenizer.byte_level().get_vocab_size()
    return ModelInfo(
        "tiny", path, "LlamaForCausalLM", vocab, 256, 2, 2, 2, 8, 16, "float32", (tiny_tokenizer.EOS,), "f"
    )


def config(model, scheduler="", **http):
    return ApiConfig(model, scheduler, http=HttpConfig(port=0, **http), info={"transfer": "direct"})


@contextlib.asynccontextmanager
async def running(model, script, **http):
    """A service in this process, and its scripted scheduler; yields (client, scheduler, stop event, its task)."""
    api_end, scheduler_end = channel_pair()
    scheduler = ScriptedScheduler(scheduler_end, script)
    service = Service(config(model, **http), api_end, lambda summary: None)
    stopping, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        answering = group.create_task(scheduler.run())
        task = asyncio.ensure_future(service.run(stopping, ready.set_result))
        address = await ready
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{address['port']}", timeout=10) as client:
            yield client, scheduler, stopping, task
        stopping.set()
        await asyncio.gather(task, return_exceptions=True)
        answering.cancel()


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_a_child_process_serves_through_zmq_and_stops_when_asked(run_async, model, tmp_path):
    async def main():
        sockets = Sockets()
        link = sockets.listen(zmq.ROUTER, f"ipc://{tmp_path}/api")
        router = Router(link, Codec(SchedulerToApi), Codec(ApiToScheduler))

        async def schedule():
            while True:
                identity, message = await router.recv()
                assert identity == b"api-3"
                if isinstance(message, Ask):
                    router.send_nowait(identity, Answer(message.token, {}))
                    router.send_nowait(identity, InstanceInfo(InstanceState.READY, Load()))
                if isinstance(message, Submit):
                    assert message.key >> 40 == 3
                    router.send_nowait(identity, row(message.key, [10, 11], finish=Finish(FinishReason.LENGTH)))

        scheduler = asyncio.ensure_future(schedule())
        settings = ApiConfig(model, link.endpoint, worker=3, http=HttpConfig(port=0))
        child = await Child.start(ChildSpec("api", "pd.api.service:main", settings))
        try:
            ready = await child.ready(20)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ready['port']}", timeout=10) as client:
                async with asyncio.timeout(5):
                    while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                answer = await client.post("/generate", json={"text": "Hello", "max_new_tokens": 2})
                assert answer.json()["output_ids"] == [10, 11]
            assert await child.terminate(10) == 0
        finally:
            child.kill()
            scheduler.cancel()
            router.close()
            sockets.close()

    run_async(main(), 40)


def test_a_child_process_ends_with_an_error_when_its_scheduler_goes(run_async, model, tmp_path):
    async def main():
        sockets = Sockets()
        link = sockets.listen(zmq.ROUTER, f"ipc://{tmp_path}/api")
        router = Router(link, Codec(SchedulerToApi), Codec(ApiToScheduler))
        child = await Child.start(ChildSpec("api", "pd.api.service:main", ApiConfig(model, link.endpoint)))
        try:
            await child.ready(20)
            router.close()
            sockets.close()
            assert await asyncio.wait_for(child.wait(), 10) == 1
            assert "scheduler" in child.failure
        finally:
            child.kill()

    run_async(main(), 40)


def test_stopping_finishes_what_runs_and_refuses_what_is_new(run_async, model):
    async def main():
        script = lambda submit: Reply(tokens=(10,) * 20, step_s=0.02)  # noqa: E731
        async with running(model, script) as (client, scheduler, stopping, task):
            request = asyncio.ensure_future(client.post("/generate", json={"text": "Hello"}))
            await until(lambda: scheduler.submits)
            stopping.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0.02)
            health = await client.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "draining"
            refused = await client.post("/generate", json={"text": "Hello"})
            assert refused.status_code == 503
            assert (await request).json()["meta_info"]["completion_tokens"] == 20
            await task

    run_async(main())


def test_a_request_that_outlives_the_drain_bound_is_told(run_async, model):
    async def main():
        async with running(model, lambda s: Reply(silent=True), drain_timeout=0.1) as (client, scheduler, stop, task):
            request = asyncio.ensure_future(client.post("/generate", json={"text": "Hello"}))
            await until(lambda: scheduler.submits)
            stop.set()
            answer = await request
            assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]
            await task

    run_async(main())


def test_a_lost_scheduler_ends_the_service_after_its_clients_were_told(run_async, model):
    async def main():
        async with running(model, lambda s: Reply(silent=True)) as (client, scheduler, _, task):
            request = asyncio.ensure_future(client.post("/generate", json={"text": "Hello"}))
            await until(lambda: scheduler.submits)
            scheduler.channel.close()
            assert (await request).status_code == 503
            with pytest.raises(ProcessError, match="scheduler"):
                await task

    run_async(main())


def test_a_scheduler_that_ends_after_draining_is_no_error_and_its_last_words_count(run_async, model, tmp_path):
    async def main():
        sockets = Sockets()
        link = sockets.listen(zmq.ROUTER, f"ipc://{tmp_path}/api")
        router = Router(link, Codec(SchedulerToApi), Codec(ApiToScheduler))
        child = await Child.start(ChildSpec("api", "pd.api.service:main", config(model, link.endpoint)))
        try:
            port = (await child.ready(20))["port"]
            identity, _ = await router.recv()
            router.send_nowait(identity, InstanceInfo(InstanceState.READY, Load()))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                async with asyncio.timeout(5):
                    while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                request = asyncio.ensure_future(client.post("/generate", json={"text": "Hello"}))
                identity, submit = await router.recv()
                router.send_nowait(identity, InstanceInfo(InstanceState.DRAINING, Load()))
                router.send_nowait(identity, row(submit.key, [10, 11], finish=Finish(FinishReason.LENGTH)))
                await asyncio.sleep(0.05)
                router.close()
                assert (await request).json()["output_ids"] == [10, 11]
            assert await asyncio.wait_for(child.wait(), 10) == 0
        finally:
            child.kill()
            sockets.close()

    run_async(main(), 40)


def test_a_taken_port_is_an_error_that_names_the_flag(run_async, model):
    async def main():
        async with running(model, lambda s: Reply()) as (client, *_):
            taken = ApiConfig(model, "", http=HttpConfig(port=client.base_url.port))
            service = Service(taken, channel_pair()[0], lambda summary: None)
            with pytest.raises(ConfigError, match="--port"):
                await service.run(asyncio.Event(), lambda data: None)

    run_async(main())


def test_the_process_loads_neither_torch_nor_transformers():
    code = (
        "import sys, pd.api.service\n"
        "bad = {'torch', 'transformers', 'triton', 'mooncake', 'nixl'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
