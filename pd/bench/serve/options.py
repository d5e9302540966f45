"""The arguments of `pd bench serve`: parsed by argparse, checked and resolved once into `Options`.

Flags that depend on others keep `None` as their argparse default, so that one given without effect is
an error that names it instead of being ignored.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pd.bench.serve.flags import base_url, flag_of
from pd.bench.serve.profile import ProfileOptions, add_profile_arguments, resolve_profile
from pd.errors import ConfigError

ENDPOINTS = ("completions", "chat", "generate")
DEFAULT_NUM_REQUESTS = 100
DEFAULT_INPUT_LEN = "512"
DEFAULT_OUTPUT_LEN = "128"


@dataclass(frozen=True)
class Options:
    """One resolved invocation. Lengths are tokens, times seconds unless the name says otherwise."""

    url: str  # scheme://host[:port][/prefix], without a trailing /v1
    model: str | None
    endpoint: str
    rates: tuple[float, ...]  # requests/s, one run each; empty: the trace's own arrival times
    poisson: bool
    seed: int
    num_requests: int
    input_len: tuple[int, int]  # inclusive bounds
    output_len: tuple[int, int]
    trace: Path | None
    rows: int | None
    length_scale: float
    time_scales: tuple[float, ...]  # one run each when the trace's arrival times are used
    max_concurrency: int | None
    slo_ttft_ms: float | None
    slo_itl_ms: float | None
    timeout: float
    warmup: int
    json_path: Path | None
    plot_path: Path | None
    record_path: Path | None
    ignore_eos: bool
    temperature: float
    headers: tuple[tuple[str, str], ...]
    vocab_size: int | None
    token_range: tuple[int, int] | None  # [lo, hi)
    return_token_ids: bool
    progress: bool
    profile: ProfileOptions | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `pd bench serve` to `parser`."""
    target = parser.add_argument_group("target")
    target.add_argument("url", nargs="?", help="base URL, such as http://127.0.0.1:8000")
    target.add_argument("--url", dest="url_flag", metavar="URL", help="the same as a flag")
    target.add_argument("--model", help="model name to ask for (default: the first of /v1/models)")
    target.add_argument(
        "--endpoint",
        choices=ENDPOINTS,
        default="completions",
        help="completions (default) and generate (SGLang's /generate) send token ids; chat sends words",
    )
    target.add_argument("--header", action="append", metavar="'NAME: VALUE'", help="extra HTTP header; repeatable")
    target.add_argument("--timeout", type=float, default=600.0, help="seconds per request (default 600)")
    _add_load_arguments(parser.add_argument_group("load"))
    _add_sampling_arguments(parser.add_argument_group("prompts and sampling"))
    _add_report_arguments(parser.add_argument_group("report"))
    add_profile_arguments(parser.add_argument_group("profile (the flags of SGLang's benchmark)"))


def _add_load_arguments(load: argparse._ArgumentGroup) -> None:
    load.add_argument(
        "--rate",
        "--request-rate",
        metavar="R[,R...]",
        help="requests/s, evenly spaced; `inf` sends all at once; a list makes one run per rate",
    )
    load.add_argument("--poisson", action="store_true", help="Poisson arrivals at --rate instead of even spacing")
    load.add_argument("--num-requests", "--num-prompts", type=int, help="requests per run (default 100)")
    load.add_argument("--input-len", metavar="N|LO:HI", help="prompt tokens, fixed or uniform (default 512)")
    load.add_argument("--output-len", metavar="N|LO:HI", help="output tokens, fixed or uniform (default 128)")
    load.add_argument(
        "--trace",
        metavar="FILE",
        help="JSONL in the Mooncake format; with --rate only its lengths and prefixes are used",
    )
    load.add_argument("--rows", type=int, help="first N rows of the trace (default: all)")
    load.add_argument(
        "--length-scale", metavar="X", help="multiplies the trace's lengths and its 512-token blocks; 1/16 is accepted"
    )
    load.add_argument(
        "--time-scale", metavar="X[,X...]", help="multiplies the trace's timestamps (0.5: twice the load); a list: runs"
    )
    load.add_argument(
        "--max-concurrency", type=int, help="hold requests beyond this many in flight (no longer open loop when hit)"
    )
    load.add_argument("--warmup", type=int, default=0, metavar="N", help="unmeasured requests first, one at a time")
    load.add_argument("--seed", type=int, default=0, help="arrivals, lengths and tokens follow from it (default 0)")


