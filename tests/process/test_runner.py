"""A runner in a process of its own: start-up, orders, failures, and a hand-off between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from pd.config import CacheConfig, ModelConfig, TransferConfig
from pd.errors import ProcessError
from pd.ipc.channel import Channel
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkOptions, Sockets
from pd.messages import (
    Admit,
    Push,
    RunnerFailed,
    RunnerReady,
    RunnerToScheduler,
    StepDone,
    StepOrder,
    TransferCommand,
    TransferConnect,
    TransferConnected,
    TransferEvent,
    TransferGrant,
    TransferPushed,
    TransferVerified,
    TransferVerify,
)
from pd.process import Child, ChildSpec
from pd.runner.config import RunnerConfig
from pd.types import SamplingParams
from tests.oracle import Oracle, tiny_model
from tests.worker_driver import f32, i32, i64

pytestmark = pytest.mark.process

Run = Callable[..., Any]
GREEDY = SamplingParams(temperature=0.0, logprobs=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models"), "llama")


class RunnerProcess:
    """The scheduler's ends of a runner's two sockets, and the process."""

    def __init__(self, sockets: Sockets, role: str, path: str, transfer: TransferConfig, **cache: Any) -> None:
        options = LinkOptions(heartbeat=0)
        self.steps: Channel[StepOrder, RunnerToScheduler] = Channel(
            sockets.listen(zmq.PAIR, "ipc://*", options), Codec(StepOrder), Codec(RunnerToScheduler)
        )
        self.transfer: Channel[TransferCommand, TransferEvent] = Channel(
            sockets.listen(zmq.PAIR, "ipc://*", options), Codec(TransferCommand), Codec(TransferEvent)
        )
        config = RunnerConfig(
            role=role,
            identity=f"{role}:1:0",
            step_endpoint=self.steps.link.endpoint,
            transfer_endpoint=self.transfer.link.endpoint,
            model=ModelConfig(model=path, served_model_name="tiny"),
            cache=CacheConfig(**{"page_size": 16, "max_total_tokens": 1600, **cache}),
            transfer=transfer,
        )
        self.spec = ChildSpec("runner", "pd.runner.service:main", config, env={"OMP_NUM_THREADS": "1"})
        self.child: Child | None = None

    async def start(self) -> RunnerReady:
        self.child = await Child.start(self.spec)
        ready = await self.steps.recv()
        assert isinstance(ready, RunnerReady)
        await self.child.ready(10)
        return ready

    async def step(self, order: StepOrder) -> StepDone:
        self.steps.send_nowait(order)
        done = await self.steps.recv()
        assert isinstance(done, StepDone)
        return done


@asynccontextmanager
async def runners(
    roles: tuple[str, ...], path: str, transfer: TransferConfig | None = None, **cache: Any
) -> AsyncIterator[list[RunnerProcess]]:
    sockets = Sockets()
    made = [RunnerProcess(sockets, role, path, transfer or TransferConfig(), **cache) for role in roles]
    try:
        yield made
    finally:
        for one in made:
            if one.child is not None:
                await one.child.terminate(10)
            one.steps.close()
            one.transfer.close()
        sockets.close()


def first_order(prompt: list[int], blocks: list[int], **fields: Any) -> StepOrder:
    admit = Admit(1, 1, i32(prompt), len(prompt), 0, i32(blocks), GREEDY, logprob_start=0)
    return StepOrder(1, i64([1]), i32([len(prompt)]), b"\1", admit=[admit], **fields)


def test_a_unified_runner_serves_orders_until_it_is_stopped(run_async: Run, model: str) -> None:
    prompt = np.random.default_rng(3).integers(0, 256, 40).tolist()

    async def main() -> None:
        async with runners(("unified",), model) as (runner,):
            ready = await runner.start()
            assert (ready.num_blocks, ready.layers, ready.kv_heads) == (101, (0, 3), (0, 2))
            assert ready.descriptor == b"" and ready.block_bytes == 2 * 3 * 2 * 16 * 16 * 4
            assert ready.model.name == "tiny" and ready.model.architecture == "LlamaForCausalLM"
            # One order ahead, as a scheduler sends them.
            runner.steps.send_nowait(first_order(prompt, [3, 9, 4]))
            for step in range(2, 7):
                runner.steps.send_nowait(StepOrder(step, i64([1]), i32([1]), b"\1"))
            results = [await runner.steps.recv() for _ in range(6)]
            tokens = [np.frombuffer(done.tokens_i32, np.int32)[0] for done in results if isinstance(done, StepDone)]
            expected = Oracle(model).generate_logprobs(prompt, 6)
            assert tokens == expected.tokens
            first = results[0]
            assert isinstance(first, StepDone) and first.compute_us > 0
            ours = f32(first.prompt_logprobs[0].logprobs.logprobs_f32)
            theirs = [float(expected.logprobs[position - 1, prompt[position]]) for position in range(1, 40)]
            assert ours[1:] == pytest.approx(theirs, abs=1e-5)
            assert runner.child is not None and await runner.child.terminate(10) == 0

    run_async(main(), limit=60)


def test_an_order_that_cannot_be_executed_ends_the_runner_with_a_reason(run_async: Run, model: str) -> None:
    async def main() -> None:
        async with runners(("unified",), model) as (runner,):
            await runner.start()
            runner.steps.send_nowait(StepOrder(1, i64([5]), i32([1]), b"\1"))
            failed = await runner.steps.recv()
            assert failed == RunnerFailed(0, "ProtocolError: rows_i64: request 5 is not admitted")
            assert runner.child is not None and await runner.child.wait() == 1
            assert "request 5 is not admitted" in runner.child.describe_exit()

    run_async(main(), limit=60)


def test_a_model_that_cannot_be_loaded_is_told_to_scheduler_and_parent(run_async: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with runners(("unified",), str(tmp_path / "none")) as (runner,):
            runner.child = await Child.start(runner.spec)
            failed = await runner.steps.recv()
            assert isinstance(failed, RunnerFailed) and "no such directory" in failed.reason
            with pytest.raises(ProcessError, match="no such directory"):
                await runner.child.ready(10)

    run_async(main(), limit=60)


def test_a_pool_that_does_not_fit_exits_as_a_wrong_setting(run_async: Run, model: str) -> None:
    async def main() -> None:
        async with runners(("unified",), model, max_total_tokens=1 << 40) as (runner,):
            runner.child = await Child.start(runner.spec)
            failed = await runner.steps.recv()
            assert isinstance(failed, RunnerFailed) and "--max-total-tokens" in failed.reason
            assert await asyncio.wait_for(runner.child.wait(), 10) == 2

    run_async(main(), limit=60)


@pytest.mark.parametrize("memory", ["shm", "tcp"])
def test_a_prompt_prefilled_in_one_runner_is_decoded_in_another(run_async: Run, model: str, memory: str) -> None:
    """Chunk by chunk: each step's blocks are pushed when the step is done, the last, partial one with the last."""
    prompt = np.random.default_rng(4).integers(0, 256, 41).tolist()
    here, there = [5, 9, 2], [7, 1, 30]

    async def main() -> None:
        async with runners(("prefill", "decode"), model, TransferConfig(transfer_memory=memory)) as (prefill, decode):
            told = await decode.start()
            await prefill.start()
            assert told.identity == "decode:1:0" and told.descriptor
            prefill.transfer.send_nowait(TransferConnect(told.identity, told.descriptor))
            assert isinstance(await prefill.transfer.recv(), TransferConnected)
            decode.transfer.send_nowait(TransferGrant("prefill:1:0", 11, i32(there)))
            digests = b""
            for step, (count, blocks, valid) in enumerate([(20, [0], [16]), (21, [1, 2], [16, 9])]):
                source, target = i32([here[i] for i in blocks]), i32([there[i] for i in blocks])
                fields: dict[str, Any] = {
                    "complete_i32": source,
                    "complete_tokens_i32": i32(valid),
                    "pushes": [Push(told.identity, 11, step, source, target)],
                }
                if step == 0:
                    fields["admit"] = [Admit(1, 1, i32(prompt), 41, 0, i32(here), GREEDY)]
                done = await prefill.step(StepOrder(step, i64([1]), i32([count]), bytes([step]), **fields))
                digests += done.digests_u64
                pushed = await prefill.transfer.recv()
                assert isinstance(pushed, TransferPushed) and pushed.index == step
            first = np.frombuffer(done.tokens_i32, np.int32).tolist()
            decode.transfer.send_nowait(TransferVerify("prefill:1:0", 11, i32(there), i32([16, 16, 9]), digests))
            verified = await decode.transfer.recv()
            assert isinstance(verified, TransferVerified) and (verified.bad_i32, verified.error) == (b"", "")
            admit = Admit(8, 1, i32(prompt + first), 41, 41, i32(there), GREEDY)
            tokens = list(first)
            for step in range(5):
                order = StepOrder(step, i64([8]), i32([1]), b"\1", admit=[] if step else [admit])
                tokens += np.frombuffer((await decode.step(order)).tokens_i32, np.int32).tolist()
            assert tokens == Oracle(model).generate_logprobs(prompt, 6).tokens

    run_async(main(), limit=60)


def test_an_unknown_transfer_backend_exits_as_a_wrong_setting(run_async: Run, model: str) -> None:
    async def main() -> None:
        async with runners(("decode",), model, TransferConfig(transfer="pigeon")) as (runner,):
            runner.child = await Child.start(runner.spec)
            failed = await runner.steps.recv()
            assert isinstance(failed, RunnerFailed) and "no transfer backend 'pigeon'; installed: " in failed.reason
            assert await asyncio.wait_for(runner.child.wait(), 10) == 2

    run_async(main(), limit=60)
