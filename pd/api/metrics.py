"""Prometheus metrics of an instance: latencies observed here, everything else asked of the scheduler per scrape."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Counts per bucket. Observed once per token, which is why it is not prometheus_client's, with its locks."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        running, buckets = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            buckets.append((bound, float(running)))
        return buckets


@dataclass(frozen=True)
class Latencies:
    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BUCKETS))
    inter_token: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_BUCKETS))


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
    registry.register(_Snapshot(figures, latencies))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
