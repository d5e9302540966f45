"""Fault points: a process stands at an armed point until it is released, and costs nothing where none is armed."""

from __future__ import annotations

import os
from pathlib import Path

from pd.faults import FaultPoints, fault_prefix


def test_without_a_folder_there_are_no_fault_points() -> None:
    assert fault_prefix("", "prefill-0", "runner") == ""
    assert FaultPoints.of("") is None


def test_an_armed_point_is_reached_once_with_the_pid_and_released_by_go(tmp_path: Path) -> None:
    prefix = fault_prefix(str(tmp_path), "prefill-0", "runner")
    points = FaultPoints(prefix, hold=3600.0)  # only `go` can end the wait
    (tmp_path / "prefill-0.runner.step").touch()
    (tmp_path / "prefill-0.runner.step.go").touch()
    points.reached("push")
    assert not (tmp_path / "prefill-0.runner.step.reached").exists()
    points.reached("step")
    assert (tmp_path / "prefill-0.runner.step.reached").read_text() == str(os.getpid())
    assert not (tmp_path / "prefill-0.runner.step").exists()
    (tmp_path / "prefill-0.runner.step.reached").unlink()
    points.reached("step")
    assert not (tmp_path / "prefill-0.runner.step.reached").exists()


def test_a_point_that_nobody_releases_is_left_after_its_bound(tmp_path: Path) -> None:
    (tmp_path / "d.scheduler.got:Landed").touch()
    FaultPoints(fault_prefix(str(tmp_path), "d", "scheduler"), hold=0.0).reached("got:Landed")
    assert (tmp_path / "d.scheduler.got:Landed.reached").exists()
