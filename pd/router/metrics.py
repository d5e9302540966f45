"""Counts of the router. Plain numbers on the hot path; Prometheus families are made when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from pd.router.workers import Fleet

#: Upper bounds of the duration histograms, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts per bucket, not cumulated; the last one has no upper bound."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def family(self, name: str, help: str) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(name, help, buckets=buckets, sum_value=self.sum)


@dataclass
class Stats:
    """What the data path counts. 499: the client went away."""

    codes: dict[int, int] = field(default_factory=dict)
    active: int = 0
    retries: int = 0
    broken_streams: int = 0
    duration: Histogram = field(default_factory=Histogram)
    first_byte: Histogram = field(default_factory=Histogram)

    def finished(self, code: int, seconds: float) -> None:
        self.codes[code] = self.codes.get(code, 0) + 1
        self.duration.observe(seconds)


class _Collector:
    def __init__(self, stats: Stats, fleet: Fleet) -> None:
        self.stats, self.fleet = stats, fleet

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("pd_router_requests", "finished requests by status", labels=["code"])
        for code, count in sorted(self.stats.codes.items()):
            requests.add_metric([str(code)], count)
        yield requests
        yield GaugeMetricFamily("pd_router_active_requests", "requests being relayed", value=self.stats.active)
        yield CounterMetricFamily("pd_router_retries", "requests sent to another decode", value=self.stats.retries)
        yield CounterMetricFamily(
            "pd_router_broken_streams", "answers that a worker did not finish", value=self.stats.broken_streams
        )
        in_flight = GaugeMetricFamily("pd_router_in_flight", "this router's requests", labels=["worker"])
        up = GaugeMetricFamily("pd_router_worker_up", "1 if requests are routed to it", labels=["worker", "role"])
        sums: dict[str, int] = {}
        for worker in self.fleet.all():
            sums[worker.url] = sums.get(worker.url, 0) + worker.in_flight
            up.add_metric([worker.url, worker.pool], float(worker.routable))
        for url, count in sums.items():
            in_flight.add_metric([url], count)
        yield in_flight
        yield up
        yield self.stats.duration.family("pd_router_request_duration_seconds", "from request to end of answer")
        yield self.stats.first_byte.family("pd_router_first_byte_seconds", "from request to first byte of answer")


class Exposition:
    """The text that /metrics answers."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, stats: Stats, fleet: Fleet) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(stats, fleet))

    def render(self) -> bytes:
        return generate_latest(self._registry)
