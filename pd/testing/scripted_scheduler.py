"""A scheduler that answers from a script, for tests and measurements of the api without anything behind it."""

from __future__ import annotations

import array
import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pd.errors import ChannelClosed, ChannelFull
from pd.ipc.codec import Codec
from pd.messages import (
    Abort,
    AbortMatching,
    Answer,
    ApiToScheduler,
    Ask,
    Command,
    Continue,
    Finish,
    Finished,
    InstanceInfo,
    LogprobRow,
    Pause,
    ProfileCommand,
    PromptLogprobs,
    Rejected,
    SchedulerToApi,
    Started,
    StartProfile,
    StepOutputs,
    StopProfile,
    Submit,
    TokenLogprobs,
    TopLogprobs,
)
from pd.types import FinishReason, InstanceState, Load

SendT = TypeVar("SendT")
RecvT = TypeVar("RecvT")


class PairChannel(Generic[SendT, RecvT]):
    """One end of an in-process pair, with the interface of `pd.ipc.channel.Channel`.

    What is sent goes through `codec`, as over a socket: a message that cannot travel does not arrive here, either.
    """

    def __init__(self, outbox: asyncio.Queue[Any], inbox: asyncio.Queue[Any], codec: Codec[SendT]) -> None:
        self._outbox, self._inbox, self._codec = outbox, inbox, codec
        self.closed = False

    async def recv(self) -> RecvT:
        message = await self._inbox.get()
        if message is None:
            raise ChannelClosed("pair", "the other end closed")
        return message

    def recv_nowait(self) -> RecvT | None:
        if self._inbox.empty():
            return None
        message = self._inbox.get_nowait()
        if message is None:
            raise ChannelClosed("pair", "the other end closed")
        return message

    def send_nowait(self, message: SendT) -> None:
        if self.closed:
            raise ChannelClosed("pair")
        try:
            self._outbox.put_nowait(self._codec.decode(self._codec.encode(message)))
        except asyncio.QueueFull:
            raise ChannelFull("pair") from None

    def close(self) -> None:
        """The other end's `recv` raises ChannelClosed once it has read what was sent before."""
        self.closed = True
        self._outbox.put_nowait(None)


def channel_pair() -> tuple[PairChannel[ApiToScheduler, SchedulerToApi], PairChannel[SchedulerToApi, ApiToScheduler]]:
    """(the api's end, the scheduler's end)."""
    to_scheduler: asyncio.Queue[Any] = asyncio.Queue()
    to_api: asyncio.Queue[Any] = asyncio.Queue()
    sent: Codec[ApiToScheduler] = Codec(ApiToScheduler)
    answered: Codec[SchedulerToApi] = Codec(SchedulerToApi)
    return PairChannel(to_scheduler, to_api, sent), PairChannel(to_api, to_scheduler, answered)


def tokens_of(submit: Submit) -> list[int]:
    return array.array("i", submit.tokens_i32).tolist()


def _ints(code: str, values: Iterable[int]) -> bytes:
    return array.array(code, values).tobytes()


def row(
    key: int,
    tokens: list[int],
    *,
    finish: Finish | None = None,
    logprobs: bool = False,
    top: int = 0,
    choice: int = 0,
    logprob: float = -0.5,
) -> StepOutputs:
    """One choice's share of one step. Logprobs, where wanted: `logprob` for each token, -1, -2, … for others."""
    rows = [LogprobRow(0, token_logprobs(tokens, top, logprob))] if logprobs else []
    return StepOutputs(
        keys_i64=_ints("q", [key]),
        counts_u8=bytes([len(tokens)]),
        tokens_i32=_ints("i", tokens),
        choices_u8=bytes([choice]) if choice else b"",
        logprobs=rows,
        finished=[Finished(key, choice, finish)] if finish is not None else [],
    )


def token_logprobs(tokens: list[int], top: int, logprob: float = -0.5) -> TokenLogprobs:
    return TokenLogprobs(array.array("f", [logprob] * len(tokens)).tobytes(), _tops(tokens, top))


def prompt_logprobs(tokens: list[int], start: int, top: int) -> PromptLogprobs:
    """-0.25 for each prompt token from `start` on; NaN for position 0."""
    values = [float("nan") if at == 0 else -0.25 for at in range(start, len(tokens))]
    return PromptLogprobs(start, array.array("f", values).tobytes(), _tops(tokens[start:], top))


def _tops(tokens: list[int], top: int) -> TopLogprobs | None:
    if not top:
        return None
    ids = [token + rank for token in tokens for rank in range(top)]
    values = [-1.0 - rank for _ in tokens for rank in range(top)]
    return TopLogprobs(top, _ints("i", ids), array.array("f", values).tobytes())


@dataclass(frozen=True)
class Reply:
    """What becomes of one `Submit`: its tokens, one per step, and its end.

    Of several choices `others` are the tokens of the later ones, in order (a missing one gets `tokens`), and `logprobs`
    the logprob of every token of each choice.
    """

    tokens: tuple[int, ...] = ()
    finish: Finish = field(default_factory=lambda: Finish(FinishReason.LENGTH))
    cached_tokens: int = 0
    prefill: str = ""
    step_s: float = 0.0
    per_step: int = 1
    rejected: tuple[int, str] | None = None  # (status, message): never admitted
    silent: bool = False  # nothing is ever said of it
    others: tuple[tuple[int, ...], ...] = ()
    logprobs: tuple[float, ...] = ()


