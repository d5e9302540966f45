"""Requests whose logits are shaped before they are sampled, served as by a scheduler: they come, are retracted, go."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from pd.messages import StepOrder, TokenLogprobs
from pd.types import SamplingParams
from tests.oracle import Oracle
from tests.worker_driver import Driver, f32

#: What a request may ask for besides a temperature and limits. `least` cannot end with, nor have, half of the tokens.
FEATURES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.5, "logprobs": True},
    "encouraged": {"repetition_penalty": 0.8, "frequency_penalty": -0.4, "presence_penalty": -0.3},
    "bias": {"logit_bias": {5: 4.0, 7: -100.0, 200: 2.5, 9999: 50.0}},
    "least": {"min_tokens": 6, "stop_token_ids": (*range(128), 9999)},
    "tops": {"logprobs": True, "top_logprobs": 4},
    "wanted": {"logprobs": True, "token_ids_logprob": (5, 250, 9999)},
}
ALL: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.4,
    "logit_bias": {5: 3.0, 130: 1.5, 7: -100.0},
    "min_tokens": 4,
    "stop_token_ids": tuple(range(2, 130)),
    "logprobs": True,
    "top_logprobs": 3,
    "token_ids_logprob": (7, 8),
}
GREEDY: dict[str, Any] = {"temperature": 0.0}
WARM: dict[str, Any] = {"temperature": 0.9}
NARROW: dict[str, Any] = {"temperature": 1.1, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


@dataclass(frozen=True)
class Ask:
    """A request for `count` tokens that comes before step `at`, with a prompt of `length` random tokens.

    The prompt's first `shared` blocks are those of request 0, cached. Once `retract` of its tokens are known it leaves,
    and comes back two steps later with all of them.
    """

    at: int
    length: int
    count: int
    sampling: SamplingParams
    chunk: int = 1 << 30
    shared: int = 0
    retract: int = 0


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    said: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class _Live:
    """One admission of a request, under a key of its own; `before` it `known` tokens had been emitted."""

    number: int
    key: int
    known: int


def traffic() -> list[Ask]:
    """Every feature with every way to draw, alone and all together, among plain requests; some are retracted."""
    asks = [Ask(0, 64, 30, SamplingParams(**GREEDY, seed=1))]
    ways = [GREEDY, WARM, NARROW]
    for number, features in enumerate([*FEATURES.values(), ALL, ALL, {}]):
        for way in ways:
            place = len(asks)
            asks.append(
                Ask(
                    at=place // 2,
                    length=3 + 7 * place % 60 + (33 if place % 5 == 0 else 0),
                    count=6 + 5 * place % 17,
                    sampling=SamplingParams(**way, **features, seed=place),
                    chunk=11 if place % 4 == 1 else 1 << 30,
                    shared=2 if place % 5 == 0 else 0,
                    retract=4 if place % 3 == number % 3 else 0,
                )
            )
    return asks


def prompt_of(asks: list[Ask], number: int, vocab: int, page: int) -> list[int]:
    ask = asks[number]
    start = prompt_of(asks, 0, vocab, page)[: ask.shared * page] if ask.shared else []
    return start + np.random.default_rng(number).integers(0, vocab, ask.length - len(start)).tolist()


class Server:
    """Serves `asks` by a driver. With `ahead` a step is launched before the one before it is taken."""

    def __init__(self, driver: Driver, asks: list[Ask], ahead: bool) -> None:
        self.driver, self.asks, self.ahead = driver, asks, ahead
        self.answers = [Answer() for _ in asks]
        self.sizes: set[int] = set()  # of batches without prompts
        self._live: list[_Live] = []
        self._returning: dict[int, list[int]] = {}  # by step: requests
        self._retracted: set[int] = set()
        self._orders: deque[StepOrder] = deque()
        self._key = 0

    def run(self) -> list[Answer]:
        step, last = 0, max(ask.at for ask in self.asks)
        while self._live or step <= last or self._returning:
            for number, ask in enumerate(self.asks):
                if ask.at == step:
                    self._admit(number)
            for number in self._returning.pop(step, []):
                self._admit(number)
            self._step(step)
            step += 1
        while self._orders:
            self.driver.take(self._orders.popleft())
        return self.answers

    def _admit(self, number: int) -> None:
        ask, driver = self.asks[number], self.driver
        prompt = prompt_of(self.asks, number, driver.info.vocab_size, driver.shape.tokens)
        emitted = self.answers[number].tokens
        shared = driver.tracks[0].blocks[: ask.shared] if ask.shared else []
        driver.admit(self._key, prompt + emitted, ask.sampling, prompt_len=len(prompt), shared=shared)
        self._live.append(_Live(number, self._key, len(emitted)))
        self._key += 1

    def _step(self, step: int) -> None:
        counts = {}
        for live in self._live:
            track = self.driver.tracks[live.key]
            counts[live.key] = min(self.asks[live.number].chunk, len(track.tokens) - track.computed)
        if set(counts.values()) == {1}:
            self.sizes.add(len(counts))
        self._orders.append(self.driver.order(dict(sorted(counts.items(), key=lambda item: item[1] > 1))))
        self.driver.worker.launch(self._orders[-1])
        while len(self._orders) > int(self.ahead):
            self.driver.take(self._orders.popleft())
        for live in list(self._live):
            self._part(live, step)

    def _part(self, live: _Live, step: int) -> None:
        """Take a request out that is done or retracted, with what is known of it."""
        ask, track = self.asks[live.number], self.driver.tracks[live.key]
        known = live.known + len(track.emitted)
        retracted = ask.retract and live.number not in self._retracted and known >= ask.retract
        if known < ask.count and not retracted:
            return
        self._live.remove(live)
        self.driver.release(live.key)
        answer = self.answers[live.number]
        answer.tokens += track.emitted[: ask.count - live.known]
        answer.logprobs += track.logprobs[: ask.count - live.known]
        answer.said += track.said[: ask.count - live.known]
        if retracted:
            self._retracted.add(live.number)
            self._returning.setdefault(step + 2, []).append(live.number)


def said_alike(got: list[TokenLogprobs], expected: list[TokenLogprobs], tolerance: float = 1e-5) -> None:
    """Alternatives that are closer to each other than that may come in any order."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert f32(one.chosen_f32) == pytest.approx(f32(other.chosen_f32), abs=tolerance)
        assert f32(one.wanted_f32) == pytest.approx(f32(other.wanted_f32), abs=tolerance, nan_ok=True)
        assert (one.tops is None) == (other.tops is None)
        if one.tops is not None and other.tops is not None:
            assert one.tops.width == other.tops.width
            likely = f32(other.tops.logprobs_f32)
            assert f32(one.tops.logprobs_f32) == pytest.approx(likely, abs=tolerance)
            if (np.abs(np.diff(likely)) > 2 * tolerance).all():
                assert one.tops.ids_i32[:-4] == other.tops.ids_i32[:-4], "the last one may have a neighbour"


class ShapedOracle:
    """transformers' logits, shaped as the definitions of the penalties say, one token after the other."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        self._model = Oracle(path, device=device).model

    def greedy(self, prompt: list[int], count: int, sampling: SamplingParams) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(np.argmax(self._shaped(tokens, len(prompt), sampling))))
        return tokens[len(prompt) :]

    def _shaped(self, tokens: list[int], prompt: int, sampling: SamplingParams) -> Any:
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=self._model.device)
            logits = self._model(ids, use_cache=False).logits[0, -1].float().cpu().numpy().copy()
        for token in set(tokens):
            value = logits[token]
            factor = sampling.repetition_penalty
            logits[token] = value / factor if value > 0 else value * factor
        for token, times in Counter(tokens[prompt:]).items():
            logits[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
        for token, value in sampling.logit_bias.items():
            if token < len(logits):
                logits[token] += value
        if len(tokens) - prompt < sampling.min_tokens:
            logits[[token for token in sampling.stop_token_ids if token < len(logits)]] = -np.inf
        return logits
