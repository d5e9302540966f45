"""What a load's outcomes say of the system that bore it, and which of two systems bore it better. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pd.bench.serve.load import Outcome

#: A system keeps up while it completes so much of what is offered.
KEEPS_UP = 0.98

#: It is far beyond its limit, and higher rates say nothing more, below this.
HOPELESS = 0.85

#: The part of a run, from its beginning, in which the batch still grows: it says nothing about keeping up.
_RAMP = 1 / 3

#: Fewer requests than this after the ramp say nothing about a trend.
_LEAST = 20


def completed_share(outcomes: Sequence[Outcome]) -> float:
    """Share of the offered load that is completed: of its requests, times how fast they end by how fast they come.

    A run's own drain hides that a queue grows: every request may complete in the end. But then each one takes longer
    than the one before. If requests that come dt apart end s x dt apart, s > 1, the system completes 1/s of what is
    offered; s is the slope of a straight line (least squares) through (sent, ended) after the ramp.
    """
    if not outcomes:
        return 0.0
    good = [one for one in outcomes if one.answer.error_kind is None]
    share = len(good) / len(outcomes)
    begin = max(one.row.at for one in outcomes) * _RAMP
    late = [one for one in good if one.row.at >= begin]
    if len(late) < _LEAST:
        return share
    sent, ended = np.array([one.row.at for one in late]), np.array([one.ended for one in late])
    if sent[-1] == sent[0]:
        return share
    slope = float(np.polyfit(sent, ended, 1)[0])
    return share / max(1.0, slope)


def compare(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The two systems at the highest rate where both keep up, and where colocation is ahead.

    `points`: entries of `pd bench serve` with `system`, `rate` and `completed_share`.
    """
    by_rate: dict[float, dict[str, Mapping[str, Any]]] = {}
    for point in points:
        by_rate.setdefault(point["rate"], {})[point["system"]] = point
    both = {rate: pair for rate, pair in sorted(by_rate.items()) if len(pair) == 2}
    kept = [rate for rate, pair in both.items() if all(one["completed_share"] >= KEEPS_UP for one in pair.values())]
    found: dict[str, Any] = {"rate": None, "itl_p99_ms": None, "itl_p99_ratio": None}
    if kept:
        pair = both[kept[-1]]
        itl = {system: (pair[system]["itl_ms"] or {}).get("p99") for system in ("pd", "unified")}
        found = {"rate": kept[-1], "itl_p99_ms": itl, "itl_p99_ratio": _ratio(itl["unified"], itl["pd"])}
    return {**found, "unified_wins": wins(both), "keeps_up_to": _limits(points)}


def wins(both: Mapping[float, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Sentences: at which rate the two unified instances are ahead, and in what."""
    found = []
    for rate, pair in both.items():
        pd, unified = pair["pd"], pair["unified"]
        for name, what in (("ttft_ms", "TTFT"), ("itl_ms", "ITL"), ("e2e_ms", "whole request")):
            for point in ("p50", "p99"):
                mine, theirs = (one[name] and one[name][point] for one in (pd, unified))
                if mine and theirs and theirs < mine:
                    found.append(f"{rate:g}/s: {what} {point} {theirs:.1f} ms, pd {mine:.1f}")
        mine, theirs = (one["goodput"]["requests"] for one in (pd, unified))
        if theirs > mine:
            found.append(f"{rate:g}/s: {theirs} requests within the limits, pd {mine}")
    return found


def best_chunk(points: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of each system the chunk size with the most goodput; of equal ones that with the lower p99 of the ITL."""
    found: dict[str, int] = {}
    for system in {point["system"] for point in points}:
        mine = [point for point in points if point["system"] == system]
        best = max(mine, key=lambda one: (one["goodput"]["requests"], -((one["itl_ms"] or {}).get("p99") or 1e9)))
        found[system] = best["chunk"]
    return found


def hopeless(points: Sequence[Mapping[str, Any]], system: str, rate: float) -> float | None:
    """The lower rate at which this system was already far beyond its limit, if there is one."""
    rates = [p["rate"] for p in points if p["system"] == system and p["completed_share"] < HOPELESS]
    return min((one for one in rates if one < rate), default=None)


def _limits(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The highest rate that each system keeps up with."""
    return {
        system: max(
            (p["rate"] for p in points if p["system"] == system and p["completed_share"] >= KEEPS_UP), default=None
        )
        for system in ("pd", "unified")
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
