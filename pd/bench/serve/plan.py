"""What is sent when: rows and runs, fixed before the first request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from pd.bench.serve.options import Options
from pd.errors import ConfigError

TRACE_BLOCK = 512  # tokens per hash id in the Mooncake format

_RUN_SALT = 0x632BE59BD9B4E019  # prompts of later runs must not hit the prefix cache that earlier runs filled
_WARMUP_SALT = 0x2545F4914F6CDD1D
_SEED_MASK = (1 << 63) - 1  # a record's seed has to fit a JSON integer


@dataclass(frozen=True, slots=True)
class Row:
    """One request: when it is due and how long its prompt and answer are."""

    index: int  # line of the trace, from 0, or number of the request
    at: float  # seconds after the run's start
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...]
    block_len: int  # tokens per hash id


@dataclass(frozen=True)
class Run:
    """One load level."""

    index: int
    label: str
    offered_rps: float  # requests/s that the schedule asks for; inf when all are due at once
    token_seed: int
    rows: tuple[Row, ...]

    def warmup(self, count: int) -> Run:
        """A run of the first `count` rows with tokens of its own, so that it fills no cache for this one."""
        return Run(-1, "warm-up", 0.0, (self.token_seed + _WARMUP_SALT) & _SEED_MASK, self.rows[:count])


class TraceRow(msgspec.Struct):
    """A line of the Mooncake format. `timestamp` in ms, lengths in tokens."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, rows: int | None) -> list[TraceRow]:
    """The first `rows` rows in order of arrival; raises ConfigError with the line that is wrong."""
    decoder = msgspec.json.Decoder(TraceRow)
    found: list[TraceRow] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if rows is not None and len(found) == rows:
                break
            if not line.strip():
                continue
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError("--trace", f"{path} line {number}: {error}") from None
            blocks = -(-row.input_length // TRACE_BLOCK)
            if row.input_length < 1 or row.output_length < 0 or row.timestamp < 0 or len(row.hash_ids) != blocks:
                problem = f"{row.input_length} tokens need {blocks} hash ids, found {len(row.hash_ids)}, or a negative"
                raise ConfigError("--trace", f"{path} line {number}: {problem}")
            found.append(row)
    if not found:
        raise ConfigError("--trace", f"{path} holds no rows")
    return found


def trace_rows(trace: Sequence[TraceRow], length_scale: float) -> list[Row]:
    """Rows with scaled lengths, due at their timestamps in seconds, counted from the first.

    A block is round(512 x scale) tokens; a prompt never needs more than its blocks hold, because rounding of the
    block length could otherwise leave it short.
    """
    block_len = max(1, round(TRACE_BLOCK * length_scale))
    start = min(row.timestamp for row in trace)
    rows = [
        Row(
            index=index,
            at=(row.timestamp - start) / 1000.0,
            input_len=max(1, min(round(row.input_length * length_scale), len(row.hash_ids) * block_len)),
            output_len=max(1, round(row.output_length * length_scale)),
            hash_ids=tuple(row.hash_ids),
            block_len=block_len,
        )
        for index, row in enumerate(trace)
    ]
    return sorted(rows, key=lambda row: row.at)


def synthetic_rows(count: int, input_len: tuple[int, int], output_len: tuple[int, int], seed: int) -> list[Row]:
    """`count` rows with uniform lengths (inclusive bounds) and nothing in common; all due at 0."""
    random = np.random.default_rng(seed)
    inputs = random.integers(input_len[0], input_len[1], size=count, endpoint=True).tolist()
    outputs = random.integers(output_len[0], output_len[1], size=count, endpoint=True).tolist()
    return [Row(i, 0.0, inputs[i], outputs[i], (i,), inputs[i]) for i in range(count)]


def arrivals(count: int, rate: float, poisson: bool, seed: int) -> list[float]:
    """Send times in seconds: evenly spaced from 0, or Poisson (the first after one exponential gap)."""
    if math.isinf(rate):
        return [0.0] * count
    if not poisson:
        return [index / rate for index in range(count)]
    gaps = np.random.default_rng([seed, count]).exponential(1.0 / rate, size=count)
    return [float(at) for at in np.cumsum(gaps)]


def plan_runs(options: Options) -> list[Run]:
    """One run per rate, or per time scale when the trace's own arrival times are used."""
    seed = options.seed
    if options.trace is not None:
        rows = trace_rows(read_trace(options.trace, options.rows), options.length_scale)
    else:
        rows = synthetic_rows(options.num_requests, options.input_len, options.output_len, seed)
    if options.rates:
        kind = "poisson" if options.poisson else "fixed"
        return [
            _run(
                seed,
                i,
                "all at once" if math.isinf(rate) else f"{rate:g}/s {kind}",
                rate,
                rows,
                arrivals(len(rows), rate, options.poisson, seed),
            )
            for i, rate in enumerate(options.rates)
        ]
    return [
        _run(seed, i, f"trace x{scale:g}", _mean_rate(rows, scale), rows, (row.at * scale for row in rows))
        for i, scale in enumerate(options.time_scales)
    ]


def _run(seed: int, index: int, label: str, offered: float, rows: list[Row], times: Iterable[float]) -> Run:
    due = (
        Row(row.index, at, row.input_len, row.output_len, row.hash_ids, row.block_len)
        for row, at in zip(rows, times, strict=True)
    )
    return Run(index, label, offered, (seed + index * _RUN_SALT) & _SEED_MASK, tuple(due))


def _mean_rate(rows: list[Row], scale: float) -> float:
    span = (rows[-1].at - rows[0].at) * scale
    return (len(rows) - 1) / span if span > 0 else math.inf