class ScriptedScheduler:
    """Answers each `Submit` by `script`. What came in is kept for assertions: `submits`, `aborts`, `asks`,
    `commands`."""

    def __init__(self, channel: PairChannel[SchedulerToApi, ApiToScheduler], script: Callable[[Submit], Reply]) -> None:
        self.channel = channel
        self.script = script
        self.submits: list[Submit] = []
        self.aborts: list[Abort] = []
        self.asks: list[Ask] = []
        self.commands: list[Command] = []
        self.profiles: list[ProfileCommand] = []
        self.profile_answer: dict[str, object] = {"problem": "", "param": "", "files": ["/a"], "status": 400}
        self.paused = False
        self.answers: dict[str, dict[str, object]] = {
            "info": {},
            "audit": {"balanced": True},
            "flush_cache": {"freed_blocks": 3},
        }
        self._replies: dict[tuple[int, int], asyncio.Task[None]] = {}  # by key and choice

    async def run(self, state: InstanceState = InstanceState.READY) -> None:
        self.announce(state)
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    message = await self.channel.recv()
                except ChannelClosed:
                    break
                if isinstance(message, Submit):
                    self.submits.append(message)
                    reply = self.script(message)
                    for choice in range(message.choices):
                        task = group.create_task(self._reply(message, reply, choice))
                        self._replies[message.key, choice] = task
                elif isinstance(message, Abort):
                    self.aborts.append(message)
                    for (key, choice), task in self._replies.items():
                        if key == message.key and message.choice in (-1, choice):
                            task.cancel()
                elif isinstance(message, Ask):
                    self.asks.append(message)
                    if message.what in self.answers:
                        self.channel.send_nowait(Answer(message.token, self.answers[message.what]))
                elif isinstance(message, AbortMatching | Pause | Continue):
                    self._command(message)
                elif isinstance(message, StartProfile | StopProfile):
                    self.profiles.append(message)
                    self.channel.send_nowait(Answer(message.token, self.profile_answer))

    def _command(self, command: Command) -> None:
        """Carried out as the real one does, on the requests whose reply is not over."""
        self.commands.append(command)
        ends: str | None = command.rid if isinstance(command, AbortMatching) else None
        if isinstance(command, Pause | Continue):
            self.paused = isinstance(command, Pause)
            ends = "" if isinstance(command, Pause) and command.mode == "abort" else None
        count = 0
        for submit in self.submits:
            tasks = {choice: self._replies[submit.key, choice] for choice in range(submit.choices)}
            open_ones = [c for c, task in tasks.items() if not task.done() or self.script(submit).silent]
            if ends is not None and ends in ("", submit.rid) and open_ones:
                count += 1
                finish = Finish(FinishReason.ABORT, message="aborted by the operator")
                for choice in open_ones:
                    tasks[choice].cancel()
                finished = [Finished(submit.key, choice, finish) for choice in open_ones]
                self.channel.send_nowait(StepOutputs(b"", b"", b"", finished=finished))
        self.announce(InstanceState.READY)
        self.channel.send_nowait(Answer(command.token, {"aborted": count, "paused": self.paused}))

    def announce(self, state: InstanceState, max_total_tokens: int = 0) -> None:
        load = Load(running=1, waiting=2, free_blocks=3, total_blocks=4, queued_tokens=5)
        self.channel.send_nowait(InstanceInfo(state, load, "tcp://127.0.0.1:9", max_total_tokens, 32, self.paused))

    async def _reply(self, submit: Submit, reply: Reply, choice: int) -> None:
        key, sampling = submit.key, submit.sampling
        if reply.silent:
            return
        if reply.rejected is not None:
            status, message = reply.rejected
            if not choice:
                self.channel.send_nowait(Rejected(key, status, message, param="prompt", code="scripted"))
            return
        answers = [reply.tokens, *reply.others]
        answer = answers[choice] if choice < len(answers) else reply.tokens
        wanted = None
        if submit.logprob_start >= 0:
            wanted = prompt_logprobs(tokens_of(submit), submit.logprob_start, submit.prompt_top_logprobs)
        started = [] if choice else [Started(key, reply.cached_tokens, reply.prefill, wanted)]
        for at in range(0, len(answer), reply.per_step):
            tokens = list(answer[at : at + reply.per_step])
            last = at + reply.per_step >= len(answer)
            outputs = row(
                key,
                tokens,
                finish=reply.finish if last else None,
                logprobs=sampling.logprobs,
                top=sampling.top_logprobs,
                choice=choice,
                logprob=reply.logprobs[choice] if choice < len(reply.logprobs) else -0.5,
            )
            outputs.started, started = started, []
            self.channel.send_nowait(outputs)
            if not last:
                await asyncio.sleep(reply.step_s)
        if not answer:
            nothing = StepOutputs(b"", b"", b"", finished=[Finished(key, choice, reply.finish)])
            if reply.finish.reason is not FinishReason.ERROR:
                nothing.started = started
            self.channel.send_nowait(nothing)
