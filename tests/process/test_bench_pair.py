"""`pd bench pair` without a GPU: the processes, phases and files that a measurement on two GPUs has."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_kit import ROOT
from up_kit import environment

pytestmark = pytest.mark.process

#: A rehearsal: small prompts, few requests, one chunk size.
SMALL = ("--device", "cpu", "--shape", "tiny", "--serve-flags", "--max-total-tokens 16384 --page-size 16")
SHORT = ("--verify-only", "prefix", "--prompts", "100", "--repeats", "2", "--input-len", "64", "--output-len", "16")
KILL = ("--kill-rate", "6", "--kill-seconds", "8", "--down", "0.5", "--request-timeout", "60")


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pd", "bench", "pair", "--out", str(folder), *SMALL, *SHORT, *words]


def bench(folder: Path, *words: str, bound: float = 200.0) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what it said, and the document."""
    done = subprocess.run(
        command(folder, *words),
        capture_output=True,
        text=True,
        timeout=bound,
        env=environment(PYTHONPATH=ROOT),
        check=False,
    )
    found = folder / "two-gpus.json"
    return done.returncode, done.stdout + done.stderr, json.loads(found.read_text()) if found.exists() else {}


def processes_of(folder: Path) -> list[psutil.Process]:
    """Whatever serves the rehearsal's model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_pair_is_verified_pushes_and_survives_a_kill_of_its_prefill_instance(tmp_path: Path) -> None:
    phases = ("--only", "verify,push,kill", "--transfer", "direct,none-such", *KILL)
    code, said, found = bench(tmp_path, *phases)
    assert code == 0, said
    assert not processes_of(tmp_path)

    verified = found["verify"]["direct"]
    assert verified["right"] and verified["equal"] == verified["by_prefill"] > 0
    assert "no transfer backend 'none-such'" in found["not_measured"]["transfer none-such"]
    assert "not measured: transfer none-such: no transfer backend" in said
    assert 0 < found["second_token_share"]["direct"]["100"] < 1 and found["push_gbps"]["direct"]["100"] > 0

    prefill, decode = found["kill"]["prefill"], found["kill"]["decode"]
    assert prefill["hung"] == decode["hung"] == 0
    assert prefill["requests"] == decode["requests"] == 48
    assert prefill["failed"] == 0, "decode computes prompts itself while no prefill instance is there"
    gone = decode["clients"]["sent while the instance was down"]
    assert gone["failed"] and all("decode instance" in error for error in gone["errors"]), gone

    assert "pd serve" in found["commands"]["push-direct"][0]
    began = time.monotonic()
    code, said, again = bench(tmp_path, *phases)
    assert code == 0 and time.monotonic() - began < 10, "everything is measured already"
    assert again == {**found, "command": again["command"]}


@pytest.mark.slow
def test_loads_of_both_systems_make_curves_and_a_comparison(tmp_path: Path) -> None:
    load = ("--rates", "4,8", "--seconds", "4", "--chunk-sizes", "64,512", "--tune-rate", "6", "--copy-bytes", "16M")
    trace = ("--trace", f"{ROOT}/tests/data/conversation_sample.jsonl", "--rows", "20", "--length-scale", "1/64")
    phases = ("--only", "copy,tune,load,trace", "--transfer", "direct", "--time-scales", "1/2")
    code, said, found = bench(tmp_path, *phases, *load, *trace, bound=500.0)
    assert code == 0, said
    assert found["copy_gbps"] > 0
    assert {(one["system"], one["rate"]) for one in found["curves"]} == {
        (system, rate) for system in ("pd", "unified") for rate in (4.0, 8.0)
    }
    assert {(one["system"], one["chunk"]) for one in found["tuning"]} == {
        (system, chunk) for system in ("pd", "unified") for chunk in (64, 512)
    }
    assert all(one["completed"] == one["requests"] for one in found["curves"] + found["trace"])
    assert all(one["chunk"] in (64, 512) for one in found["curves"])
    assert {one["system"] for one in found["trace"]} == {"pd", "unified"}
    assert (tmp_path / "load.png").exists() and (tmp_path / "trace.png").exists()


@pytest.mark.slow
def test_a_time_limit_leaves_steps_to_the_next_run(tmp_path: Path) -> None:
    phases = ("--only", "copy,push", "--transfer", "direct", "--copy-bytes", "16M")
    code, said, found = bench(tmp_path, *phases, "--time-limit", "60")
    assert code == 3 and "not measured within the time limit: push-direct" in said
    assert found["copy_gbps"] > 0 and not found["push_gbps"]
    code, said, found = bench(tmp_path, *phases)
    assert code == 0 and found["push_gbps"]["direct"] and "copy: done" not in said


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_started_ends_with_the_benchmark(tmp_path: Path, how: signal.Signals) -> None:
    running = subprocess.Popen(
        command(tmp_path, "--only", "kill", "--transfer", "direct", *KILL, "--kill-seconds", "120"),
        env=environment(PYTHONPATH=ROOT),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "logs").glob("*-router.log")):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.1)
        time.sleep(3.0)
        running.send_signal(how)
        running.wait(60)
        deadline = time.monotonic() + 60
        while processes_of(tmp_path):
            assert time.monotonic() < deadline, processes_of(tmp_path)
            time.sleep(0.1)
    finally:
        running.kill()
        running.wait()
