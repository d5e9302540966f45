"""The requests: every way to ask, at lengths around the places where something can go wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: Output tokens of an ordinary request: enough to cross a block of 16.
TOKENS = 20
#: Alternatives that are asked for at each position: by them ties are told from errors.
TOPS = 5


@dataclass(frozen=True)
class Facts:
    """What the deployment says of itself: sizes that the requests are built around."""

    vocab_size: int
    context_length: int
    page_size: int


@dataclass(frozen=True)
class Case:
    """One request for /generate. `prompts` are its prompts as token ids; `sampled` says that draws matter.

    `stream` asks for events, whose last one counts.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    sampling: dict[str, Any]
    outer: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    batch: bool = False

    @property
    def choices(self) -> int:
        return int(self.sampling.get("n", 1))

    @property
    def sampled(self) -> bool:
        return bool(self.sampling.get("temperature", 1.0))

    def body(self) -> dict[str, Any]:
        ids = [list(prompt) for prompt in self.prompts]
        body = {
            "input_ids": ids if self.batch else ids[0],
            "sampling_params": self.sampling,
            "return_logprob": True,
            "top_logprobs_num": TOPS,
            **self.outer,
        }
        return {**body, "stream": True} if self.stream else body


class Prompts:
    """Random prompts, the same for the same seed. Low ids are left out: special tokens and bytes live there."""

    def __init__(self, facts: Facts, seed: int) -> None:
        self._random = random.Random(seed)
        self._low = min(300, facts.vocab_size // 8)
        self._high = facts.vocab_size - self._low
        self.facts = facts

    def ids(self, length: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._low, self._high) for _ in range(length))


def workload(facts: Facts, seed: int) -> list[Case]:
    """Every case, in the order in which they are asked one by one."""
    prompts = Prompts(facts, seed)
    return [*_lengths(prompts), *_draws(prompts), *_ends(prompts), *_logprobs(prompts), *_shapes(prompts)]


def _greedy(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}


def _lengths(prompts: Prompts) -> Iterator[Case]:
    page, room = prompts.facts.page_size, prompts.facts.context_length - TOKENS - 1
    lengths = {1, 2, page - 1, page, page + 1, 3 * page + 5, 199, 1000}
    for length in sorted(n for n in lengths if 0 < n <= room):
        yield Case(f"greedy, prompt of {length}", (prompts.ids(length),), _greedy())
    shared = prompts.ids(min(4 * page, room // 2))
    for index in range(2):
        yield Case(f"greedy, shared prefix, {index + 1}", (shared + prompts.ids(page // 2 + 1),), _greedy())
    yield Case("one token", (prompts.ids(page + 3),), _greedy(max_new_tokens=1))


def _draws(prompts: Prompts) -> Iterator[Case]:
    ways: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": 1.0},
        "top_p": {"temperature": 0.8, "top_p": 0.9},
        "top_k": {"temperature": 1.3, "top_k": 20},
        "min_p": {"temperature": 1.0, "min_p": 0.05},
        "frequency and presence penalty": {"temperature": 1.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        "repetition penalty": {"temperature": 0.7, "repetition_penalty": 1.3, "top_p": 0.95, "top_k": 50},
        "greedy, repetition penalty": {"temperature": 0, "repetition_penalty": 1.5},
    }
    page = prompts.facts.page_size
    for index, (name, fields) in enumerate(ways.items()):
        sampling = _greedy(sampling_seed=7 + index, **fields)
        yield Case(name, (prompts.ids(2 * page + index),), sampling)
    ids = prompts.ids(page + 9)
    bias = {str(ids[0]): 5.0, str(ids[1]): -100.0}
    yield Case("logit_bias", (ids,), _greedy(temperature=1.0, sampling_seed=3, logit_bias=bias))
    for n in (2, 3):
        sampling = _greedy(temperature=1.0, sampling_seed=11, n=n)
        yield Case(f"n = {n}", (prompts.ids(n * page + 3),), sampling)
    yield Case("n = 2 at a block's end, greedy", (prompts.ids(2 * page),), _greedy(n=2))


def _ends(prompts: Prompts) -> Iterator[Case]:
    page = prompts.facts.page_size
    yield Case("end tokens heeded", (prompts.ids(page),), {"max_new_tokens": TOKENS, "temperature": 0})
    sampling = {"max_new_tokens": TOKENS, "temperature": 1.0, "sampling_seed": 5, "min_new_tokens": 8}
    yield Case("min_new_tokens", (prompts.ids(page + 1),), sampling)
    stops = list(prompts.ids(prompts.facts.vocab_size // 8))
    sampling = _greedy(temperature=1.0, sampling_seed=9, stop_token_ids=stops, min_new_tokens=3)
    yield Case("stop_token_ids", (prompts.ids(page + 2),), sampling)
    sampling = _greedy(temperature=1.0, sampling_seed=13, stop=["e", "the "])
    yield Case("stop strings", (prompts.ids(page + 3),), sampling)
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "maxProperties": 1}'
    sampling = {"max_new_tokens": 2 * TOKENS, "temperature": 1.0, "sampling_seed": 17}
    yield Case("json_schema", (prompts.ids(page + 4),), {**sampling, "json_schema": schema})
    yield Case("regex", (prompts.ids(page + 5),), {**sampling, "regex": "[a-f]{4,12}"})
    yield Case("ebnf", (prompts.ids(page + 6),), {**sampling, "ebnf": 'root ::= "a" root "b" | "c"'})


def _logprobs(prompts: Prompts) -> Iterator[Case]:
    page = prompts.facts.page_size
    ids = prompts.ids(3 * page + 1)
    for start in (0, page, 2 * page + 3):
        yield Case(f"prompt logprobs from {start}", (ids,), _greedy(max_new_tokens=3), {"logprob_start_len": start})
    outer: dict[str, Any] = {"logprob_start_len": 0, "token_ids_logprob": list(ids[:3])}
    yield Case("logprobs of given ids", (prompts.ids(page + 7),), _greedy(max_new_tokens=5), outer)
    outer = {"logprob_start_len": 0}
    yield Case("prompt logprobs, n = 2", (prompts.ids(page + 8),), _greedy(max_new_tokens=3, n=2), outer)


def _shapes(prompts: Prompts) -> Iterator[Case]:
    page = prompts.facts.page_size
    several = tuple(prompts.ids(n) for n in (3, page, 2 * page + 1))
    yield Case("a batch", several, _greedy(), batch=True)
    yield Case("a batch with seeds", several, _greedy(temperature=1.0, sampling_seed=21), batch=True)
    yield Case("a stream", (prompts.ids(page + 5),), _greedy(temperature=0.9, sampling_seed=23), stream=True)
    stream = _greedy(temperature=0.9, sampling_seed=29, n=2)
    yield Case("a stream, n = 2", (prompts.ids(page + 6),), stream, stream=True)