def _add_sampling_arguments(sampling: argparse._ArgumentGroup) -> None:
    sampling.add_argument("--vocab-size", type=int, help="default: what the server says, else 32000")
    sampling.add_argument(
        "--token-range", metavar="LO:HI", help="draw prompt ids from [LO, HI) (default: the vocabulary's middle part)"
    )
    sampling.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers get exactly the wanted length (default)",
    )
    sampling.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    sampling.add_argument(
        "--return-token-ids", action="store_true", help="ask for `token_ids` in every event (vLLM's extension, pd)"
    )


def _add_report_arguments(report: argparse._ArgumentGroup) -> None:
    report.add_argument("--slo-ttft-ms", type=float, help="goodput: time to first token at most this")
    report.add_argument("--slo-itl-ms", type=float, help="goodput: a request's mean inter-token latency at most this")
    report.add_argument("--json", metavar="FILE", help="write the report as JSON")
    report.add_argument("--plot", metavar="FILE", help="write a PNG: curves over several runs, CDFs of one")
    report.add_argument("--record", metavar="FILE", help="write one JSON line per request: prompt, answer, timings")
    report.add_argument("--no-progress", action="store_true", help="no progress bar")


def resolve(args: argparse.Namespace) -> Options:
    """Check `args` and turn them into Options; raises ConfigError naming the flag."""
    _check_combinations(args)
    rates = _floats("--rate", args.rate, allow_inf=True) if args.rate is not None else ()
    trace = _readable("--trace", args.trace) if args.trace is not None else None
    url = _url(args)
    return Options(
        url=url,
        model=args.model,
        endpoint=args.endpoint,
        rates=rates,
        poisson=args.poisson,
        seed=_at_least("--seed", args.seed, 0) or 0,
        num_requests=_at_least("--num-requests", args.num_requests, 1) or DEFAULT_NUM_REQUESTS,
        input_len=_span("--input-len", args.input_len or DEFAULT_INPUT_LEN),
        output_len=_span("--output-len", args.output_len or DEFAULT_OUTPUT_LEN),
        trace=trace,
        rows=_at_least("--rows", args.rows, 1),
        length_scale=_floats("--length-scale", args.length_scale)[0] if args.length_scale is not None else 1.0,
        time_scales=_floats("--time-scale", args.time_scale) if args.time_scale is not None else (1.0,),
        max_concurrency=_at_least("--max-concurrency", args.max_concurrency, 1),
        slo_ttft_ms=_positive("--slo-ttft-ms", args.slo_ttft_ms),
        slo_itl_ms=_positive("--slo-itl-ms", args.slo_itl_ms),
        timeout=_positive("--timeout", args.timeout) or 0.0,
        warmup=_at_least("--warmup", args.warmup, 0) or 0,
        json_path=_writable("--json", args.json),
        plot_path=_plot(args.plot),
        record_path=_writable("--record", args.record),
        ignore_eos=args.ignore_eos,
        temperature=_temperature(args.temperature),
        headers=tuple(_header(text) for text in args.header or ()),
        vocab_size=_at_least("--vocab-size", args.vocab_size, 2),
        token_range=_token_range(args.token_range),
        return_token_ids=args.return_token_ids,
        progress=not args.no_progress,
        profile=resolve_profile(args, url),
    )


