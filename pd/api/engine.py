"""The scheduler's client: submits prompts, spreads step outputs over the exchanges, ends every exchange somehow.

One message per step comes in; each request that it concerns is woken once. A request ends when its outputs are
complete, when the scheduler rejects or fails it, when its client disconnects, when nothing was heard of it for longer
than the scheduler itself allows, or when the scheduler is gone: none is left waiting.
"""

from __future__ import annotations

import array
import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from pd.api.detokenizer import Detokenizer
from pd.api.exchange import Choice, Exchange, Generation, Logprobs, Prompt
from pd.api.metrics import Latencies
from pd.errors import ChannelClosed, ChannelFull, ProtocolError, RequestError
from pd.messages import (
    Abort,
    Answer,
    ApiToScheduler,
    Ask,
    Command,
    Finish,
    InstanceInfo,
    ProfileCommand,
    Rejected,
    SchedulerToApi,
    StepOutputs,
    Submit,
)
from pd.types import FinishReason, InstanceState, Load

#: Longer than the scheduler's own bounds, so that its answer comes first when it is alive.
GRACE_S = 1.0
SWEEP_S = 0.25

_WORKER_SHIFT = 40


class SchedulerChannel(Protocol):
    """`pd.ipc.channel.Channel`, or one end of an in-process pair."""

    async def recv(self) -> SchedulerToApi: ...

    def recv_nowait(self) -> SchedulerToApi | None: ...

    def send_nowait(self, message: ApiToScheduler) -> None: ...


DetokenizerFactory = Callable[[Prompt], Detokenizer]


