"""What is measured, and how a figure comes of the times at which tokens arrived."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pd.bench.engine.client import Answered, EngineClient, Profile
from pd.bench.engine.traces import Shares, read_shares

#: Decode steps that count, and their context: the middle of the window.
WINDOW, CONTEXT = 64, 1024

#: Tokens of the prompts that prefill's rate is measured with, and repeats of a single prompt.
PROMPT_TOKENS, REPEATS = 65536, 5

#: What the throughput of requests is measured with: so many, so long, at most so many at a time.
REQUESTS, INPUT, OUTPUT, AT_ONCE = 512, 1024, 256, 256


@dataclass(frozen=True)
class Throughput:
    seconds: float
    out_tok_s: float


async def decode_ms(engine: EngineClient, batch: int, step_tokens: int) -> float:
    """Milliseconds between steps in which `batch` requests decode and nothing else is computed; the median."""
    lead = -(-batch * CONTEXT // step_tokens) + 8  # steps until the last prompt is computed and the batch has settled
    answers = await engine.ask([CONTEXT - WINDOW // 2 - lead] * batch, lead + WINDOW)
    return 1e3 * statistics.median(steady_gaps(answers))


def steady_gaps(answers: Sequence[Answered]) -> list[float]:
    """Seconds between the arrivals of steps while every request was decoding: after the last one's fourth token."""
    begin = max(answer.times[3] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    times = sorted({time for answer in answers for time in answer.times if begin <= time <= end})
    return [after - before for before, after in itertools.pairwise(times)]


async def decode_shares(engine: EngineClient, batch: int, steps: int, folder: Path, step_tokens: int) -> Shares:
    """Of `steps` steps in which `batch` requests decode and nothing else is computed."""
    lead = -(-batch * CONTEXT // step_tokens) + 8
    profile = Profile(folder, steps, after=8)
    # The recording begins and ends some steps later than it is asked to.
    await engine.ask([CONTEXT - steps // 2 - lead] * batch, lead + steps + 40, profile=profile)
    return read_shares(profile.files[0])


async def prefill_shares(engine: EngineClient, tokens: int, folder: Path) -> Shares:
    """Of the steps of prompts that come one after the other."""
    profile = Profile(folder, REPEATS, after=0)
    await engine.ask([tokens] * (REPEATS + 4), 1, profile=profile)
    return read_shares(profile.files[0])


async def prefill_tok_s(engine: EngineClient, tokens: int) -> float:
    """Prompts one after the other, the queue never empty: tokens per second up to the last one's first token."""
    count = PROMPT_TOKENS // tokens
    answers = await engine.ask([tokens] * count, 1)
    return tokens * count / (max(answer.times[0] for answer in answers) - answers[0].asked)


async def ttft_ms(engine: EngineClient, tokens: int) -> float:
    """Of one prompt on an idle engine; the median of REPEATS."""
    found = []
    for _ in range(REPEATS):
        (answer,) = await engine.ask([tokens], 1)
        found.append(answer.first)
    return 1e3 * statistics.median(found)


async def throughput(engine: EngineClient) -> Throughput:
    answers = await engine.ask([INPUT] * REQUESTS, OUTPUT, at_once=AT_ONCE)
    spent = max(answer.times[-1] for answer in answers) - min(answer.asked for answer in answers)
    return Throughput(spent, REQUESTS * OUTPUT / spent)