def _check_combinations(args: argparse.Namespace) -> None:
    """A flag either acts or is refused."""
    if args.rate is None and args.trace is None:
        raise ConfigError("--rate", "no load is described", "give --rate R or --trace FILE")
    if args.poisson and args.rate is None:
        raise ConfigError("--poisson", "needs a rate", "add --rate R")
    if args.trace is None:
        for flag in ("rows", "length_scale", "time_scale"):
            if getattr(args, flag) is not None:
                raise ConfigError(flag_of(flag), "acts on a trace only", "add --trace FILE")
    else:
        for flag, instead in (
            ("num_requests", "--rows"),
            ("input_len", "--length-scale"),
            ("output_len", "--length-scale"),
        ):
            if getattr(args, flag) is not None:
                raise ConfigError(flag_of(flag), "the trace decides this", f"use {instead}")
    if args.time_scale is not None and args.rate is not None:
        raise ConfigError("--time-scale", "--rate replaces the trace's arrival times", "give one of the two")
    if args.endpoint == "chat" and (args.vocab_size is not None or args.token_range is not None):
        flag = "--vocab-size" if args.vocab_size is not None else "--token-range"
        raise ConfigError(flag, "chat prompts are words, not token ids", "use --endpoint completions or generate")
    if args.vocab_size is not None and args.token_range is not None:
        raise ConfigError("--vocab-size", "--token-range already says which ids are drawn", "give one of the two")
    if args.return_token_ids and args.endpoint == "generate":
        raise ConfigError("--return-token-ids", "is not a parameter of /generate", "leave it out")


def _url(args: argparse.Namespace) -> str:
    if args.url is not None and args.url_flag is not None:
        raise ConfigError("--url", "the URL is given twice", "give it once")
    url = (args.url if args.url is not None else args.url_flag) or ""
    if not url:
        raise ConfigError("--url", "no URL", "give a base URL such as http://127.0.0.1:8000")
    return base_url("--url", url).removesuffix("/v1").rstrip("/")


def _floats(flag: str, text: str, allow_inf: bool = False) -> tuple[float, ...]:
    values = []
    for part in text.split(","):
        try:
            value = float(Fraction(part.strip())) if "/" in part else float(part)
        except (ValueError, ZeroDivisionError):
            raise ConfigError(flag, f"{part!r} is not a number") from None
        if not value > 0 or (math.isinf(value) and not allow_inf):
            raise ConfigError(flag, f"{part!r} is not a positive number")
        values.append(value)
    if flag == "--length-scale" and len(values) > 1:
        raise ConfigError(flag, "takes one number")
    return tuple(values)


def _pair(flag: str, text: str) -> tuple[int, int]:
    parts = text.split(":")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ConfigError(flag, f"{text!r} is neither N nor LO:HI")
    return numbers[0], numbers[-1]


def _span(flag: str, text: str) -> tuple[int, int]:
    low, high = _pair(flag, text)
    if not 1 <= low <= high:
        raise ConfigError(flag, f"{text!r} is not a range of at least 1")
    return low, high


def _token_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    low, high = _pair("--token-range", text)
    if not 0 <= low < high:
        raise ConfigError("--token-range", f"{text!r} is empty", "LO:HI draws ids from LO up to HI - 1")
    return low, high


def _at_least(flag: str, value: int | None, least: int) -> int | None:
    if value is not None and value < least:
        raise ConfigError(flag, f"{value} is less than {least}")
    return value


def _positive(flag: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(flag, f"{value} is not a positive number")
    return value


def _temperature(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ConfigError("--temperature", f"{value} is negative or not finite")
    return value


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isascii() or "\n" in text or "\r" in text:
        raise ConfigError("--header", f"{name!r} is not a header", "write 'Name: value'")
    return name.strip(), value.strip()


def _readable(flag: str, text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ConfigError(flag, f"no such file: {text}")
    return path


def _writable(flag: str, text: str | None) -> Path | None:
    """The check comes before the load, so that a long run does not end without its result."""
    if text is None:
        return None
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(flag, f"cannot write {text}", "the folder has to exist")
    return path


def _plot(text: str | None) -> Path | None:
    path = _writable("--plot", text)
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot", "matplotlib is not installed", "pip install 'pd-serve[bench]'")
    return path