class Engine:
    """`detokenizer` makes one for each output; `idle_timeout_s` bounds the time without a new token."""

    def __init__(
        self,
        channel: SchedulerChannel,
        detokenizer: DetokenizerFactory,
        latencies: Latencies,
        *,
        worker: int = 0,
        idle_timeout_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = InstanceInfo(state=InstanceState.STARTING, load=Load())
        self.clock = clock
        self._channel = channel
        self._detokenizer = detokenizer
        self._latencies = latencies
        self._idle_timeout_s = idle_timeout_s
        self._keys = itertools.count((worker << _WORKER_SHIFT) + 1)
        self._tokens = itertools.count(1)
        self._generations: dict[int, Generation] = {}
        # What a full channel did not take, by key and choice: at most one per submitted choice and one for all.
        self._unsent: dict[tuple[int, int], Abort] = {}
        self._exchanges: set[Exchange] = set()
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.lost = asyncio.Event()
        self.heard = asyncio.Event()  # the scheduler has said that it takes requests, or no longer does
        self._lost = ""
        self._stopping = False

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def open_exchanges(self) -> int:
        return len(self._exchanges)

    @property
    def lost_reason(self) -> str:
        """Empty while the scheduler is there."""
        return self._lost

    def unready(self) -> str:
        """In one word why new requests are not taken; "" when they are."""
        if self._lost:
            return "unavailable"
        if self._stopping or self.info.state is InstanceState.DRAINING:
            return "draining"
        return "starting" if self.info.state is InstanceState.STARTING else ""

    def check_ready(self) -> None:
        error = self.not_ready()
        if error is not None:
            raise error

    def not_ready(self) -> RequestError | None:
        word = self.unready()
        if not word:
            return None
        text = f"the instance is not ready: {self._lost or word}"
        return RequestError(text, status=503, kind="server_error", code=word)

    def stop_accepting(self) -> None:
        """The process is about to end: new requests get 503, running ones finish."""
        self._stopping = True

    # --- requests ----------------------------------------------------------------------------------------------------

    def submit(self, exchange: Exchange, prompts: Iterable[Prompt]) -> None:
        """Send every prompt of an exchange. Raises RequestError when the scheduler cannot take them now."""
        self.check_ready()
        remaining_ms: int | None = None
        if exchange.deadline != float("inf"):
            remaining_ms = int((exchange.deadline - self.clock()) * 1000)
            if remaining_ms <= 0:
                raise _timed_out("x-request-timeout")
        self._exchanges.add(exchange)
        exchange.heard_at = self.clock()
        try:
            self._send_aborts()
            if self._unsent:  # they come first: what is to end makes room, and their number stays bounded
                raise ChannelFull("scheduler")
            for prompt in prompts:
                self._submit_one(exchange, prompt, remaining_ms)
        except (ChannelFull, ChannelClosed) as error:
            self.abort(exchange, "submission failed")
            raise RequestError(
                f"the scheduler takes no requests: {error}", status=503, kind="server_error", code="overloaded"
            ) from error

    def _submit_one(self, exchange: Exchange, prompt: Prompt, remaining_ms: int | None) -> None:
        generation = Generation(exchange, next(self._keys), prompt)
        self._channel.send_nowait(
            Submit(
                key=generation.key,
                rid=prompt.rid,
                tokens_i32=array.array("i", prompt.tokens).tobytes(),
                sampling=prompt.sampling,
                choices=prompt.choices,
                logprob_start=prompt.logprob_start,
                prompt_top_logprobs=prompt.prompt_top_logprobs,
                prefills=prompt.prefills,
                client_timeout_ms=remaining_ms,
                idle_timeout_ms=int(self._idle_timeout_s * 1000),
                priority=prompt.priority,
                salt=prompt.salt,
                room=prompt.room,
                probe=prompt.probe,
            )
        )
        exchange.generations.append(generation)
        generation.choices = [Choice(generation, i, self._detokenizer(prompt)) for i in range(prompt.choices)]
        generation.open += prompt.choices
        exchange.open += prompt.choices
        self._generations[generation.key] = generation

    def abort(self, exchange: Exchange, reason: str) -> None:
        """Forget an exchange; the scheduler is told of every generation that still runs. Idempotent."""
        self._exchanges.discard(exchange)
        for generation in exchange.generations:
            self._abort_generation(generation, reason)

    def _abort_generation(self, generation: Generation, reason: str) -> None:
        if self._generations.pop(generation.key, None) is None or self._lost:
            return
        self._send_abort(Abort(key=generation.key, reason=reason))

    def _send_abort(self, abort: Abort) -> None:
        self._unsent[abort.key, abort.choice] = abort
        self._send_aborts()

    def _send_aborts(self) -> None:
        """What the channel does not take now stays: without its Abort a request would run to its end for nobody."""
        try:
            while self._unsent:
                key, abort = next(iter(self._unsent.items()))
                self._channel.send_nowait(abort)
                del self._unsent[key]
        except ChannelFull:
            pass  # the scheduler has thousands of messages to read; outputs of unknown keys are dropped meanwhile
        except ChannelClosed as error:
            self.lose(str(error))

    async def ask(self, what: str, timeout_s: float = 1.0) -> dict[str, Any]:
        """The scheduler's answer. Raises RequestError 503 when none comes in time."""
        return await self.command(lambda token: Ask(token=token, what=what), what, timeout_s)

    async def command(
        self, make: Callable[[int], Ask | Command | ProfileCommand], what: str, timeout_s: float = 1.0
    ) -> dict[str, Any]:
        """The answer to what `make` makes of a fresh token. Raises RequestError 503 when none comes in time."""
        token = next(self._tokens)
        answer = asyncio.get_running_loop().create_future()
        self._answers[token] = answer
        try:
            if self._lost:
                raise ChannelClosed("scheduler", self._lost)
            self._channel.send_nowait(make(token))
            return await asyncio.wait_for(answer, timeout_s)
        except (TimeoutError, ChannelFull, ChannelClosed) as error:
            problem = str(error) or f"no answer within {timeout_s} s"
            raise RequestError(
                f"the scheduler does not answer ({what}): {problem}",
                status=503,
                kind="server_error",
                code="scheduler_unavailable",
            ) from error
        finally:
            del self._answers[token]

    # --- what the scheduler says -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until the channel ends, one way or another; then every exchange ends, and `lost` is set."""
        try:
            # The scheduler knows an api worker from its first message on.
            self._channel.send_nowait(Ask(token=0, what="info"))
            while True:
                self.handle(await self._channel.recv())
        except (ChannelClosed, ChannelFull, ProtocolError) as error:
            self.lose(str(error))
        finally:
            self.lose("the api process is ending")

    def disconnected(self) -> None:
        """The connection ended. What came before still counts: its news overtakes the last messages."""
        try:
            while (message := self._channel.recv_nowait()) is not None:
                self.handle(message)
        except (ChannelClosed, ProtocolError) as error:
            self.lose(str(error))
        self.lose("its connection ended")

    def handle(self, message: SchedulerToApi) -> None:
        if self._unsent:
            self._send_aborts()
        if isinstance(message, StepOutputs):
            self._outputs(message)
        elif isinstance(message, Rejected):
            self._rejected(message)
        elif isinstance(message, InstanceInfo):
            self.info = message
            if message.state is not InstanceState.STARTING:
                self.heard.set()
        else:
            self._answered(message)

    def lose(self, reason: str) -> None:
        """The scheduler is gone: fail everything that is open. Idempotent; the first reason stays."""
        if self._lost:
            return
        self._lost = f"the scheduler is gone: {reason}"
        self.lost.set()
        self._unsent.clear()
        self.fail_all(self._lost, status=503)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ChannelClosed("scheduler", reason))

    def fail_all(self, reason: str, *, status: int) -> None:
        for exchange in list(self._exchanges):
            exchange.fail(RequestError(reason, status=status, kind="server_error", code="unavailable"))
            self.abort(exchange, reason)

    def _answered(self, message: Answer) -> None:
        answer = self._answers.get(message.token)
        if answer is not None and not answer.done():
            answer.set_result(message.data)

    def _rejected(self, message: Rejected) -> None:
        generation = self._generations.pop(message.key, None)
        if generation is None:
            return
        kind = "invalid_request_error" if message.status < 500 else "server_error"
        self._fail(
            generation.exchange,
            RequestError(message.message, status=message.status, param=message.param, kind=kind, code=message.code),
        )

    def _fail(self, exchange: Exchange, error: RequestError) -> None:
        exchange.fail(error)
        self.abort(exchange, "another prompt of the request failed")

    def _outputs(self, message: StepOutputs) -> None:
        now = self.clock()
        touched: dict[Exchange, None] = {}
        for started in message.started:
            generation = self._generations.get(started.key)
            if generation is None:
                continue
            generation.started = True
            generation.cached_tokens, generation.prefill = started.cached_tokens, started.prefill
            if started.prompt_logprobs is not None:
                generation.prompt_logprobs = Logprobs.of_prompt(started.prompt_logprobs)
                generation.prompt_logprobs_start = started.prompt_logprobs.start
            generation.exchange.heard_at = now
        if message.keys_i64:
            self._rows(message, touched, now)
        for finished in message.finished:
            generation = self._generations.get(finished.key)
            if generation is not None:
                self._finish(generation.choices[finished.choice], finished.finish, touched, now)
        for exchange in touched:
            if exchange.stream or exchange.over:
                exchange.wake()

    def _rows(self, message: StepOutputs, touched: dict[Exchange, None], now: float) -> None:
        tokens = memoryview(message.tokens_i32).cast("i").tolist()
        ends = {(f.key, f.choice): f.finish for f in message.finished}
        logprobs = {row.index: row.logprobs for row in message.logprobs}
        choices, counts = message.choices_u8, message.counts_u8
        at = 0
        for row, key in enumerate(memoryview(message.keys_i64).cast("q").tolist()):
            begin, at = at, at + counts[row]
            generation = self._generations.get(key)
            if generation is None or begin == at:
                continue
            index = choices[row] if choices else 0
            choice = generation.choices[index]
            if choice.finish is not None:
                continue
            end = ends.get((key, index)) if ends else None
            choice.add(tokens[begin:at], logprobs.get(row) if logprobs else None, end)
            self._heard(choice, at - begin, touched, now)
            if choice.finish is not None:
                self._ended(choice, "a stop string matched", now)

    def _heard(self, choice: Choice, count: int, touched: dict[Exchange, None], now: float) -> None:
        exchange = choice.generation.exchange
        if choice.last_at:
            self._latencies.inter_token.observe((now - choice.last_at) / count, count)
        elif not exchange.first_at:
            exchange.first_at = now
            if not choice.generation.prompt.probe:
                self._latencies.first_token.observe(now - exchange.arrived)
        choice.last_at = exchange.heard_at = now
        touched[exchange] = None
        if not choice.queued:
            choice.queued = True
            exchange.ready.append(choice)

    def _finish(self, choice: Choice, finish: Finish, touched: dict[Exchange, None], now: float) -> None:
        exchange = choice.generation.exchange
        if choice.finish is not None:
            return
        if finish.reason is FinishReason.ERROR or (finish.reason is FinishReason.ABORT and finish.status >= 400):
            status = finish.status if finish.status >= 400 else 500
            kind = "server_error" if status >= 500 else "invalid_request_error"
            if choice.generation.open == 1:  # else its other choices are still to be aborted
                self._generations.pop(choice.generation.key, None)
            self._fail(exchange, RequestError(finish.message or "the request failed", status=status, kind=kind))
            return
        choice.close(finish)
        touched[exchange] = None
        if not choice.queued:
            choice.queued = True
            exchange.ready.append(choice)
        self._ended(choice, "", now)

    def _ended(self, choice: Choice, abort: str, now: float) -> None:
        """A choice is complete. `abort` says why the scheduler must be told; "" when it said so itself."""
        generation = choice.generation
        if generation.open == 0:
            if abort:
                self._abort_generation(generation, abort)
            else:
                self._generations.pop(generation.key, None)
        elif abort and not self._lost:
            self._send_abort(Abort(key=generation.key, reason=abort, choice=choice.index))
        if generation.exchange.open == 0:
            generation.exchange.finished_at = now
            self._exchanges.discard(generation.exchange)

    # --- bounds ------------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Runs for the process's life: `sweep_once` now and then."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep_once()

    def sweep_once(self) -> None:
        """End exchanges of which the scheduler says nothing beyond its own bounds; send the aborts that it lacks."""
        self._send_aborts()
        now = self.clock()
        for exchange in list(self._exchanges):
            if now > exchange.deadline + GRACE_S:
                self._expire(exchange, _timed_out("x-request-timeout"))
            elif now > exchange.heard_at + self._idle_timeout_s + GRACE_S:
                self._expire(exchange, _timed_out(f"nothing heard for {self._idle_timeout_s:g} s"))

    def _expire(self, exchange: Exchange, error: RequestError) -> None:
        exchange.fail(error)
        self.abort(exchange, error.message)


def _timed_out(what: str) -> RequestError:
    return RequestError(f"the request timed out ({what})", status=504, kind="server_error", code="timeout")
