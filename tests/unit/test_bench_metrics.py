"""Percentiles, goodput and warnings from made-up outcomes."""

from __future__ import annotations

import argparse
import io
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pd.bench.serve.load import Outcome, RunResult
from pd.bench.serve.metrics import distribution, e2e_ms, itl_ms, latencies, mean_itl_ms, meets, summarise, ttft_ms
from pd.bench.serve.options import Options, add_arguments, resolve
from pd.bench.serve.plan import Row, Run
from pd.bench.serve.progress import Counters, bar
from pd.bench.serve.report import print_report
from pd.bench.serve.sse import OpenAiAnswer

START = 1000.0  # the run's start on the clock of arrivals


def options(*argv: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(parser.parse_args(["http://h", "--rate", "1", *argv]))


def outcome(
    index: int = 0,
    sent: float = 0.0,
    times: tuple[float, ...] = (0.1, 0.2, 0.3),
    counts: tuple[int, ...] | None = None,
    tokens: int | None = None,
    error: tuple[str, str] | None = None,
    due: float | None = None,
    cached: int | None = None,
) -> Outcome:
    """`times` are seconds after the run's start."""
    answer = OpenAiAnswer()
    answer.head(200, "text/event-stream")
    answer.times = array("d", [START + time for time in times])
    answer.counts = array("l", counts if counts is not None else [1] * len(times))
    answer.finished_at = answer.times[-1] if times else 0.0
    answer.done, answer.finish_reason = True, "length"
    answer.completion_tokens = tokens if tokens is not None else sum(answer.counts)
    answer.prompt_tokens, answer.cached_tokens = 10, cached
    if error is not None:
        answer.fail(*error)
    row = Row(index, sent if due is None else due, 10, answer.completion_tokens, (index,), 10)
    return Outcome(row, f"r{index}", sent, times[-1] if times else sent, START, answer)


def result(outcomes: list[Outcome], **counters: Any) -> RunResult:
    run = Run(0, "1/s fixed", 1.0, 0, tuple(item.row for item in outcomes))
    return RunResult(run, outcomes, Counters(len(outcomes), **counters), cpu_s=0.1, wall_s=2.0)


def test_a_distribution_interpolates_linearly() -> None:
    found = distribution(list(range(101)))
    assert found == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert distribution([2.0]) == {"mean": 2.0, "p50": 2.0, "p90": 2.0, "p99": 2.0, "max": 2.0}
    assert distribution([]) is None


def test_latencies_count_from_the_actual_sending() -> None:
    item = outcome(sent=0.05, times=(0.1, 0.2, 0.4))
    assert ttft_ms(item) == pytest.approx(50)
    assert e2e_ms(item) == pytest.approx(350)
    assert itl_ms(item.answer) == pytest.approx([100, 200])
    assert mean_itl_ms(item.answer) == pytest.approx(150)


def test_a_gap_is_shared_by_the_tokens_that_end_it() -> None:
    item = outcome(times=(0.1, 0.4, 0.5), counts=(2, 3, 1))
    assert itl_ms(item.answer) == pytest.approx([100, 100, 100, 100])
    assert mean_itl_ms(item.answer) == pytest.approx(100)


def test_gaps_are_per_event_where_the_counts_are_unknown() -> None:
    item = outcome(times=(0.1, 0.4, 0.7), counts=(0, 0, 0), tokens=7)
    assert itl_ms(item.answer) == pytest.approx([300, 300])
    assert mean_itl_ms(item.answer) == pytest.approx(100)


def test_an_answer_of_one_event_has_no_gap_and_meets_any_limit_on_gaps() -> None:
    item = outcome(times=(0.1,))
    assert len(itl_ms(item.answer)) == 0 and mean_itl_ms(item.answer) is None
    assert meets(item, None, 0.001)


def test_goodput_needs_every_limit_and_no_error() -> None:
    fast, slow_start = outcome(times=(0.1, 0.2)), outcome(times=(0.5, 0.6))
    slow_gaps, failed = outcome(times=(0.1, 0.6)), outcome(times=(0.1, 0.2), error=("timeout", "late"))
    assert [meets(item, 200, 200) for item in (fast, slow_start, slow_gaps, failed)] == [True, False, False, False]
    assert meets(slow_start, None, 200) and meets(slow_gaps, 200, None)
    entry = summarise(result([fast, slow_start, slow_gaps, failed]), options("--slo-ttft-ms", "200"))
    assert entry["goodput"] == {
        "slo_ttft_ms": 200.0,
        "slo_itl_ms": None,
        "requests": 2,
        "share": 0.5,
        "rps": pytest.approx(2 / 0.6, abs=1e-4),
    }


def test_a_summary_counts_requests_tokens_and_errors() -> None:
    outcomes = [
        outcome(0, 0.0, (0.1, 0.2, 0.3), cached=4),
        outcome(1, 0.5, (0.6, 0.7), cached=0),
        outcome(2, 1.0, (), error=("connection", "refused")),
        outcome(3, 1.5, (1.6,), error=("timeout", "late")),
        outcome(4, 2.0, (), error=("connection", "refused")),
    ]
    entry = summarise(result(outcomes, peak=2), options())
    assert (entry["requests"], entry["completed"], entry["failed"]) == (5, 2, 3)
    assert entry["duration_s"] == 2.0 and entry["achieved_rps"] == 1.0
    assert entry["output_tokens"] == 5 and entry["output_tok_s"] == 2.5
    assert entry["input_tokens"] == 20 and entry["cached_share"] == 0.2
    assert entry["errors"] == {
        "connection": {"count": 2, "messages": ["refused"]},
        "timeout": {"count": 1, "messages": ["late"]},
    }
    assert entry["goodput"] is None and entry["warnings"] == []
    assert {name: len(values) for name, values in latencies(outcomes).items()} == {
        "ttft_ms": 2,
        "itl_ms": 3,
        "mean_itl_ms": 2,
        "e2e_ms": 2,
    }


def test_a_run_without_a_single_answer_still_has_a_report() -> None:
    entry = summarise(result([outcome(times=(), error=("connection", "refused"))]), options())
    assert entry["ttft_ms"] is None and entry["cached_share"] is None and entry["achieved_rps"] == 0
    text = printed([entry])
    assert "1 x connection" in text and "refused" in text


def test_doubts_about_the_run_are_stated() -> None:
    late = outcome(sent=0.05, due=0.0, times=(0.1, 0.2), counts=(0, 0), tokens=4)
    warnings = " ".join(summarise(result([late]), options())["warnings"])
    assert "left late" in warnings and "per event" in warnings
    held = summarise(result([late], held=3), options("--max-concurrency", "2"))
    assert "not an open loop: 3 requests" in held["warnings"][0]
    unsaid = outcome()
    unsaid.answer.completion_tokens = None
    assert "no usage" in summarise(result([unsaid]), options())["warnings"][0]


def printed(entries: list[dict[str, Any]], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(console, entries)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_never_cuts_a_figure() -> None:
    entry = summarise(result([outcome()]), options("--slo-itl-ms", "500"))
    entries = [{**entry, "label": f"{rate}/s poisson"} for rate in (1, 2, 4, 8, 16, 32)]
    text = printed(entries)
    assert "…" not in text and text.count("TTFT p99") == 2  # two tables of up to four runs
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_progress_line_tells_what_is_done() -> None:
    line = bar("4/s fixed", Counters(total=10, sent=7, done=5, failed=1), 12.4)
    assert line == "4/s fixed [############............] 5/10 done, 2 in flight, 1 failed, 12 s"


def test_plots_are_written_for_one_run_for_several_and_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pd.bench.serve.plot import write_plot

    chosen = options("--slo-itl-ms", "500", "--slo-ttft-ms", "50")
    good = [outcome(i, i * 0.1, (i * 0.1 + 0.02 * i + 0.01, i * 0.1 + 1)) for i in range(20)]
    bad = [outcome(times=(), error=("connection", "refused"))]
    one, none = summarise(result(good), chosen), summarise(result(bad), chosen)
    all_at_once = {**one, "offered_rps": "inf", "label": "inf"}
    empty = {name: np.empty(0) for name in ("ttft_ms", "itl_ms", "e2e_ms")}
    cases = [([one], latencies(good)), ([none], empty), ([one, {**one, "offered_rps": 9.0}], {})]
    cases += [([one, none, all_at_once], {}), ([none, {**none, "offered_rps": 5.0}], {})]
    for number, (entries, samples) in enumerate(cases):
        path = tmp_path / f"{number}.png"
        write_plot(path, "a title", entries, samples)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
