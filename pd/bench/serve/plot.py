"""The PNG: curves over the offered rate for several runs, cumulative distributions for one.

matplotlib is the extra `pd-serve[bench]`; `--plot` without it is refused before the load starts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Samples = dict[str, npt.NDArray[np.float64]]

_NAMES = {"ttft_ms": "time to first token", "itl_ms": "inter-token latency", "e2e_ms": "end to end"}
_POINTS = (("p50", "o-", "#2a6f97"), ("p90", "s-", "#e07a1f"), ("p99", "^-", "#b3261e"))


def write_plot(path: Path, title: str, entries: list[dict[str, Any]], samples: Samples) -> None:
    """`samples` are the latencies of the only run; they are not used when there are several."""
    figure = Figure(figsize=(11, 8) if len(entries) > 1 else (13, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    if len(entries) > 1:
        _curves(figure, entries)
    else:
        _cdfs(figure, entries[0], samples)
    figure.savefig(path, format="png")


def _curves(figure: Figure, entries: list[dict[str, Any]]) -> None:
    entries = sorted(entries, key=lambda entry: _offered(entry))
    places = [_offered(entry) for entry in entries]
    labelled = not all(math.isfinite(place) for place in places) or len(set(places)) < len(places)
    xs = [float(index) for index in range(len(entries))] if labelled else places
    axes = figure.subplots(2, 2).ravel()
    for axis, (key, name) in zip(axes, _NAMES.items(), strict=False):
        for point, style, colour in _POINTS:
            ys = [entry[key][point] if entry[key] else math.nan for entry in entries]
            axis.plot(xs, ys, style, color=colour, label=point, markersize=4)
        axis.set_ylabel(f"{name} (ms)")
        _scale_y(axis, [entry[key][point] for entry in entries if entry[key] for point, _, _ in _POINTS])
    last = axes[3]
    last.plot(xs, [entry["achieved_rps"] for entry in entries], "o-", color="#2a6f97", label="completed", markersize=4)
    if entries[0]["goodput"]:
        goodput = [entry["goodput"]["rps"] for entry in entries]
        last.plot(xs, goodput, "s--", color="#3a7d44", label=f"goodput{_limits(entries[0]['goodput'])}", markersize=4)
    if not labelled:
        last.plot(xs, xs, ":", color="#888888", label="offered")
    last.set_ylabel("requests/s")
    last.set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("load" if labelled else "offered requests/s")
        if labelled:
            axis.set_xticks(xs, [entry["label"] for entry in entries])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def _scale_y(axis: Axes, values: list[float]) -> None:
    """Logarithmic where the values span a decade, from 0 otherwise."""
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axis.set_yscale("log")
    elif values:
        axis.set_ylim(0, max(values) * 1.08 or 1.0)


def _cdfs(figure: Figure, entry: dict[str, Any], samples: Samples) -> None:
    goodput = entry["goodput"] or {}
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (key, name) in zip(axes, _NAMES.items(), strict=True):
        _cdf(axis, samples[key], entry[key])
        axis.set_xlabel(f"{name} (ms)")
        axis.grid(alpha=0.3)
        limit = goodput.get(f"slo_{key}")
        if limit is not None:
            what = "limit on a request's mean" if key == "itl_ms" else "limit"
            axis.axvline(limit, color="#888888", linestyle=":", label=f"{what} {limit:g}")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("share of samples")


def _cdf(axis: Axes, values: npt.NDArray[np.float64], points: dict[str, float] | None) -> None:
    if not len(values) or points is None:
        axis.text(0.5, 0.5, "no samples", ha="center", transform=axis.transAxes)
        return
    ordered = np.sort(values)
    axis.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", color="#2a6f97")
    for point, _, colour in _POINTS:
        axis.plot([points[point]], [float(point[1:]) / 100], "o", color=colour, label=f"{point} {points[point]:.1f}")
    if ordered[0] > 0 and ordered[-1] / ordered[0] > 20:
        axis.set_xscale("log")
    axis.set_ylim(0, 1.02)


def _offered(entry: dict[str, Any]) -> float:
    return math.inf if entry["offered_rps"] == "inf" else float(entry["offered_rps"])


def _limits(goodput: dict[str, Any]) -> str:
    parts = [
        f"{name} ≤ {goodput[key]:g} ms"
        for key, name in (("slo_ttft_ms", "TTFT"), ("slo_itl_ms", "mean ITL"))
        if goodput[key] is not None
    ]
    return f" ({', '.join(parts)})"
