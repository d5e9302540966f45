"""From outcomes to figures. Latencies in milliseconds, rates per second.

- TTFT: sending to the first event that carries output; connecting, where needed, is part of it.
- ITL: gaps between such events. A gap that ends in an event of k tokens counts as k gaps of a k-th each, where the
  server says k (token ids, usage in every event, /generate); else it counts once, per event.
- Mean ITL of a request: (last - first) / (tokens after the first event). What a limit on ITL is compared with, so that
  one late token does not fail a request that was fluent on the whole; answers of a single event meet any limit.
- E2E: sending to the event that carries the finish reason.
- Goodput: requests/s that completed and met every given limit.
Percentiles interpolate linearly. Failed requests are in no latency figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pd.bench.serve.load import Outcome, RunResult
from pd.bench.serve.options import Options
from pd.bench.serve.sse import Answer

PERCENTILES = (50, 90, 99)
_MESSAGES_PER_KIND = 3
_LAG_LIMIT_MS = 10.0  # send lag (p99) from which a result is in doubt
_CPU_LIMIT = 0.8  # share of a core from which the client may be what is measured

Floats = npt.NDArray[np.float64]


def ttft_ms(outcome: Outcome) -> float:
    return (outcome.answer.times[0] - outcome.start - outcome.sent) * 1e3


def e2e_ms(outcome: Outcome) -> float:
    return (outcome.answer.finished_at - outcome.start - outcome.sent) * 1e3


def itl_ms(answer: Answer) -> Floats:
    """Gaps between tokens, or between events where the server does not say how many tokens each carried."""
    gaps = np.diff(np.frombuffer(answer.times, dtype=np.float64)) * 1e3 if len(answer.times) else np.empty(0)
    counts = np.array(answer.counts, dtype=np.int64)
    if len(gaps) and counts.min() > 0:
        return np.repeat(gaps / counts[1:], counts[1:])
    return gaps


def mean_itl_ms(answer: Answer) -> float | None:
    """Mean time per token after the first event; None when nothing came after it."""
    after = answer.output_tokens - (answer.counts[0] or 1) if len(answer.times) > 1 else 0
    return (answer.times[-1] - answer.times[0]) * 1e3 / after if after > 0 else None


def distribution(values: Sequence[float] | Floats) -> dict[str, float] | None:
    """mean, p50, p90, p99, max, or None without values."""
    if not len(values):
        return None
    array = np.asarray(values, dtype=np.float64)
    points = np.percentile(array, PERCENTILES)
    named = {f"p{point}": round(float(value), 3) for point, value in zip(PERCENTILES, points, strict=True)}
    return {"mean": round(float(array.mean()), 3), **named, "max": round(float(array.max()), 3)}


def meets(outcome: Outcome, slo_ttft_ms: float | None, slo_itl_ms: float | None) -> bool:
    """Whether a completed request kept every limit that is given."""
    if outcome.answer.error_kind is not None:
        return False
    mean = mean_itl_ms(outcome.answer)
    return (slo_ttft_ms is None or ttft_ms(outcome) <= slo_ttft_ms) and (
        slo_itl_ms is None or mean is None or mean <= slo_itl_ms
    )


def latencies(outcomes: Sequence[Outcome]) -> dict[str, Floats]:
    """Every sample of the completed requests, by figure."""
    good = [outcome for outcome in outcomes if outcome.answer.error_kind is None]
    means = [mean for outcome in good if (mean := mean_itl_ms(outcome.answer)) is not None]
    gaps = [itl_ms(outcome.answer) for outcome in good]
    return {
        "ttft_ms": np.array([ttft_ms(outcome) for outcome in good]),
        "itl_ms": np.concatenate(gaps) if gaps else np.empty(0),
        "mean_itl_ms": np.array(means),
        "e2e_ms": np.array([e2e_ms(outcome) for outcome in good]),
    }


def summarise(result: RunResult, options: Options) -> dict[str, Any]:
    """One run's entry in the JSON document."""
    outcomes, run = result.outcomes, result.run
    good = [outcome for outcome in outcomes if outcome.answer.error_kind is None]
    # From the run's start, as the schedule defines it, to the last answer: the drain counts.
    duration = max((outcome.ended for outcome in outcomes), default=0.0)
    output_tokens = sum(outcome.answer.output_tokens for outcome in good)
    events = sum(len(outcome.answer.times) for outcome in good)
    entry: dict[str, Any] = {
        "label": run.label,
        "offered_rps": round(run.offered_rps, 4) if np.isfinite(run.offered_rps) else "inf",
        "requests": len(run.rows),
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "duration_s": round(duration, 3),
        "send_window_s": round(run.rows[-1].at, 3),
        "achieved_rps": _per(len(good), duration),
        "output_tokens": output_tokens,
        "output_tok_s": _per(output_tokens, duration),
        **_input_figures(good, duration),
        "events": events,
        "tokens_per_event": round(output_tokens / events, 3) if events else None,
        **{name: distribution(values) for name, values in latencies(outcomes).items()},
        "goodput": _goodput(outcomes, options, duration),
        "errors": _errors(outcomes),
        "send_lag_ms": distribution([max(0.0, (outcome.sent - outcome.row.at) * 1e3) for outcome in outcomes]),
        "concurrency": {
            "peak": result.counters.peak,
            "cap": options.max_concurrency,
            "held": result.counters.held,
        },
        "client": {
            "cpu_share": round(result.cpu_s / result.wall_s, 3),
            "loop_lag_ms": distribution(np.array(result.counters.loop_lag) * 1e3),
        },
    }
    entry["warnings"] = _warnings(entry, good)
    return entry


