"""Prometheus metrics of an instance: latencies observed here, everything else asked of the scheduler per scrape."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
INTER_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)

KV_STATES = ("free", "owned", "cached", "incoming", "quarantined")
PROMPT_SOURCES = ("computed", "cached", "landed")


class Histogram:
    """Counts per bucket, and after them the sum of what was observed; `cells` is where they are kept.

    Observed once per token, which is why it is not prometheus_client's, with its locks.
    """

    __slots__ = ("bounds", "cells")

    def __init__(
        self, bounds: Sequence[float], cells: MutableSequence[float] | memoryview[float] | None = None
    ) -> None:
        self.bounds = tuple(bounds)
        self.cells = [0.0] * (len(bounds) + 2) if cells is None else cells
        assert len(self.cells) == len(bounds) + 2

    @property
    def total(self) -> float:
        return self.cells[-1]

    def observe(self, value: float, times: int = 1) -> None:
        self.cells[bisect.bisect_left(self.bounds, value)] += times
        self.cells[-1] += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        running, buckets = 0.0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.cells, strict=False):
            running += count
            buckets.append((bound, running))
        return buckets

    def plus(self, other: Histogram) -> Histogram:
        return Histogram(self.bounds, [mine + theirs for mine, theirs in zip(self.cells, other.cells, strict=True)])


@dataclass(frozen=True)
class Latencies:
    """Of one api worker. Where an instance has several, each keeps its own in a file of `folder`, which all can read:

    a scrape reaches any one of them and must tell of all.
    """

    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BUCKETS))
    inter_token: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_BUCKETS))
    folder: Path | None = None

    @classmethod
    def shared(cls, folder: Path, worker: int) -> Latencies:
        """Worker `worker`'s, in a file of its own. Everybody may read it at any time; a count is written at once."""
        size = 8 * (len(FIRST_TOKEN_BUCKETS) + len(INTER_TOKEN_BUCKETS) + 4)
        with (folder / f"latencies-{worker}").open("a+b") as file:
            file.truncate(size)
            return cls._of(memoryview(mmap.mmap(file.fileno(), size)), folder)

    @classmethod
    def _of(cls, data: memoryview, folder: Path | None = None) -> Latencies:
        cells, first = data.cast("d"), len(FIRST_TOKEN_BUCKETS) + 2
        inter_token = Histogram(INTER_TOKEN_BUCKETS, cells[first:])
        return cls(Histogram(FIRST_TOKEN_BUCKETS, cells[:first]), inter_token, folder)

    def tokens(self) -> float:
        """How many tokens clients of all workers have got so far."""
        every = self.of_all()
        return sum((*every.first_token.cells[:-1], *every.inter_token.cells[:-1]))

    def of_all(self) -> Latencies:
        """The sums over this instance's api workers."""
        if self.folder is None:
            return self
        found = [Latencies._of(memoryview(path.read_bytes())) for path in sorted(self.folder.glob("latencies-*"))]
        first, inter = Histogram(FIRST_TOKEN_BUCKETS), Histogram(INTER_TOKEN_BUCKETS)
        for other in found:
            first, inter = first.plus(other.first_token), inter.plus(other.inter_token)
        return Latencies(first, inter)


class _Snapshot(Collector):
    """One scrape's figures."""

    def __init__(self, figures: Mapping[str, Any], latencies: Latencies) -> None:
        self._figures, self._latencies = figures, latencies

    def collect(self) -> Iterable[Metric]:
        figures = self._figures
        yield _labelled(
            GaugeMetricFamily("pd_requests", "Requests by state.", labels=["state"]), figures.get("requests", {})
        )
        blocks = dict.fromkeys(KV_STATES, 0) | figures.get("kv_blocks", {})
        yield _labelled(GaugeMetricFamily("pd_kv_blocks", "KV blocks by state.", labels=["state"]), blocks)
        for name, text in (("pushed", "sent to peers"), ("landed", "received from peers")):
            value = figures.get(f"kv_{name}_bytes", 0)
            yield CounterMetricFamily(f"pd_kv_{name}_bytes", f"Bytes of KV {text}.", value=value)
        sources = dict.fromkeys(PROMPT_SOURCES, 0) | figures.get("prompt_tokens", {})
        yield _labelled(
            CounterMetricFamily("pd_prompt_tokens", "Prompt tokens by where their KV came from.", labels=["source"]),
            sources,
        )
        yield _labelled(
            CounterMetricFamily("pd_handoffs", "Hand-offs by outcome.", labels=["outcome"]),
            figures.get("handoffs", {}),
        )
        yield _labelled(
            CounterMetricFamily(
                "pd_stale_messages", "Messages too late, or of another incarnation: ignored.", labels=["kind"]
            ),
            figures.get("stale_messages", {}),
        )
        for name, key, text in _COUNTERS:
            yield CounterMetricFamily(name, text, value=figures.get(key, 0))
        yield _labelled(
            GaugeMetricFamily(
                "pd_scheduler_loop_lag_seconds", "Lateness of the scheduler's loop, last minute.", labels=["quantile"]
            ),
            figures.get("loop_lag", {}),
        )
        yield _histogram("pd_time_to_first_token_seconds", "From the request's arrival.", self._latencies.first_token)
        yield _histogram("pd_inter_token_latency_seconds", "Between tokens of one output.", self._latencies.inter_token)


#: (metric, the scheduler's name for it, help)
_COUNTERS = (
    ("pd_retractions", "retractions", "Requests taken out of the batch for want of memory."),
    ("pd_steps", "steps", "Steps that the runner has done."),
    ("pd_late_tokens", "late_tokens", "Tokens dropped because their request had left."),
    ("pd_audit_failures", "audit_failures", "Audits in which the books of KV blocks or hand-offs did not balance."),
)


def _labelled(family: Any, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text)
    family.add_metric([], histogram.cumulative(), histogram.total)
    return family


def exposition(figures: Mapping[str, Any], latencies: Latencies, accept: str) -> tuple[bytes, str]:
    """(body, content type) in the format that the Accept header prefers. `figures` is the scheduler's answer."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(figures, latencies.of_all()))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
