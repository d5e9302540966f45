"""Torch profiles of one instance at a time, in a real cluster."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_kit import PATIENCE, ROOT, Deployment, ask, deploy, prompt
from up_kit import run

from pd.types import MAX_PROFILE_STEPS

pytestmark = pytest.mark.process

#: What the profiler says of a runner's steps: the model's matrix products, and each step by its name.
PRODUCT, STEP = "aten::mm", "pd step "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Deployment]:
    arguments = ("--page-size", "16", "--chunked-prefill-size", "32", "--local-prefill", "never")
    with deploy(folder, "llama", *arguments, "--profile-dir", str(folder / "default")) as found:
        yield found


def post(url: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=PATIENCE)


#: What SGLang's benchmark sends, besides the folder.
SGLANG: dict[str, Any] = {
    "activities": ["CPU", "GPU"],
    "num_steps": None,
    "profile_by_stage": False,
    "profile_stages": None,
    "profile_prefix": None,
}


def start(url: str, into: Path, **fields: Any) -> None:
    answer = post(url, "/start_profile", {**SGLANG, "output_dir": str(into), **fields})
    assert answer.status_code == 200 and answer.json()["success"], answer.text


def stop(url: str) -> list[Path]:
    answer = post(url, "/stop_profile")
    assert answer.status_code == 200, answer.text
    return [Path(name) for name in answer.json()["files"]]


def events(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace) as file:
        return list(json.load(file)["traceEvents"])


def names(trace: Path) -> list[str]:
    return [str(event.get("name")) for event in events(trace)]


def steps(trace: Path) -> list[tuple[int, int]]:
    """(rows, tokens) of every step in the trace, in order."""
    found = sorted((e["ts"], e["name"]) for e in events(trace) if str(e.get("name")).startswith(STEP))
    words = [name.split() for _, name in found]
    return [(int(word[3]), int(word[5])) for word in words]


def use(pair: Deployment, seed: int, tokens: int = 70, output: int = 8) -> None:
    pair.generate([ask(prompt(tokens, seed), output)])


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_a_trace_is_of_the_asked_instance_and_of_no_other(pair: Deployment, tmp_path: Path, leg: str) -> None:
    """The prompt's 70 tokens are on the prefill side, in chunks of 32; each decode step has one token."""
    asked, other = (pair.prefill, pair.decode) if leg == "prefill" else (pair.decode, pair.prefill)
    before = pair.running.logged("profile_started")
    start(asked, tmp_path)
    use(pair, 1 if leg == "prefill" else 2)
    refused = post(other, "/stop_profile")
    assert refused.status_code == 400 and "start one first" in refused.json()["error"]["message"]
    (trace,) = stop(asked)
    assert list(tmp_path.iterdir()) == [trace] and trace.name.startswith(f"{leg}-0-{leg}-rank0-")
    assert trace.name.endswith(".trace.json.gz")
    assert any(PRODUCT in name or "aten::linear" in name for name in names(trace)), set(names(trace))
    counts = [tokens for _, tokens in steps(trace)]
    assert counts == ([32, 32, 6] if leg == "prefill" else [1] * 7)
    (line,) = pair.running.logged("profile_started")[len(before) :]
    assert line["instance"] == f"{leg}-0"
    (pid,) = {event["pid"] for event in events(trace) if str(event.get("name")).startswith(STEP)}
    assert pid == line["pid"]
    pair.assert_at_rest()


def test_it_stops_by_itself_after_num_steps_and_the_stop_names_the_file(pair: Deployment, tmp_path: Path) -> None:
    start(pair.decode, tmp_path, num_steps="3", activities=["CPU", "GPU"], profile_prefix="mine", profile_id="one")
    use(pair, 3)
    deadline = time.monotonic() + PATIENCE
    trace = tmp_path / "mine-decode-0-decode-rank0-one.trace.json.gz"
    while not trace.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert steps(trace) == [(1, 1)] * 3
    assert stop(pair.decode) == [trace]
    assert post(pair.decode, "/stop_profile").status_code == 400, "only once"
    start(pair.decode, tmp_path, num_steps=1)
    use(pair, 4)
    start(pair.decode, tmp_path, num_steps=1)  # nobody stopped the one before, which was over
    assert stop(pair.decode)


