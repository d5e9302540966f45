"""What one HTTP request is waiting for: an exchange, its prompts (generations), their outputs (choices).

The engine writes into these as step outputs arrive; the request's own task reads. Between the two there is no queue:
text that is not taken yet is kept once, so a client that does not read costs at most the text of its own output.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pd.api.detokenizer import Detokenizer, StopStrings
from pd.errors import RequestError
from pd.messages import Finish, PromptLogprobs, TokenLogprobs, TopLogprobs
from pd.types import FinishReason, SamplingParams

_STOPPED = Finish(FinishReason.STOP)
_SCORED = Finish(FinishReason.LENGTH)


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready to submit: everything resolved and checked."""

    tokens: list[int]
    sampling: SamplingParams
    rid: str
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprob_start: int = -1
    prompt_top_logprobs: int = 0
    prefills: tuple[str, ...] = ()
    room: int = -1
    priority: int = 0
    salt: str = ""
    shown_tokens: frozenset[int] = frozenset()  # special tokens that are text although others are skipped
    score_only: bool = False  # nothing of the output is shown
    probe: bool = False  # a health check
    choices: int = 1


#: Alternatives at one position: (token ids, logprobs), most likely first.
Alternatives = tuple[list[int], list[float]]


class Logprobs:
    """Logprobs of consecutive tokens, unpacked: `chosen` [n]; `tops` and `wanted` [n] or empty when not asked for."""

    __slots__ = ("chosen", "tops", "wanted")

    def __init__(self) -> None:
        self.chosen: list[float] = []
        self.tops: list[Alternatives] = []
        self.wanted: list[list[float]] = []

    def extend(self, values: TokenLogprobs, limit: int) -> None:
        """Take the first `limit` tokens' values."""
        chosen = floats(values.chosen_f32)
        self._add(chosen, values.tops, values.wanted_f32, limit)

    @classmethod
    def of_prompt(cls, values: PromptLogprobs) -> Logprobs:
        found = cls()
        chosen = floats(values.logprobs_f32)
        found._add(chosen, values.tops, values.wanted_f32, len(chosen))
        return found

    def _add(self, chosen: list[float], tops: TopLogprobs | None, wanted_f32: bytes, limit: int) -> None:
        self.chosen += chosen[:limit]
        if tops is not None:
            width = tops.width
            ids, values = memoryview(tops.ids_i32).cast("i").tolist(), floats(tops.logprobs_f32)
            rows = range(0, min(limit, len(chosen)) * width, width) if width else ()
            self.tops += [(ids[at : at + width], values[at : at + width]) for at in rows]
        if wanted_f32:
            values = floats(wanted_f32)
            width = len(values) // len(chosen)
            self.wanted += [values[at : at + width] for at in range(0, min(limit, len(chosen)) * width, width)]


def floats(data: bytes) -> list[float]:
    return [*memoryview(data).cast("f")]


class Choice:
    """One output. `count` tokens count in usage: all up to the one that ended it, a stop token included."""

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_min_tokens",
        "_pending",
        "_score_only",
        "_stops",
        "count",
        "finish",
        "generation",
        "ids",
        "index",
        "last_at",
        "logprobs",
        "matched",
        "place",
        "queued",
    )

    def __init__(self, generation: Generation, index: int, detokenizer: Detokenizer) -> None:
        prompt = generation.prompt
        self.generation, self.index = generation, index
        self.place = generation.index * prompt.choices + index  # among all outputs of the exchange
        self.count = 0
        self.ids: list[int] = []
        self.logprobs = Logprobs()
        self.finish: Finish | None = None
        self.matched: str | int | None = None
        self.last_at = 0.0
        self.queued = False  # is in the exchange's `ready`
        self._detokenizer = detokenizer
        self._stops = StopStrings(prompt.stop, include=prompt.include_stop) if prompt.stop else None
        self._include_stop = prompt.include_stop
        self._min_tokens = prompt.sampling.min_tokens
        self._score_only = prompt.score_only
        self._pending: list[str] = []

    def take_text(self) -> str:
        """The text since the last call."""
        pending = self._pending
        if len(pending) == 1:
            return pending.pop()
        text = "".join(pending)
        pending.clear()
        return text

    def add(self, ids: list[int], logprobs: TokenLogprobs | None, end: Finish | None) -> None:
        """New tokens; `end` is the choice's finish if it comes with them, so that a stop token's text stays out.

        Sets `finish` when a stop string is complete.
        """
        if self._score_only:
            return
        if end is not None and end.stop_id is not None and ids[-1] == end.stop_id and not self._include_stop:
            shown: Sequence[int] = ids[:-1]
        else:
            shown = ids
        taken = len(ids)
        if self._stops is None:
            text = self._detokenizer.feed(shown)
            if text:
                self._pending.append(text)
        else:
            taken = self._feed_stops(shown, taken)
        if taken < len(ids):
            ids = ids[:taken]
        self.count += taken
        self.ids += ids
        if logprobs is not None:
            self.logprobs.extend(logprobs, taken)

    def _feed_stops(self, shown: Sequence[int], taken: int) -> int:
        """Returns how many tokens count: all, or those up to the end of the stop string."""
        stops = self._stops
        assert stops is not None
        for at, token_id in enumerate(shown):
            text = self._detokenizer.feed((token_id,))
            if not text:
                continue
            if self.count + at + 1 > self._min_tokens:
                text, matched = stops.feed(text)
                if matched is not None:
                    self._pending.append(text)
                    self._end(_STOPPED, matched)
                    return at + 1
            if text:
                self._pending.append(text)
        return taken

    def close(self, finish: Finish) -> None:
        """The scheduler's word that the choice is over: what was held back is text now."""
        if self._score_only:
            self._end(finish if finish.reason is FinishReason.ABORT else _SCORED, None)
            return
        text = self._detokenizer.flush()
        if self._stops is not None:
            text, matched = self._stops.feed(text)
            if matched is not None:
                self._pending.append(text)
                self._end(_STOPPED, matched)
                return
            text += self._stops.release()
        if text:
            self._pending.append(text)
        self._end(finish, finish.stop_id)

    def _end(self, finish: Finish, matched: str | int | None) -> None:
        self.finish, self.matched = finish, matched
        self.generation.open -= 1
        self.generation.exchange.open -= 1


