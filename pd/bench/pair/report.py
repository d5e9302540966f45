"""Tables and curves of the merged document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

NAMES = {"pd": "1 prefill + 1 decode", "unified": "2 unified"}
OUTCOMES = ("equal", "tie", "differs", "failed", "skipped")
_COLOURS = {"pd": "#2a6f97", "unified": "#b3261e"}
_STYLES = (("p50", "o-"), ("p90", "s--"), ("p99", "^:"))


def print_report(document: Mapping[str, Any], console: Console) -> None:
    for name, found in document["verify"].items():
        said = "equal" if found["right"] else "NOT equal"
        counts = ", ".join(f"{found[one]} {one}" for one in OUTCOMES if found[one])
        console.print(f"verify {name}: {said} to one unified instance ({counts}; {found['by_prefill']} by prefill)")
    if document["push_gbps"]:
        console.print(_pushes(document))
    for title, points in (("load", document["curves"]), ("trace", document["trace"])):
        if points:
            console.print(_loads(title, points))
    if document["rate"] is not None:
        itl = document["itl_p99_ms"]
        console.print(
            f"at {document['rate']:g}/s, the highest rate that both keep up with, ITL p99: pd {itl['pd']:.2f} ms, "
            f"unified {itl['unified']:.2f} ms, {document['itl_p99_ratio']:.1f} x"
        )
    for load in ("load", "trace"):
        for sentence in document["unified_wins" if load == "load" else "trace_unified_wins"]:
            console.print(f"{load}: unified is ahead at {sentence}", highlight=False)
    for one in (*document["curves"], *document["trace"]):
        for warning in one["warnings"]:
            console.print(
                f"{one['system']}, {one['rate']:g}/s: {warning}", style="yellow", markup=False, highlight=False
            )
    for victim, found in document["kill"].items():
        console.print(_kill(victim, found))
    for title, why in (("failed", document["failed"]), ("not measured", document["not_measured"])):
        for name, reason in why.items():
            console.print(f"{title}: {name}: {reason}", style="yellow", markup=False, highlight=False)


def _pushes(document: Mapping[str, Any]) -> Table:
    copy = document["copy_gbps"]
    beside = f"; one plain copy: {copy:.1f} GB/s" if copy else ""
    table = Table(title=f"KV of one prompt{beside}")
    for column in ("transfer", "prompt", "GB/s", "of copy", "GB/s cached", "compute to Landed, ms", "second token, ms",
                   "share"):  # fmt: skip
        table.add_column(column, justify="right")
    for name, rates in document["push_gbps"].items():
        for length, rate in rates.items():
            table.add_row(
                name, length, f"{rate:.1f}", f"{rate / copy:.2f}" if copy else "-",
                f"{document['push_cached_gbps'][name][length]:.1f}",
                f"{document['after_compute_ms'][name][length]:.2f}",
                f"{document['second_token_ms'][name][length]:.1f}",
                f"{document['second_token_share'][name][length]:.1%}",
            )  # fmt: skip
    return table


def _loads(title: str, points: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in ("system", "offered/s", "chunk", "completed", "goodput/s", "TTFT p50", "p90", "p99", "ITL p50", "p90",
                   "p99"):  # fmt: skip
        table.add_column(column, justify="right")
    for one in sorted(points, key=lambda p: (p["rate"], p["system"])):
        cells = [f"{one[key][point]:.1f}" if one[key] else "-" for key in ("ttft_ms", "itl_ms")
                 for point in ("p50", "p90", "p99")]  # fmt: skip
        chunk = str(one["chunk"]) if one["chunk"] else "default"
        share, goodput = f"{one['completed_share']:.1%}", f"{one['goodput']['rps']:.2f}"
        table.add_row(one["system"], f"{one['rate']:.2f}", chunk, share, goodput, *cells)
    return table


def _kill(victim: str, found: Mapping[str, Any]) -> Table:
    title = f"{victim} killed at {found['rate']:g}/s, down {found['down_s']:.1f} s; {found['hung']} clients hung; "
    table = Table(title=title + f"the last failure or stall began {found['well_again_s']:.1f} s after")
    for column in ("requests that were", "all", "completed", "after a stall", "longest wait, s", "failed", "errors"):
        table.add_column(column)
    for when, group in found["clients"].items():
        wait = group["longest_wait_s"]
        errors = "; ".join(f"{count} x {text}" for text, count in group["errors"].items())
        cells = [group[name] for name in ("requests", "completed", "completed_after_stall")]
        table.add_row(when, *map(str, cells), f"{wait['max']:.2f}" if wait else "-", str(group["failed"]), errors)
    return table


def write_curves(path: Path, title: str, points: list[dict[str, Any]]) -> None:
    """TTFT, ITL, goodput and completed share of both systems over the offered rate."""
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(2, 2).ravel()
    for system, name in NAMES.items():
        mine = sorted((p for p in points if p["system"] == system), key=lambda p: p["rate"])
        xs, colour = [p["rate"] for p in mine], _COLOURS[system]
        for axis, key in ((axes[0], "ttft_ms"), (axes[1], "itl_ms")):
            for point, style in _STYLES:
                ys = [p[key][point] if p[key] else float("nan") for p in mine]
                axis.plot(xs, ys, style, color=colour, label=f"{name}, {point}", markersize=4)
        axes[2].plot(xs, [p["goodput"]["rps"] for p in mine], "o-", color=colour, label=name, markersize=4)
        axes[3].plot(xs, [p["completed_share"] for p in mine], "o-", color=colour, label=name, markersize=4)
    limits = points[0]["goodput"]
    labels = ("time to first token (ms)", "inter-token latency (ms)",
              f"goodput: TTFT ≤ {limits['slo_ttft_ms']:g} ms, mean ITL ≤ {limits['slo_itl_ms']:g} ms (requests/s)",
              "completed share of the offered load")  # fmt: skip
    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label, fontsize=9)
        axis.set_xlabel("offered requests/s")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[:2]:
        axis.set_yscale("log")
    for axis in axes[2:]:
        axis.set_ylim(bottom=0)
    figure.savefig(path, format="png")
