"""`pd bench transfer` between pools on GPUs, by every backend that this machine has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pd.bench.transfer_plan import forms
from pd.bench.transfer_pool import allocate_on_gpu, clear, fill, span_digests
from pd.plugins import load_plugins
from pd.runner.cuda_memory import copy_region, device_bytes

MIB = 1 << 20


def devices() -> list[tuple[str, str]]:
    pairs = [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")]
    return pairs[: 1 if torch.cuda.device_count() < 2 else 2]


@pytest.mark.parametrize("pair", devices(), ids=" to ".join)
def test_a_plain_copy_between_pools_is_seen_by_digest(pair: tuple[str, str]) -> None:
    source, target = (allocate_on_gpu(4 * MIB, device) for device in pair)
    fill(source, 1)
    (layout,) = forms("scattered", 4 * MIB, 64 << 10)
    blocks = layout.blocks()
    assert (span_digests(source, blocks, 2) != span_digests(target, blocks, 2)).all()
    copy_region(source, target, 4 * MIB)
    assert (span_digests(source, blocks, 2) == span_digests(target, blocks, 2)).all()
    clear(target)
    assert not device_bytes(target).any()


@pytest.mark.parametrize("pattern", ["fresh", "churned"])
@pytest.mark.parametrize("pair", devices(), ids=" to ".join)
@pytest.mark.parametrize("backend", ["direct", "nixl", "mooncake"])
def test_pools_on_gpus_are_measured(backend: str, pair: tuple[str, str], pattern: str, tmp_path: Path) -> None:
    info = load_plugins().backends().get(backend)
    if info is None or info.unavailable():
        pytest.skip(f"{backend} is not installed")
    results = tmp_path / "transfer.json"
    words = ["--backend", backend, "--device", pair[0], "--peer-device", pair[1], "--pattern", pattern]
    words += ["--bytes", "64M", "--sizes", "256K,4M", "--rounds", "2", "--latency-count", "10"]
    command = [sys.executable, "-m", "pd", "bench", "transfer", *words, "--json", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    data = json.loads(results.read_text())
    assert data["raw"] == f"one plain copy of as many bytes, {pair[0]} to {pair[1]}"
    variants = {row["variant"] for row in data["throughput"]}
    assert "raw" in variants and variants & {backend, "shm"}
    assert ("bare" in variants) == (backend != "direct" and not data["staged"])
    assert {row["posted"] for row in data["throughput"]} == {"merged", "single"}
    assert all(row["gb_per_s"] > 0 and row["of_raw"] > 0 for row in data["throughput"])