class Generation:
    """One prompt that was submitted, as `Started` and the outputs describe it."""

    __slots__ = (
        "cached_tokens",
        "choices",
        "exchange",
        "index",
        "key",
        "open",
        "prefill",
        "prompt",
        "prompt_logprobs",
        "prompt_logprobs_start",
        "started",
    )

    def __init__(self, exchange: Exchange, key: int, prompt: Prompt) -> None:
        self.exchange, self.key, self.prompt = exchange, key, prompt
        self.index = len(exchange.generations)
        self.choices: list[Choice] = []
        self.open = 0
        self.started = False
        self.cached_tokens = 0
        self.prefill = ""
        self.prompt_logprobs: Logprobs | None = None
        self.prompt_logprobs_start = 0


class Exchange:
    """All of one HTTP request. Ends in exactly one way: every choice finished, `failure` set, or `disconnected`."""

    __slots__ = (
        "_changed",
        "_waiter",
        "arrived",
        "deadline",
        "disconnected",
        "failure",
        "finished_at",
        "first_at",
        "generations",
        "heard_at",
        "open",
        "ready",
        "rid",
        "stream",
    )

    def __init__(self, rid: str, arrived: float, *, stream: bool = False, deadline: float = float("inf")) -> None:
        self.rid, self.arrived, self.stream, self.deadline = rid, arrived, stream, deadline
        self.generations: list[Generation] = []
        self.ready: list[Choice] = []  # choices with something new, in the order in which it came
        self.open = 0  # choices that have not ended
        self.failure: RequestError | None = None
        self.disconnected = False
        self.first_at = 0.0  # of the first token, 0 while there is none
        self.heard_at = arrived
        self.finished_at = 0.0
        self._changed = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def over(self) -> bool:
        return self.open == 0 or self.failure is not None or self.disconnected

    def choices(self) -> list[Choice]:
        """In the order of the prompts."""
        return [choice for generation in self.generations for choice in generation.choices]

    def prefills_used(self) -> str:
        """Names of the prefill instances, for the response header; "" when all were local."""
        return ",".join(dict.fromkeys(g.prefill for g in self.generations if g.prefill))

    def prompt_tokens(self) -> int:
        return sum(len(generation.prompt.tokens) for generation in self.generations)

    def completion_tokens(self) -> int:
        return sum(choice.count for generation in self.generations for choice in generation.choices)

    def cached_tokens(self) -> int:
        return sum(generation.cached_tokens for generation in self.generations)

    def fail(self, error: RequestError) -> None:
        """The first reason stays."""
        if not self.over:
            self.failure = error
            self.wake()

    def disconnect(self) -> None:
        """The client is gone: nobody reads what comes."""
        self.disconnected = True
        self.wake()

    def wake(self) -> None:
        self._changed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until something has changed since the last call. Its owner is the engine, which ends every exchange."""
        if not self._changed:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._changed = False

    async def wait_over(self) -> None:
        while not self.over:
            await self.wait()

    def take_ready(self) -> list[Choice]:
        ready, self.ready = self.ready, []
        for choice in ready:
            choice.queued = False
        return ready
