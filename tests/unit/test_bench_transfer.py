"""`pd bench transfer` without processes: which spans it moves, its arguments, what it finds out."""

from __future__ import annotations

import argparse
import ctypes
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from pd.abc import BackendDefaults, BackendInfo, Peer, Region, Spans, Ticket, TransferCapabilities
from pd.bench import transfer, transfer_ends, transfer_pool
from pd.bench.transfer_floor import timed
from pd.bench.transfer_plan import CHURNED, PATTERNS, Layout, forms, run_lengths
from pd.cli import main
from pd.errors import ConfigError
from pd.runner.memory import HostMemory
from pd.transfer.spans import coalesce

KIB, MIB = 1 << 10, 1 << 20


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 1000])
def test_every_block_moves_once_whatever_the_pattern(pattern: str, count: int) -> None:
    size = 64
    for layout in forms(pattern, count * size, size):
        spans = layout.spans(3)
        assert (spans[:, 0] == 0).all() and (spans[:, 2] == 3).all()
        assert (np.diff(spans[:, 3].astype(np.int64)) > 0).all(), "sorted by where they go"
        for column in (1, 3):
            covered = np.zeros(count, dtype=int)
            for offset, length in (spans[:, [column, 4]] // size).astype(int).tolist():
                covered[offset : offset + length] += 1
            assert (covered == 1).all()


def test_a_fresh_pool_is_one_run_and_a_scattered_one_has_no_neighbours() -> None:
    merged, single = forms("fresh", MIB, 16 * KIB)
    assert merged.spans().tolist() == [[0, 0, 0, 0, MIB]] and len(single.spans()) == 64
    (only,) = forms("scattered", MIB, 16 * KIB)
    assert not only.merged and len(only.spans()) == 64
    blocks = only.blocks().astype(np.int64)
    assert len(coalesce(0, blocks[:, 1], 0, blocks[:, 3], blocks[:, 4])) == 64
    assert (blocks[:, 1] != blocks[:, 3]).any()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 9, 10, 64, 1000])
def test_a_churned_pool_has_short_runs_that_do_not_meet(count: int) -> None:
    lengths = run_lengths("churned", count)
    assert lengths.sum() == count and lengths.min() >= 1 and lengths.max() <= max(CHURNED) and lengths.mean() <= 2
    merged, single = forms("churned", count * 64, 64)
    spans = merged.spans()
    assert sorted((spans[:, 4] // 64).tolist()) == sorted(lengths.tolist())
    assert len(single.spans()) == count


def test_the_blocks_are_the_same_ones_however_they_are_posted_and_in_every_process() -> None:
    merged, single = forms("churned", MIB, 16 * KIB)
    assert np.array_equal(merged.blocks(), single.blocks())
    assert np.array_equal(merged.spans(), Layout("churned", MIB, 16 * KIB, True).spans())
    assert len(merged.spans()) < len(single.spans())


def test_groups_are_so_many_blocks_each_and_begin_again() -> None:
    merged, single = forms("fresh", 10 * 64, 64)
    firsts = [next(iter(layout.groups(4, 1))) for layout in (merged, single)]
    assert firsts[0].tolist() == [[0, 0, 1, 0, 256]] and len(firsts[1]) == 4
    offsets = [int(spans[0, 3]) for spans, _ in zip(single.groups(4), range(4), strict=False)]
    assert offsets == [0, 256, 0, 256], "the rest, which is less than a group, is left out"


# --- arguments ------------------------------------------------------------------------------------------------------


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    transfer.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--sizes 0", "--sizes"),
        ("--sizes 64Q", "--sizes"),
        ("--sizes 100 --bytes 1M", "--sizes"),
        ("--sizes 8 --bytes 1M", "--sizes"),
        ("--bytes x", "--bytes"),
        ("--rounds 0", "--rounds"),
        ("--latency-count 0", "--latency-count"),
        ("--option novalue", "--option"),
        ("--pattern random", "--pattern"),
        ("--backend of-another-time", "--backend"),
        ("--device gpu", "--device"),
        ("--device cuda:x", "--device"),
        ("--device cuda:99", "--device"),
        ("--peer-device cuda:99", "--peer-device"),
        ("--peer-device tpu", "--peer-device"),
    ],
)
def test_a_wrong_argument_exits_2_and_names_itself(capsys: pytest.CaptureFixture[str], words: str, flag: str) -> None:
    assert main(["bench", "transfer", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"pd: {flag}: ")


def test_both_pools_are_on_the_host_or_both_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_pool, "device_names", lambda: ["one", "another"])
    options = transfer.parse_options(arguments("--device", "cuda"))
    assert (options.device, options.peer_device) == ("cuda:0", "cuda:0")
    options = transfer.parse_options(arguments("--device", "cuda:0", "--peer-device", "cuda:1"))
    assert (options.device, options.peer_device) == ("cuda:0", "cuda:1")
    for words in (("--peer-device", "cuda"), ("--device", "cuda", "--peer-device", "cpu")):
        with pytest.raises(ConfigError, match=r"--peer-device: .* both on the host or both on GPUs"):
            transfer.parse_options(arguments(*words))


def test_a_size_may_have_a_unit() -> None:
    assert [transfer.parse_size(text, "") for text in ("8", "16K", "4m", "1G")] == [8, 16384, 4 << 20, 1 << 30]


# --- the measurement, with a backend that copies within this process ------------------------------------------------


@dataclass(frozen=True)
class There:
    identity: str


