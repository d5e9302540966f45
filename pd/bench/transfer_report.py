"""What `pd bench transfer` prints and draws of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size_name(nbytes: int) -> str:
    for factor, unit in _UNITS:
        if nbytes % factor == 0:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"


def place(options: dict[str, Any]) -> str:
    return f"{options['backend']}, {options['device']} to {options['peer_device']}, {options['pattern']}"


def variant(row: dict[str, Any]) -> str:
    return row["variant"] + (", checked" if row["digests"] else "")


def print_report(result: dict[str, Any], console: Console) -> None:
    options = result["options"]
    console.print(_throughput(result))
    if result["coalescing"]:
        console.print(_coalescing(result))
    console.print(_latency(result))
    notes = [f"{options['pattern']}: {result['layout']}; {size_name(options['nbytes'])}, each block once"]
    notes.append("merged: neighbours on both sides are one span, as pd posts them; single: each block is a span")
    notes.append("CPU s/GB: of the sender + of the receiver")
    if result["raw"] is not None:
        notes.append(f"raw: {result['raw']}")
    if result["staged"]:
        notes.append(f"{', '.join(result['staged'])}: staged through host memory, copies included")
    for note in notes:
        console.print(note, style="dim")


def _table(title: str, names: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    for column in names:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _throughput(result: dict[str, Any]) -> Table:
    title = f"transfer: {place(result['options'])}, median of {result['options']['rounds']}"
    numbers = ("GB/s", "of raw", "of bare", "CPU s/GB")
    table = _table(title, ("spans", "variant"), numbers)
    last = None
    for row in result["throughput"]:
        if last not in (None, (row["block_bytes"], row["posted"])):
            table.add_section()
        last = row["block_bytes"], row["posted"]
        table.add_row(
            size_name(row["block_bytes"]),
            f"{row['spans']} {row['posted']}",
            variant(row),
            f"{row['gb_per_s']:.2f}",
            f"{row['of_raw']:.0%}" if row["of_raw"] else "",
            f"{row['of_bare']:.0%}" if row["of_bare"] else "",
            f"{row['sender_cpu_s_per_gb']:.3f} + {row['receiver_cpu_s_per_gb']:.3f}",
        )
    return table


def _coalescing(result: dict[str, Any]) -> Table:
    numbers = ("blocks", "single GB/s", "spans", "merged GB/s", "gain")
    table = _table("coalescing: the same bytes with neighbours merged", ("variant",), numbers)
    for row in result["coalescing"]:
        table.add_row(
            size_name(row["block_bytes"]),
            variant(row),
            str(row["blocks"]),
            f"{row['single_gb_per_s']:.2f}",
            str(row["spans"]),
            f"{row['merged_gb_per_s']:.2f}",
            f"{row['gain']:.2f}x",
        )
    return table


def _latency(result: dict[str, Any]) -> Table:
    numbers = ("median us", "p99")
    table = _table("latency, from the post until all is applied", ("blocks", "spans", "variant"), numbers)
    for row in result["latency"]:
        table.add_row(
            size_name(row["block_bytes"]),
            str(row["blocks"]),
            f"{row['spans']} {row['posted']}",
            row["variant"],
            f"{row['p50_us']:.0f}",
            f"{row['p99_us']:.0f}",
        )
    return table


def write_plot(path: Path, result: dict[str, Any]) -> None:
    """Throughput over block size: a colour per variant, solid where merged, dotted where each block is a span."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in result["throughput"]:
        lines.setdefault((variant(row), row["posted"]), []).append((row["block_bytes"], row["gb_per_s"]))
    colours = {"raw": "black", "bare": "grey"}
    for (name, posted), points in lines.items():
        colour = colours.setdefault(name, f"C{len(colours) - 2}")
        style = "o-" if posted == "merged" else "x:"
        axis.plot(*zip(*points, strict=True), style, color=colour, label=f"{name}, {posted}", markersize=4)
    axis.set_xscale("log", base=2)
    sizes = result["options"]["sizes"]
    axis.set_xticks(sizes, [size_name(size) for size in sizes])
    axis.set_title(place(result["options"]))
    axis.set_xlabel("block")
    axis.set_ylabel("GB/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, format="png")
