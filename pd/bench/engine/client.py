"""The engine by itself: an instance's scheduler and runner, as `pd serve` starts them, asked without HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import zmq

from pd.config import ServeConfig, for_device
from pd.errors import PdError
from pd.instance import START_TIMEOUT, Plan, check
from pd.ipc.channel import Channel
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkOptions, Sockets
from pd.machine import has_cuda_gpu
from pd.messages import (
    Answer,
    ApiToScheduler,
    Ask,
    InstanceInfo,
    ProfileWish,
    Rejected,
    SchedulerToApi,
    StartProfile,
    StepOutputs,
    StopProfile,
    Submit,
)
from pd.plugins import load_plugins
from pd.process import Child
from pd.supervise import socket_folder
from pd.types import FinishReason, InstanceState, SamplingParams

#: Seconds in which an engine that still works must have said something.
SILENCE = 120.0


@dataclass
class Answered:
    """One request: when it was asked and when each of its tokens came, in monotonic seconds."""

    asked: float
    times: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def first(self) -> float:
        return self.times[0] - self.asked


@dataclass
class Profile:
    """Record `steps` steps once every request has `after` tokens."""

    folder: Path
    steps: int
    after: int
    started: bool = False
    files: list[Path] = field(default_factory=list)


class EngineClient:
    """Use as an async context manager: starts the processes and ends them."""

    def __init__(self, config: ServeConfig, plan_type: type[Plan] = Plan) -> None:
        self._config, self._plan_type = for_device(config, has_cuda_gpu()), plan_type
        self._keys = itertools.count(1)
        self.asked = 0  # key of the last request
        self._resources = AsyncExitStack()
        self._random = np.random.default_rng(0)
        self.start_seconds = 0.0
        self.step_tokens = self._config.scheduler.max_prefill_tokens

    async def __aenter__(self) -> EngineClient:
        try:
            await self._start()
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._resources.aclose()

    async def _start(self) -> None:
        started, model = time.monotonic(), check(self._config, load_plugins())
        self.vocab_size = model.vocab_size
        #: Where the sockets are.
        self.folder = self._resources.enter_context(socket_folder())
        plan = self._plan_type(
            self._config, model, "bench", time.time_ns() // 1_000_000, "127.0.0.1", self.folder
        )  # fmt: skip
        scheduler = await Child.start(plan.scheduler())
        self._resources.push_async_callback(scheduler.terminate, 5.0)
        await scheduler.ready(START_TIMEOUT)
        runner = await Child.start(plan.runner())
        self._resources.push_async_callback(runner.terminate, 10.0)
        self.runner = (await runner.ready(START_TIMEOUT)) | {"pid": runner.pid}
        sockets = Sockets()
        self._resources.callback(sockets.close)
        link = sockets.dial(zmq.DEALER, plan.endpoint("api"), LinkOptions(reconnect=False, identity=b"api-0"))
        self._channel: Channel[ApiToScheduler, SchedulerToApi] = Channel(
            link, Codec(ApiToScheduler), Codec(SchedulerToApi), "scheduler"
        )
        self._resources.callback(self._channel.close)
        self._channel.send_nowait(Ask(token=1, what="info"))
        while not isinstance(said := await self._recv(), InstanceInfo) or said.state is not InstanceState.READY:
            pass
        self.start_seconds = time.monotonic() - started

    async def _recv(self) -> SchedulerToApi:
        return await asyncio.wait_for(self._channel.recv(), SILENCE)

    def prompt(self, tokens: int) -> bytes:
        """Random, so that no two share a prefix."""
        return self._random.integers(0, self.vocab_size, tokens, dtype=np.int32).tobytes()

    async def ask(
        self,
        prompts: Sequence[int],
        max_tokens: int,
        *,
        at_once: int = 1 << 30,
        sampling: SamplingParams | None = None,
        profile: Profile | None = None,
    ) -> list[Answered]:
        """Prompts of so many tokens, `max_tokens` out of each; no more than `at_once` at a time. Greedy by default.

        `profile` records steps on the way; its `files` are there when this returns.
        """
        waiting = iter(range(len(prompts)))
        tokens = [self.prompt(length) for length in prompts]
        requests: dict[int, Answered] = {}
        wanted = sampling or SamplingParams(temperature=0.0)
        wanted = msgspec.structs.replace(wanted, max_tokens=max_tokens, ignore_eos=True)

        def submit(indices: Iterable[int]) -> None:
            for index in indices:
                key = self.asked = next(self._keys)
                requests[key] = Answered(time.monotonic())
                self._channel.send_nowait(Submit(key, f"bench-{key}", tokens[index], wanted))

        submit(itertools.islice(waiting, at_once))
        left = len(prompts)
        while left:
            message = await self._recv()
            now = time.monotonic()
            if profile is not None and not profile.started:
                last = min(len(answer.times) for answer in requests.values())
                if len(requests) == len(prompts) and last >= profile.after:
                    profile.started = True
                    wish = ProfileWish(("GPU",), str(profile.folder), profile.steps)
                    self._channel.send_nowait(StartProfile(next(self._keys), wish))
            match message:
                case Rejected(_, status, text):
                    raise PdError(f"the engine refused a request: {status} {text}")
                case StepOutputs():
                    for key, count in zip(
                        np.frombuffer(message.keys_i64, "<i8").tolist(), message.counts_u8, strict=True
                    ):
                        requests[key].times.extend([now] * count)
                    for ended in message.finished:
                        if ended.finish.reason is not FinishReason.LENGTH:
                            raise PdError(f"a request ended by {ended.finish.reason.value}: {ended.finish.message}")
                        left -= 1
                        submit(itertools.islice(waiting, 1))
        if profile is not None:
            await self._stop(profile)
        return list(requests.values())

    async def _stop(self, profile: Profile) -> None:
        token = next(self._keys)
        self._channel.send_nowait(StopProfile(token))
        while not isinstance(said := await self._recv(), Answer) or said.token != token:
            pass
        if said.data["problem"]:
            raise PdError(f"no profile: {said.data['problem']}")
        profile.files = [Path(str(name)) for name in msgspec.convert(said.data["files"], list[str])]