def test_it_begins_with_a_step_and_each_stage_has_its_own_file(pair: Deployment, tmp_path: Path) -> None:
    start(pair.prefill, tmp_path / "a", num_steps=2, profile_by_stage=True)
    use(pair, 5)
    (trace,) = stop(pair.prefill)
    assert trace.name.endswith("-EXTEND.trace.json.gz") and [tokens for _, tokens in steps(trace)] == [32, 32]
    start(pair.prefill, tmp_path / "b", profile_by_stage=True, profile_stages=["decode"])
    use(pair, 6)
    assert stop(pair.prefill) == []
    start(pair.decode, tmp_path / "c", start_step=1 << 40)
    use(pair, 7)
    assert stop(pair.decode) == []
    start(pair.decode, tmp_path / "c", start_step="1", with_stack=True, record_shapes=False)
    use(pair, 8)
    (trace,) = stop(pair.decode)
    assert len(steps(trace)) == 7 and any("worker.py" in name for name in names(trace))


def test_by_default_it_writes_to_the_instances_folder(pair: Deployment, folder: Path) -> None:
    assert httpx.get(f"{pair.decode}/start_profile", timeout=PATIENCE).status_code == 200
    (trace,) = stop(pair.decode)
    assert trace.parent == folder / "default" and trace.stat().st_size


def test_the_router_asks_every_instance(pair: Deployment, tmp_path: Path) -> None:
    start(pair.url, tmp_path)
    use(pair, 9)
    traces = stop(pair.url)
    assert sorted(trace.name.partition("-rank")[0] for trace in traces) == ["decode-0-decode", "prefill-0-prefill"]
    assert all(steps(trace) for trace in traces)
    assert post(pair.url, "/stop_profile").status_code == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"activities": ["GPU"]}, "activities"),
        ({"activities": ["CPU", "MEM"]}, "activities[1]"),
        ({"activities": []}, "activities"),
        ({"num_steps": MAX_PROFILE_STEPS + 1}, "num_steps"),
        ({"num_steps": "many"}, "num_steps"),
        ({"output_dir": "/proc/nothing"}, "output_dir"),
        ({"output_dir": "a\0b"}, "output_dir"),
        ({"profile_prefix": "../a"}, "profile_prefix"),
        ({"profile_stages": ["decode"]}, "profile_stages"),
        ({"merge_profiles": True}, "merge_profiles"),
        ({"detailed_annotations": True}, "detailed_annotations"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_hurts_nothing(
    pair: Deployment, body: dict[str, Any], param: str
) -> None:
    answer = post(pair.decode, "/start_profile", body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and param in error["message"], answer.text
    assert post(pair.decode, "/stop_profile").status_code == 400


def test_one_at_a_time(pair: Deployment, tmp_path: Path) -> None:
    start(pair.decode, tmp_path)
    answer = post(pair.decode, "/start_profile", {})
    assert answer.status_code == 400 and "already" in answer.json()["error"]["message"]
    use(pair, 10)
    (trace,) = stop(pair.decode)
    assert steps(trace)


def test_a_folder_that_goes_away_loses_the_trace_and_nothing_else(pair: Deployment, tmp_path: Path) -> None:
    start(pair.decode, tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    use(pair, 12)
    answer = post(pair.decode, "/stop_profile")
    assert answer.status_code == 500 and "gone" in answer.json()["error"]["message"], answer.text
    start(pair.decode, tmp_path)
    use(pair, 13)
    assert steps(*stop(pair.decode))


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_pd_bench_serve_profiles_a_leg_by_its_url(pair: Deployment, tmp_path: Path, leg: str) -> None:
    url = pair.prefill if leg == "prefill" else pair.decode
    load = "--rate inf --num-requests 4 --input-len 40 --output-len 6 --no-progress --profile --pd-separated"
    where = (f"--profile-{leg}-url", url, "--profile-output-dir", ".", "--profile-num-steps", "2")
    command = [sys.executable, "-m", "pd.bench.serve", pair.url, *load.split(), *where]
    code, _, said = run(command, tmp_path, {"PYTHONPATH": ROOT})
    (trace,) = tmp_path.iterdir()
    assert code == 0 and str(trace) in said, said
    assert trace.name.startswith(f"{leg}-0") and len(steps(trace)) == 2


def test_a_profile_that_nobody_stops_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """Within the bound of `deploy`, and with exit code 0."""
    with deploy(tmp_path, "llama", "--unified", "1") as one:
        start(one.decode, tmp_path / "out", with_stack=True)
        use(one, 11)
    assert list((tmp_path / "out").iterdir()) == []
