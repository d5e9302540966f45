"""The arguments of `pd bench pair`, checked and resolved once into `Options`."""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pd.bench.engine.shapes import SHAPES
from pd.errors import ConfigError

#: What can be measured, in this order.
PHASES = ("copy", "verify", "push", "tune", "load", "trace", "kill")


@dataclass(frozen=True)
class Options:
    """One resolved invocation. Lengths are tokens, times seconds unless the name says otherwise."""

    out: Path
    json_path: Path
    only: tuple[str, ...]
    model: str | None  # None: the shape with random weights
    shape: str
    device: str  # cuda or cpu
    one_gpu: bool
    transfers: tuple[str, ...]
    prompts: tuple[int, ...]
    repeats: int
    copy_bytes: str
    input_len: int
    output_len: int
    rates: tuple[float, ...]
    seconds: float  # of sending, for each rate
    slo_ttft_ms: float
    slo_itl_ms: float
    chunk_sizes: tuple[int, ...]
    tune_rate: float
    trace: Path | None
    rows: int
    length_scale: str
    time_scales: tuple[float, ...]
    kill_rate: float
    kill_seconds: float
    down: float  # between a kill and the restart
    serve_flags: tuple[str, ...]
    unified_policy: str
    verify_only: str
    request_timeout: float
    time_limit: float
    plan: bool
    again: bool

    @property
    def gpus(self) -> tuple[int, int]:
        """Of the first and the second instance."""
        return (0, 0) if self.one_gpu or self.device == "cpu" else (0, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", default="pair", metavar="DIR", help="parts, logs, curves and the result (default: pair)")
    add("--json", metavar="F", help="the merged result (default: DIR/two-gpus.json)")
    add("--only", default=",".join(PHASES), help=f"what to measure, of {','.join(PHASES)} (default: all)")
    add("--again", action="store_true", help="measure anew what DIR has already")
    add("--plan", action="store_true", help="list the steps with their expected seconds, and what DIR has of them")
    add("--time-limit", type=float, metavar="S", help="begin no step that would end later; exit code 3 if any is left")
    where = parser.add_argument_group("deployment")
    where.add_argument("--model", help="model directory (default: the shape with random weights)")
    where.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES), help="default: llama-3.1-8b")
    where.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    where.add_argument("--one-gpu", action="store_true", help="every instance on GPU 0: a rehearsal")
    where.add_argument(
        "--transfer", default="direct,nixl,mooncake", help="backends; load and kill take the first that is installed"
    )
    where.add_argument("--serve-flags", default="", metavar="TEXT", help="more flags of every `pd serve`, in one text")
    where.add_argument("--unified-policy", default="", metavar="NAME", help="how requests go to the unified instances")
    _add_pushes(parser.add_argument_group("verify and push"))
    _add_load(parser.add_argument_group("tune, load, trace and kill"))


def _add_pushes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--verify-only", default="", metavar="TEXT", help="only requests whose name contains TEXT")
    group.add_argument("--prompts", default="1024,8192,32768", help="prompt lengths (default: 1024,8192,32768)")
    group.add_argument("--repeats", type=int, default=7, help="of each prompt length (default: 7)")
    group.add_argument("--copy-bytes", default="1G", help="of the plain copy (default: 1G)")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--input-len", type=int, default=2048, help="default: 2048")
    group.add_argument("--output-len", type=int, default=512, help="default: 512")
    group.add_argument("--rates", default="4,8,12,16,20", help="requests/s of all together, rising (default: 4 to 20)")
    group.add_argument("--seconds", type=float, default=40.0, help="of sending at each rate (default: 40)")
    group.add_argument("--slo-ttft-ms", type=float, default=500.0, help="default: 500")
    group.add_argument("--slo-itl-ms", type=float, default=30.0, help="of a request's mean (default: 30)")
    group.add_argument("--chunk-sizes", default="2048,8192", help="prompt tokens a step that `tune` tries")
    group.add_argument("--tune-rate", type=float, help="requests/s of `tune` (default: the middle of --rates)")
    group.add_argument("--trace", metavar="FILE", help="JSONL in the Mooncake format; without it `trace` is left out")
    group.add_argument("--rows", type=int, default=200, help="first rows of the trace (default: 200)")
    group.add_argument("--length-scale", default="1", help="multiplies the trace's lengths (default: 1)")
    group.add_argument("--time-scales", default="1,1/2", help="multiply its timestamps (default: 1,1/2)")
    group.add_argument("--kill-rate", type=float, help="requests/s of `kill` (default: as --tune-rate)")
    group.add_argument("--kill-seconds", type=float, default=60.0, help="of sending around a kill (default: 60)")
    group.add_argument("--down", type=float, default=5.0, help="seconds between a kill and the restart (default: 5)")
    group.add_argument("--request-timeout", type=float, default=120.0, help="of a client's request (default: 120)")