class CopyingBackend(BackendDefaults):
    """Reads and writes host memory of this process. `spoil` changes the spans of each post."""

    capabilities = TransferCapabilities(max_spans_per_post=3)
    regions: ClassVar[dict[str, list[Region]]] = {}
    posted: ClassVar[list[int]] = []

    @staticmethod
    def spoil(spans: Spans) -> Spans:
        return spans

    def open(self, identity: str) -> None:
        self.identity = identity

    def register(self, regions: Sequence[Region]) -> None:
        assert all(region.device == "cpu" for region in regions)
        self.regions[self.identity] = list(regions)

    def descriptor(self) -> bytes:
        return self.identity.encode()

    def connect(self, descriptor: bytes) -> Peer:
        return There(descriptor.decode())

    def post(self, peer: Peer, spans: Spans, tag: int) -> Ticket:
        here, there = self.regions[self.identity], self.regions[peer.identity]
        self.posted.append(len(spans))
        for local, source, remote, target, length in self.spoil(spans).tolist():
            ctypes.memmove(there[remote].address + target, here[local].address + source, length)

    def poll(self, ticket: Ticket) -> bool:
        return True

    def expel(self, identity: str) -> bool:
        return True

    def reset_peer(self, peer: Peer) -> None: ...

    def close(self) -> None: ...


class InProcess:
    """`RemoteSide` without a process; what goes through it is what JSON can carry."""

    def __init__(self, factory: str, host: str, secret: str, options: dict[str, str], module: str) -> None:
        self.side = transfer_ends.BenchSide(factory, host, secret, options)

    def call(self, method: str, *args: Any, timeout: float = 0.0, meanwhile: Any = None) -> Any:
        return json.loads(json.dumps(getattr(self.side, method)(*json.loads(json.dumps(args)))))

    def kill(self) -> None: ...


class Gpu(HostMemory):
    """A GPU whose memory the host can reach, so that only its name says that a backend cannot."""

    device = "cuda:0"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    info = BackendInfo("copying", CopyingBackend)
    monkeypatch.setattr(transfer_ends, "installed", lambda name: info)
    monkeypatch.setattr(transfer_ends, "RemoteSide", InProcess)
    monkeypatch.setattr(CopyingBackend, "regions", {})
    monkeypatch.setattr(CopyingBackend, "posted", [])
    yield


def options(device: str, pattern: str = "churned") -> transfer.Options:
    return transfer.Options("copying", (16 * KIB, 64 * KIB), MIB, pattern, device, device, 2, 5, {})


def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools that a backend of host memory cannot reach; the floor is a copy of the host."""

    def allocate(nbytes: int, device: str) -> Region:
        raw = np.zeros(nbytes, dtype=np.uint8)
        return Region(0, int(raw.ctypes.data), nbytes, device, raw.data, raw)

    class Floor:
        what = "a copy"

        def __init__(self, device: str, target: Region) -> None:
            self.target = target

        def pump(self, spans: Spans) -> tuple[float, float]:
            return timed(lambda: None)

    for module in (transfer_ends, transfer_pool):
        monkeypatch.setattr(module, "device_memory", lambda device: Gpu())
    monkeypatch.setattr(transfer_pool, "allocate_on_gpu", allocate)
    monkeypatch.setattr(transfer_ends, "DeviceCopy", Floor)
    monkeypatch.setattr(transfer, "device_names", lambda: ["a GPU"])


def test_pools_on_gpus_are_staged_for_a_backend_that_reaches_the_host_only(
    here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpus(monkeypatch)
    result = transfer.measure(options("cuda:0"), Console(file=io.StringIO()))
    assert result["staged"] == ["copying"] and result["raw"] == "a copy" and result["machine"]["gpus"] == ["a GPU"]
    assert max(CopyingBackend.posted) == 3, "no post of more spans than the backend takes"
    rows = [(row["variant"], row["block_bytes"], row["posted"]) for row in result["throughput"]]
    sizes = [(size, form) for size in (16 * KIB, 64 * KIB) for form in ("merged", "single")]
    assert rows == [(variant, *size) for size in sizes for variant in ("raw", "copying")]
    for row in result["throughput"]:
        assert row["spans"] < row["blocks"] if row["posted"] == "merged" else row["spans"] == row["blocks"]
        assert len(row["seconds"]) == 2
    gains = {(row["variant"], row["block_bytes"]): row for row in result["coalescing"]}
    assert set(gains) == {(variant, size) for variant in ("raw", "copying") for size in (16 * KIB, 64 * KIB)}
    row = gains["copying", 16 * KIB]
    assert row["gain"] == pytest.approx(row["merged_gb_per_s"] / row["single_gb_per_s"])
    latencies = [(row["variant"], row["blocks"], row["posted"]) for row in result["latency"]]
    many = [(variant, 16, form) for form in ("merged", "single") for variant in ("raw", "copying")]
    assert latencies == [("raw", 1, "single"), ("copying", 1, "single"), *many]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_backend_that_leaves_out_a_block_is_found_out(
    here: None, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device != "cpu":
        on_gpus(monkeypatch)
    monkeypatch.setattr(transfer_ends.Pair, "floor", lambda self: None)
    monkeypatch.setattr(CopyingBackend, "spoil", staticmethod(lambda spans: spans[:-1]))
    with pytest.raises(RuntimeError, match="copying, blocks of 16 KiB: what arrived is not what was sent"):
        transfer.measure(options(device), Console(file=io.StringIO()))


def test_blocks_that_have_no_neighbours_have_no_gain(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_ends.Pair, "floor", lambda self: None)
    result = transfer.measure(options("cpu", "scattered"), Console(file=io.StringIO()))
    assert result["coalescing"] == [] and result["raw"] is None and result["staged"] == []
    assert [(row["variant"], row["posted"], row["of_raw"]) for row in result["throughput"]] == [
        ("copying", "single", None)
    ] * 2
