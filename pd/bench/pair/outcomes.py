"""What clients saw when an instance was killed. Pure: times are seconds after the run's start."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pd.bench.serve.load import Outcome

#: Seconds without a token that a client notices.
STALL = 1.0

_MESSAGES = 4


class When(enum.Enum):
    """Where a request's life lies relative to the kill and to the moment at which the instance was healthy again."""

    BEFORE = "over before the kill"
    PROMPT = "under way, no token yet"
    ANSWER = "under way, in the middle of its answer"
    DOWN = "sent while the instance was down"
    AFTER = "sent after it was back"


@dataclass(frozen=True)
class Seen:
    """One client's view. `stalled`: the longest time without a token after the kill; `hung`: its own limit ended it."""

    when: When
    completed: bool
    stalled: float
    error: str = ""  # kind and message
    hung: bool = False


def seen(outcome: Outcome, killed: float, back: float) -> Seen:
    answer = outcome.answer
    times = [time - outcome.start for time in answer.times]
    if outcome.ended < killed:
        when = When.BEFORE
    elif outcome.sent < killed:
        when = When.ANSWER if times and times[0] <= killed else When.PROMPT
    else:
        when = When.DOWN if outcome.sent < back else When.AFTER
    marks = np.array([outcome.sent, *times, outcome.ended])
    gaps = np.diff(marks)[marks[1:] > killed]
    stalled = float(gaps.max()) if len(gaps) else 0.0
    kind = answer.error_kind
    error = "" if kind is None else f"{kind}: {answer.error}" if answer.error else kind
    return Seen(when, kind is None, stalled, error, kind == "timeout")


def summary(outcomes: Sequence[Outcome], killed: float, back: float) -> dict[str, Any]:
    """Counts by where a request was; how long clients waited; which errors they got; when all was well again."""
    views = [seen(outcome, killed, back) for outcome in outcomes]
    groups = {}
    for when in When:
        mine = [view for view in views if view.when is when]
        done = [view for view in mine if view.completed]
        stalls = [view.stalled for view in mine if view.completed]
        errors = Counter(view.error for view in mine if view.error)
        groups[when.value] = {
            "requests": len(mine),
            "completed": len(done),
            "completed_after_stall": sum(stall >= STALL for stall in stalls),
            "failed": len(mine) - len(done),
            "longest_wait_s": _points(stalls),
            "failed_after_s": _points([view.stalled for view in mine if not view.completed]),
            "errors": {_short(error): count for error, count in errors.most_common(_MESSAGES)},
        }
    return {
        "killed_at_s": round(killed, 3),
        "down_s": round(back - killed, 3),
        "requests": len(views),
        "failed": sum(not view.completed for view in views),
        "hung": sum(view.hung for view in views),
        "clients": groups,
        "well_again_s": _well_again(outcomes, views, killed),
    }


def _well_again(outcomes: Sequence[Outcome], views: Sequence[Seen], killed: float) -> float:
    """Seconds after the kill until the last request was sent that failed or stalled; 0 if none was."""
    late = [
        outcome.sent - killed
        for outcome, view in zip(outcomes, views, strict=True)
        if view.when in (When.DOWN, When.AFTER) and (not view.completed or view.stalled >= STALL)
    ]
    return round(max(late, default=0.0), 3)


def _points(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, most = np.percentile(values, [50, 100]).tolist()
    return {"p50": round(p50, 3), "max": round(most, 3)}


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."