def _per(count: float, duration: float) -> float:
    return round(count / duration, 4) if duration > 0 else 0.0


def _input_figures(good: Sequence[Outcome], duration: float) -> dict[str, Any]:
    """Prompt tokens as the server counts them, as planned where it does not; cached ones if any request says so."""
    planned = sum(outcome.row.input_len for outcome in good)
    tokens = sum(
        outcome.row.input_len if outcome.answer.prompt_tokens is None else outcome.answer.prompt_tokens
        for outcome in good
    )
    said = [outcome.answer.cached_tokens for outcome in good if outcome.answer.cached_tokens is not None]
    return {
        "planned_input_tokens": planned,
        "input_tokens": tokens,
        "input_tok_s": _per(tokens, duration),
        "cached_tokens": sum(said) if said else None,
        "cached_share": round(sum(said) / tokens, 4) if said and tokens else None,
    }


def _goodput(outcomes: Sequence[Outcome], options: Options, duration: float) -> dict[str, Any] | None:
    if options.slo_ttft_ms is None and options.slo_itl_ms is None:
        return None
    good = sum(meets(outcome, options.slo_ttft_ms, options.slo_itl_ms) for outcome in outcomes)
    return {
        "slo_ttft_ms": options.slo_ttft_ms,
        "slo_itl_ms": options.slo_itl_ms,
        "requests": good,
        "share": round(good / len(outcomes), 4) if outcomes else 0.0,
        "rps": _per(good, duration),
    }


def _errors(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts by kind, and each kind's first different messages."""
    failed = [outcome.answer for outcome in outcomes if outcome.answer.error_kind is not None]
    kinds = Counter(str(answer.error_kind) for answer in failed)
    return {
        kind: {
            "count": count,
            "messages": list(dict.fromkeys(a.error for a in failed if a.error_kind == kind))[:_MESSAGES_PER_KIND],
        }
        for kind, count in kinds.most_common()
    }


def _warnings(entry: dict[str, Any], good: Sequence[Outcome]) -> list[str]:
    """Reasons to doubt the run."""
    found = []
    held, cap = entry["concurrency"]["held"], entry["concurrency"]["cap"]
    if held:
        found.append(f"not an open loop: {held} requests waited because {cap} were in flight (--max-concurrency)")
    lag = entry["send_lag_ms"]
    if lag and lag["p99"] > _LAG_LIMIT_MS and not held:
        found.append(f"requests left late (p99 {lag['p99']:.0f} ms): the client or its machine could not keep up")
    if entry["client"]["cpu_share"] > _CPU_LIMIT:
        found.append(f"the client used {entry['client']['cpu_share']:.0%} of a core: latencies may be its own")
    if any(outcome.answer.completion_tokens is None for outcome in good):
        found.append("the server sends no usage: output tokens are counted as events")
    unknown = any(min(outcome.answer.counts, default=1) == 0 for outcome in good)
    if unknown and entry["tokens_per_event"] is not None and entry["tokens_per_event"] > 1.02:
        found.append(f"events carry {entry['tokens_per_event']:.2f} tokens on average: ITL percentiles are per event")
    wrong = sum(outcome.answer.completion_tokens not in (None, outcome.row.output_len) for outcome in good)
    if wrong:
        found.append(f"{wrong} answers have another length than asked for")
    return found
