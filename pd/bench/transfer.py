"""`pd bench transfer`: a transfer backend against a raw copy of the same bytes between the same two processes' pools,
and against its vendor's engine without the backend, where its package has a module for that (see `bare_engine`).

All variants of one block size are measured in turns, in one run, so that a noisy machine disturbs them alike; the
median of the rounds counts. A pool is sent whole, with its pages touched before. The first round and one after the last
are not counted: they begin with a cleared receiver and compare what arrived, byte by byte, by digest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pd.abc import Spans
from pd.bench.transfer_ends import BLOCK_STEP, Measured, Pair, installed
from pd.bench.transfer_floor import Floor
from pd.bench.transfer_plan import PATTERNS, Layout, forms
from pd.bench.transfer_pool import device_names, parse_device
from pd.bench.transfer_report import print_report, size_name, write_plot
from pd.errors import ConfigError

SIZES = "16K,64K,256K,1M,4M"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

#: Blocks whose latency is measured together, where the pool has so many, and the size nearest to which they are.
MANY, LATENCY_SIZE = 1000, 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    layouts = "; ".join(f"{name}: {what}" for name, what in PATTERNS.items())
    add = parser.add_argument
    add("--backend", default="direct", help="transfer backend (default: direct)")
    add("--sizes", default=SIZES, help=f"block sizes (default: {SIZES})")
    add("--bytes", default="256M", help="bytes per measurement, the pool's size (default: 256M)")
    add("--pattern", default="churned", help=f"where the blocks are (default: churned). {layouts}")
    add("--device", default="cpu", help="where the sender's pool is: cpu or cuda[:N] (default: cpu)")
    add("--peer-device", help="where the receiver's pool is (default: that of --device)")
    add("--rounds", type=int, default=7, help="measurements of each variant (default: 7)")
    add("--latency-count", type=int, default=300, help="single blocks timed (default: 300)")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the backend")
    add("--json", type=Path, help="write the results to this file")
    add("--plot", type=Path, help="write a PNG to this file")


@dataclass(frozen=True)
class Options:
    backend: str
    sizes: tuple[int, ...]
    nbytes: int
    pattern: str
    device: str
    peer_device: str
    rounds: int
    latency_count: int
    backend_options: dict[str, str]


@dataclass
class Case:
    """One variant of what moves a layout's spans, and its counted rounds. `pair`: where something can arrive wrong."""

    variant: str
    digests: bool
    layout: Layout
    run: Callable[[], Measured]
    pair: Pair | None = None
    rounds: list[Measured] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(seconds for seconds, _, _ in self.rounds)

    def measure(self) -> None:
        self.rounds.append(self.run())

    def check(self) -> None:
        """Run once, uncounted. Raises RuntimeError where the receiver has not got what was sent."""
        if self.pair is not None:
            self.pair.clear()
        self.run()
        if self.pair is not None and not self.pair.content_is_right(self.layout):
            block = size_name(self.layout.block)
            raise RuntimeError(f"{self.variant}, blocks of {block}: what arrived is not what was sent")

    def row(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Its results, with ratios to those of `cases` that move the same spans."""
        layout, spans = self.layout, self.layout.spans()
        known = {one.variant: one.seconds for one in cases if one.layout == layout}
        seconds, sender_cpu, receiver_cpu = zip(*self.rounds, strict=True)
        return {
            "variant": self.variant,
            "digests": self.digests,
            "block_bytes": layout.block,
            "posted": layout.form,
            "blocks": layout.nbytes // layout.block,
            "spans": len(spans),
            "gb_per_s": layout.nbytes / self.seconds / 1e9,
            "of_raw": known["raw"] / self.seconds if "raw" in known else None,
            "of_bare": known["bare"] / self.seconds if "bare" in known and self.pair else None,
            "sender_cpu_s_per_gb": statistics.median(sender_cpu) / layout.nbytes * 1e9,
            "receiver_cpu_s_per_gb": statistics.median(receiver_cpu) / layout.nbytes * 1e9,
            "seconds": list(seconds),
        }


def parse_size(text: str, flag: str) -> int:
    """ "64K" in bytes. Raises ConfigError."""
    number, unit = (text[:-1], _UNITS[text[-1].upper()]) if text[-1:].upper() in _UNITS else (text, 1)
    if not number.isdecimal() or int(number) <= 0:
        raise ConfigError(flag, f"{text!r} is no size", "for example 64K")
    return int(number) * unit


def parse_options(args: argparse.Namespace) -> Options:
    """Raises ConfigError, which names the flag."""
    sizes = tuple(parse_size(one, "--sizes") for one in args.sizes.split(","))
    nbytes = parse_size(args.bytes, "--bytes")
    for size in sizes:
        if size % BLOCK_STEP or nbytes % size:
            raise ConfigError(
                "--sizes", f"{size} is no multiple of {BLOCK_STEP} bytes that divides the pool's {nbytes}"
            )
    if args.pattern not in PATTERNS:
        raise ConfigError("--pattern", f"no pattern {args.pattern!r}", f"one of {', '.join(PATTERNS)}")
    for flag, count in (("--rounds", args.rounds), ("--latency-count", args.latency_count)):
        if count < 1:
            raise ConfigError(flag, "at least 1")
    pairs = [text.partition("=") for text in args.option]
    if any(not separator for _, separator, _ in pairs):
        raise ConfigError("--option", "KEY=VALUE is expected")
    if args.plot is not None:
        import matplotlib  # noqa: F401 (before the measurement, not after it)
    installed(args.backend)
    device = parse_device(args.device, "--device")
    peer_device = device if args.peer_device is None else parse_device(args.peer_device, "--peer-device")
    if (device == "cpu") != (peer_device == "cpu"):
        raise ConfigError("--peer-device", f"{peer_device} with --device {device}", "both on the host or both on GPUs")
    options = {key: value for key, _, value in pairs}
    return Options(
        args.backend, sizes, nbytes, args.pattern, device, peer_device, args.rounds, args.latency_count, options
    )


def open_pairs(options: Options, stack: contextlib.ExitStack) -> list[Pair]:
    """`direct` by both of its ways, unless an option names one; any other backend as it is."""
    ways: list[dict[str, str]] = [{}]
    if options.backend == "direct" and "transfer_memory" not in options.backend_options:
        ways = [{"transfer_memory": way} for way in ("shm", "tcp")]
    pairs = []
    for way in ways:
        chosen = {"backend": options.backend, **options.backend_options, **way}
        name = chosen.get("transfer_memory", options.backend)
        pair = Pair(name, chosen, (options.device, options.peer_device), options.nbytes, options.sizes)
        stack.callback(pair.close)
        pairs.append(pair)
    return pairs


def cases(layout: Layout, pairs: Sequence[Pair], floor: Floor | None) -> list[Case]:
    """Every variant that moves these spans."""
    out = []
    if floor is not None:
        out.append(Case("raw", False, layout, partial(copy, floor, layout.spans())))
    for pair in pairs:
        if pair.bare:
            out.append(Case("bare", False, layout, partial(pair.pump_bare, layout), pair))
        for digests in (False, True) if pair.digests else (False,):
            out.append(Case(pair.name, digests, layout, partial(pair.pump, layout, digests), pair))
    return out


def copy(floor: Floor, spans: Spans) -> Measured:
    """The receiver's process does all of it."""
    seconds, cpu = floor.pump(spans)
    return seconds, 0.0, cpu


def measure_size(layouts: Sequence[Layout], rounds: int, pairs: Sequence[Pair], floor: Floor | None) -> list[Case]:
    """Every variant once to warm up, then in turns, then once more to see that it still does what it should."""
    found = [case for layout in layouts for case in cases(layout, pairs, floor)]
    for case in found:
        case.check()
    for _ in range(rounds):
        for case in found:
            case.measure()
    for case in found:
        case.check()
    return found


def gains(found: Sequence[Case]) -> list[dict[str, Any]]:
    """What merging neighbours gains: each variant that was posted in both ways, over the same blocks."""
    rows = []
    for merged, single in itertools.product(found, repeat=2):
        same = (merged.variant, merged.digests) == (single.variant, single.digests)
        if same and merged.layout.merged and not single.layout.merged:
            nbytes, spans = merged.layout.nbytes, len(merged.layout.spans())
            rows.append(
                {
                    "variant": merged.variant,
                    "digests": merged.digests,
                    "block_bytes": merged.layout.block,
                    "blocks": nbytes // merged.layout.block,
                    "spans": spans,
                    "single_gb_per_s": nbytes / single.seconds / 1e9,
                    "merged_gb_per_s": nbytes / merged.seconds / 1e9,
                    "gain": single.seconds / merged.seconds,
                }
            )
    return rows


def measure_latency(options: Options, pairs: Sequence[Pair], floor: Floor | None) -> list[dict[str, Any]]:
    """One block and many, against a raw copy and the bare engine. The first of each only warms up."""
    size = min(options.sizes, key=lambda one: abs(one - LATENCY_SIZE))
    layouts = forms(options.pattern, options.nbytes, size)
    many = min(MANY, options.nbytes // size)
    rows = []
    for layout, together in [(layouts[-1], 1), *((layout, many) for layout in layouts)]:
        count = 1 + max(5, options.latency_count // together)
        times: dict[str, list[float]] = {}
        if floor is not None:
            times["raw"] = [floor.pump(spans)[0] for spans in itertools.islice(layout.groups(together), count)]
        for pair in pairs:
            if pair.bare:
                times["bare"] = pair.bare_latency(layout, together, count)
            times[pair.name] = pair.latency(layout, together, count)
        spans = len(next(layout.groups(together)))
        for name, seconds in times.items():
            p50, p99 = (np.percentile(seconds[1:], [50, 99]) * 1e6).tolist()
            found = {"variant": name, "blocks": together, "block_bytes": size, "posted": layout.form, "spans": spans}
            rows.append({**found, "p50_us": p50, "p99_us": p99})
    return rows


def measure(options: Options, console: Console) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    coalescing: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        pairs = open_pairs(options, stack)
        floor = pairs[0].floor()
        for size in options.sizes:
            console.print(f"{size_name(size)} blocks …", style="dim")
            found = measure_size(forms(options.pattern, options.nbytes, size), options.rounds, pairs, floor)
            rows += [case.row(found) for case in found]
            coalescing += gains(found)
        latencies = measure_latency(options, pairs, floor)
        raw, staged = floor.what if floor is not None else None, [pair.name for pair in pairs if pair.staged]
        del floor, found  # a mapping of the sender's memory
    return {
        "schema": 2,
        "benchmark": "transfer",
        "options": asdict(options),
        "layout": PATTERNS[options.pattern],
        "raw": raw,
        "staged": staged,
        "machine": machine(options.device),
        "throughput": rows,
        "coalescing": coalescing,
        "latency": latencies,
    }


def machine(device: str) -> dict[str, Any]:
    found = {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    return found if device == "cpu" else {**found, "gpus": device_names()}


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
