"""The start of a real trace through a real cluster: nothing fails, nothing leaks, and the answers are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pd.cli import main
from pd.rules import builtin_model
from tests.replay import replay

pytestmark = pytest.mark.process

SAMPLE = Path(__file__).parent.parent / "data" / "conversation_sample.jsonl"


def test_the_sample_of_the_trace_is_served_whole_with_a_cluster_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PD_CLUSTER_SECRET", "a secret of this test")
    outcome = replay(builtin_model(), SAMPLE, 20, tmp_path, time_scale=0.5, pairs=1, share=0.15)
    assert outcome.problems == []
    assert outcome.figures["landed_bytes"] == outcome.figures["expected_bytes"] > 0
    assert outcome.figures["sampled_answers"] == 3
    assert "a secret of this test" not in (tmp_path / "pd-up.log").read_text()


def test_the_scheduler_benchmark_measures_both_cases_and_writes_them_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scheduler.json"
    words = ["--running", "16", "--waiting", "50", "--cached", "250", "--steps", "20", "--json", str(out)]
    assert main(["bench", "scheduler", *words]) == 0
    written = json.loads(out.read_text())
    assert {name: case["steps"] for name, case in written["cases"].items()} == {"empty": 20, "loaded": 20}
    assert all(0 < case["median_ms"] <= case["p99_ms"] <= case["max_ms"] for case in written["cases"].values())
    assert written["loaded_to_empty"] > 0 and "loaded / empty" in capsys.readouterr().out
