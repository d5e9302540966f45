"""`pd bench transfer`: a transfer backend against a raw copy of the same spans between the same two processes, and
against its vendor's engine without the backend, where its package has a module for that (see `bare_engine`).

All variants of one span size are measured in turns, in one run, so that a noisy machine disturbs them alike; the
median of the rounds counts. A pool is sent whole, in spans from random places, with its pages touched before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pd.bench.transfer_ends import Pair, RawCopy
from pd.errors import ConfigError

SIZES = "16K,64K,256K,1M,4M"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="direct", help="transfer backend (default: direct)")
    parser.add_argument("--sizes", default=SIZES, help=f"span sizes (default: {SIZES})")
    parser.add_argument("--bytes", default="256M", help="bytes per measurement, the pool's size (default: 256M)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each variant (default: 7)")
    parser.add_argument("--latency-count", type=int, default=300, help="single blocks timed (default: 300)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the backend")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="write a PNG to this file")


@dataclass(frozen=True)
class Options:
    backend: str
    sizes: tuple[int, ...]
    nbytes: int
    rounds: int
    latency_count: int
    backend_options: dict[str, str]


@dataclass
class Measurement:
    """All rounds of one variant at one span size."""

    variant: str
    digests: bool
    size: int
    seconds: list[float] = field(default_factory=list)
    sender_cpu: list[float] = field(default_factory=list)
    receiver_cpu: list[float] = field(default_factory=list)

    def add(self, round_: int, measured: tuple[float, float, float]) -> None:
        """(seconds, CPU seconds of the sender, of the receiver); the round -1 only warms up."""
        if round_ >= 0:
            for values, value in zip((self.seconds, self.sender_cpu, self.receiver_cpu), measured, strict=True):
                values.append(value)

    def summary(self, nbytes: int, raw: float | None, bare: float | None = None) -> dict[str, Any]:
        seconds = statistics.median(self.seconds)
        return {
            "variant": self.variant,
            "digests": self.digests,
            "span_bytes": self.size,
            "gb_per_s": nbytes / seconds / 1e9,
            "of_raw": raw / seconds if raw else None,
            "of_bare": bare / seconds if bare else None,
            "sender_cpu_s_per_gb": statistics.median(self.sender_cpu) / nbytes * 1e9,
            "receiver_cpu_s_per_gb": statistics.median(self.receiver_cpu) / nbytes * 1e9,
            "seconds": self.seconds,
        }


def parse_size(text: str, flag: str) -> int:
    """ "64K" in bytes. Raises ConfigError."""
    number, unit = (text[:-1], _UNITS[text[-1].upper()]) if text[-1:].upper() in _UNITS else (text, 1)
    if not number.isdecimal() or int(number) <= 0:
        raise ConfigError(flag, f"{text!r} is no size", "for example 64K")
    return int(number) * unit


def parse_options(args: argparse.Namespace) -> Options:
    sizes = tuple(parse_size(one, "--sizes") for one in args.sizes.split(","))
    nbytes = parse_size(args.bytes, "--bytes")
    for size in sizes:
        if size % 8 or nbytes % size:
            raise ConfigError("--sizes", f"{size} bytes do not divide the pool into whole words and spans")
    if args.rounds < 1 or args.latency_count < 1:
        raise ConfigError("--rounds", "at least 1")
    pairs = [text.partition("=") for text in args.option]
    if any(not separator for _, separator, _ in pairs):
        raise ConfigError("--option", "KEY=VALUE is expected")
    if args.plot is not None:
        import matplotlib  # noqa: F401 (before the measurement, not after it)
    options = {key: value for key, _, value in pairs}
    return Options(args.backend, sizes, nbytes, args.rounds, args.latency_count, options)


def open_pairs(options: Options, stack: contextlib.ExitStack) -> list[Pair]:
    """`direct` over both kinds of memory; any other backend as it is."""
    direct = options.backend == "direct"
    pairs = []
    for name in ("shm", "tcp") if direct else (options.backend,):
        extra = {"transfer_memory": name} if direct else {}
        chosen = {"backend": options.backend, **options.backend_options, **extra}
        pair = Pair(name, chosen, options.nbytes, options.sizes)
        stack.callback(pair.close)
        pairs.append(pair)
    return pairs


def measure_size(size: int, options: Options, pairs: Sequence[Pair], raw: RawCopy | None) -> list[Measurement]:
    """Every variant once to warm up, then in turns."""
    variants = [(pair, digests) for pair in pairs for digests in ((False, True) if pair.digests else (False,))]
    results = [Measurement(pair.name, digests, size) for pair, digests in variants]
    floor = Measurement("raw", False, size)
    bare = [Measurement("bare", False, size) if pair.bare else None for pair in pairs]
    for round_ in range(-1, options.rounds):
        for pair, one in zip(pairs, bare, strict=True):
            if one is not None:
                one.add(round_, pair.pump_bare(size))
        if raw is not None:
            seconds, cpu = raw.pump(size)
            floor.add(round_, (seconds, 0.0, cpu))
        for (pair, digests), result in zip(variants, results, strict=True):
            result.add(round_, pair.pump(size, digests))
            if round_ < 0 and not pair.content_is_right(size):
                raise RuntimeError(f"{pair.name} at {size} bytes: what arrived is not what was sent")
    results = [one for one in bare if one is not None] + results
    return [floor, *results] if raw is not None else results


def measure(options: Options, console: Console) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    latencies: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        pairs = open_pairs(options, stack)
        source = pairs[0].map_source()
        raw = RawCopy(source, pairs[0].receiver.memory) if source is not None else None
        for size in options.sizes:
            console.print(f"{_size(size)} spans …", style="dim")
            measured = measure_size(size, options, pairs, raw)
            median = {one.variant: statistics.median(one.seconds) for one in measured}
            rows += [one.summary(options.nbytes, median.get("raw"), median.get("bare")) for one in measured]
        size = min(options.sizes, key=lambda one: abs(one - (1 << 16)))
        for pair in pairs:
            for spans in (1, min(1000, options.nbytes // size)):
                count = max(5, options.latency_count // spans)
                times = np.array(pair.latency(size, count, spans)) * 1e6
                p50, p99 = np.percentile(times, [50, 99]).tolist()
                found = {"spans": spans, "span_bytes": size, "p50_us": p50, "p99_us": p99}
                latencies.append({"variant": pair.name, **found})
        del raw
    return {
        "schema": 1,
        "benchmark": "transfer",
        "options": asdict(options),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "throughput": rows,
        "latency": latencies,
    }


def _size(nbytes: int) -> str:
    for unit, factor in reversed(_UNITS.items()):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor} {unit}iB"
    return f"{nbytes} B"


def print_report(result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"transfer: {result['options']['backend']}, median of {result['options']['rounds']}")
    for column in ("span", "variant", "digests", "GB/s", "of raw", "of bare", "CPU s/GB sender", "CPU s/GB receiver"):
        table.add_column(column, justify="left" if column in ("variant", "digests") else "right")
    last = None
    for row in result["throughput"]:
        if last not in (None, row["span_bytes"]):
            table.add_section()
        last = row["span_bytes"]
        table.add_row(
            _size(row["span_bytes"]),
            row["variant"],
            "checked" if row["digests"] else "",
            f"{row['gb_per_s']:.2f}",
            f"{row['of_raw']:.0%}" if row["of_raw"] else "",
            f"{row['of_bare']:.0%}" if row["of_bare"] else "",
            f"{row['sender_cpu_s_per_gb']:.3f}",
            f"{row['receiver_cpu_s_per_gb']:.3f}",
        )
    console.print(table)
    for row in result["latency"]:
        size = _size(row["span_bytes"])
        what = f"{row['spans']} x {size} over {row['variant']}"
        console.print(f"{what}: {row['p50_us']:.0f} us median, {row['p99_us']:.0f} p99")


def write_plot(path: Path, result: dict[str, Any]) -> None:
    """Throughput over span size, one line per variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["throughput"]:
        name = row["variant"] + (", checked" if row["digests"] else "")
        lines.setdefault(name, []).append((row["span_bytes"], row["gb_per_s"]))
    for name, points in lines.items():
        style = "k:" if name == "raw" else "k--" if name == "bare" else ("s--" if name.endswith("checked") else "o-")
        axis.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axis.set_xscale("log", base=2)
    sizes = result["options"]["sizes"]
    axis.set_xticks(sizes, [_size(size) for size in sizes])
    axis.set_xlabel("span")
    axis.set_ylabel("GB/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, format="png")


def run(args: argparse.Namespace) -> int:
    options = parse_options(args)
    console = Console()
    result = measure(options, console)
    print_report(result, console)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot is not None:
        write_plot(args.plot, result)
    return 0
