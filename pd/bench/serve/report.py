"""The table, the JSON document and the record of every request."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from pd.bench.serve.load import Outcome, RunResult
from pd.bench.serve.options import Options
from pd.bench.serve.requests import Target, prompt_of

Entry = dict[str, Any]

_LATENCIES = (("ttft_ms", "TTFT"), ("itl_ms", "ITL"), ("mean_itl_ms", "ITL per request"), ("e2e_ms", "E2E"))
_LABEL_WIDTH = 24  # columns of the terminal that the names take
_RUN_WIDTH = 13  # and each run


def document(options: Options, target: Target, entries: list[Entry], started: datetime.datetime) -> Entry:
    """The JSON document: what was asked, where it ran, one entry per run."""
    config: Entry = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        config[field.name] = str(value) if isinstance(value, Path) else value
    config["headers"] = [name for name, _ in options.headers]  # values may be secrets
    config["rates"] = [rate if np.isfinite(rate) else "inf" for rate in options.rates]
    config |= {"model": target.model, "token_range": list(target.token_range), "token_source": target.range_source}
    if options.trace is not None:
        config["trace_sha256"] = hashlib.sha256(options.trace.read_bytes()).hexdigest()
    return {
        "benchmark": "pd bench serve",
        "date": started.isoformat(timespec="seconds"),
        "environment": environment(),
        "config": config,
        "runs": entries,
    }


def environment() -> Entry:
    """Where the client ran."""
    try:
        version = importlib.metadata.version("pd-serve")
    except importlib.metadata.PackageNotFoundError:
        version = "source"
    return {
        "pd": version,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def write_json(path: Path, content: Entry) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def write_record(file: IO[bytes], result: RunResult, target: Target, options: Options) -> None:
    """One JSON line per request of a run, in order of arrival."""
    for outcome in result.outcomes:
        file.write(msgspec.json.encode(_record(outcome, result, target, options)) + b"\n")
    file.flush()


def _record(outcome: Outcome, result: RunResult, target: Target, options: Options) -> Entry:
    row, answer = outcome.row, outcome.answer
    prompt = prompt_of(row, result.run, target, options)
    since = outcome.start + outcome.sent
    return {
        "run": result.run.index,
        "row": row.index,
        "request_id": outcome.request_id,
        "endpoint": options.endpoint,
        "model": target.model,
        "at_s": round(row.at, 6),
        "send_lag_ms": round((outcome.sent - row.at) * 1e3, 3),
        "hash_ids": row.hash_ids,
        "block_len": row.block_len,
        "token_seed": result.run.token_seed,
        "prompt_text" if isinstance(prompt, str) else "prompt_token_ids": prompt,
        "max_tokens": row.output_len,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "output_text": "".join(answer.text),
        "output_token_ids": answer.token_ids or None,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "cached_tokens": answer.cached_tokens,
        "event_ms": [round((time - since) * 1e3, 3) for time in answer.times],  # after sending
        "event_tokens": list(answer.counts),  # 0: the server does not say
        "ended_ms": round((outcome.ended - outcome.sent) * 1e3, 3),
        "error": None if answer.error_kind is None else {"kind": answer.error_kind, "message": answer.error},
    }


def print_report(console: Console, entries: list[Entry]) -> None:
    """Tables of as many runs as the terminal is wide enough for, then errors and warnings."""
    per_table = max(1, (console.width - _LABEL_WIDTH) // _RUN_WIDTH)
    for first in range(0, len(entries), per_table):
        console.print(_table(entries[first : first + per_table]))
    for entry in entries:
        for kind, error in entry["errors"].items():
            console.print(f"{entry['label']}: {error['count']} x {kind}", style="red", markup=False)
            for message in error["messages"]:
                console.print(f"    {message}", markup=False)
        for warning in entry["warnings"]:
            console.print(f"{entry['label']}: {warning}", style="yellow", markup=False)


def _table(entries: list[Entry]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("ms, tokens, per second", no_wrap=True)
    for entry in entries:
        table.add_column(entry["label"], justify="right", no_wrap=True)

    def line(name: str, value: Callable[[Entry], Any], end: bool = False) -> None:
        table.add_row(name, *(_cell(value(entry)) for entry in entries), end_section=end)

    line("requests", lambda e: e["requests"])
    line("failed", lambda e: e["failed"])
    line("offered req/s", lambda e: e["offered_rps"])
    line("achieved req/s", lambda e: e["achieved_rps"])
    if any(entry["goodput"] for entry in entries):
        line("goodput req/s", lambda e: e["goodput"]["rps"])
        line("within limits", lambda e: f"{e['goodput']['share']:.1%}")
    line("input tok/s", lambda e: e["input_tok_s"])
    line("cached input", lambda e: None if e["cached_share"] is None else f"{e['cached_share']:.1%}")
    line("output tok/s", lambda e: e["output_tok_s"])
    line("duration s", lambda e: e["duration_s"], end=True)
    for key, name in _LATENCIES:
        if not any(entry[key] for entry in entries):
            continue
        for point in ("mean", "p50", "p90", "p99"):
            line(f"{name} {point}", lambda e, k=key, p=point: e[k] and e[k][p], end=point == "p99")  # type: ignore[misc]
    line("send lag p99", lambda e: e["send_lag_ms"] and e["send_lag_ms"]["p99"])
    line("peak in flight", lambda e: e["concurrency"]["peak"])
    line("client CPU", lambda e: f"{e['client']['cpu_share']:.0%}")
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