def resolve(args: argparse.Namespace) -> Options:
    """Raises ConfigError naming the flag."""
    only = tuple(args.only.split(","))
    if unknown := set(only) - set(PHASES):
        raise ConfigError("--only", f"{', '.join(sorted(unknown))}: not one of {', '.join(PHASES)}")
    if args.device == "cpu" and args.one_gpu:
        raise ConfigError("--one-gpu", "there is no GPU with --device cpu", "leave it out")
    if args.model is not None and not Path(args.model).is_dir():
        raise ConfigError("--model", f"{args.model} is not a directory")
    if args.trace is not None and not Path(args.trace).is_file():
        raise ConfigError("--trace", f"no such file: {args.trace}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--out", "matplotlib, for the curves, is not installed", "pip install 'pd-serve[bench]'")
    out = Path(args.out)
    rates = tuple(sorted(_numbers("--rates", args.rates)))
    middle = rates[len(rates) // 2]
    for name in ("repeats", "input_len", "output_len", "rows"):
        _positive(name, getattr(args, name))
    for name in ("seconds", "slo_ttft_ms", "slo_itl_ms", "kill_seconds", "down", "request_timeout"):
        _positive(name, getattr(args, name))
    return Options(
        out=out,
        json_path=Path(args.json) if args.json else out / "two-gpus.json",
        only=tuple(phase for phase in PHASES if phase in only),
        model=args.model,
        shape=args.shape,
        device=args.device,
        one_gpu=args.one_gpu,
        transfers=tuple(args.transfer.split(",")),
        prompts=_integers("--prompts", args.prompts),
        repeats=args.repeats,
        copy_bytes=args.copy_bytes,
        input_len=args.input_len,
        output_len=args.output_len,
        rates=rates,
        seconds=args.seconds,
        slo_ttft_ms=args.slo_ttft_ms,
        slo_itl_ms=args.slo_itl_ms,
        chunk_sizes=_integers("--chunk-sizes", args.chunk_sizes),
        tune_rate=_positive("tune_rate", middle if args.tune_rate is None else args.tune_rate),
        trace=Path(args.trace) if args.trace else None,
        rows=args.rows,
        length_scale=_fraction("--length-scale", args.length_scale),
        time_scales=tuple(_numbers("--time-scales", args.time_scales)),
        kill_rate=_positive("kill_rate", middle if args.kill_rate is None else args.kill_rate),
        kill_seconds=args.kill_seconds,
        down=args.down,
        unified_policy=args.unified_policy,
        serve_flags=tuple(shlex.split(args.serve_flags)),
        verify_only=args.verify_only,
        request_timeout=args.request_timeout,
        time_limit=math.inf if args.time_limit is None else _positive("time_limit", args.time_limit),
        plan=args.plan,
        again=args.again,
    )


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError("--" + name.replace("_", "-"), f"{value} is not a positive number")
    return value


def _fraction(flag: str, text: str) -> str:
    _numbers(flag, text)
    return text


def _numbers(flag: str, text: str) -> list[float]:
    """ "2,1,1/2". Raises ConfigError."""
    try:
        found = [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(flag, f"{text!r} is not a list of numbers") from None
    if min(found) <= 0:
        raise ConfigError(flag, f"{text!r}: only positive numbers")
    return found


def _integers(flag: str, text: str) -> tuple[int, ...]:
    found = _numbers(flag, text)
    if any(one != int(one) for one in found):
        raise ConfigError(flag, f"{text!r} is not a list of whole numbers")
    return tuple(int(one) for one in found)
