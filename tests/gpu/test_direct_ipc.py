"""`direct` between GPUs: conformance over CUDA IPC and without it, peers that die, and how fast it is.

The classes take two to three minutes each, most of it the start of processes: `-k "not TestDirect"` leaves them out.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch

from pd.abc import Region
from pd.errors import TransferError
from pd.kernels.block_copy import copy_share, plan_share
from pd.kernels.spans import Form, as_words
from pd.runner.cuda_ipc import CudaMapping
from pd.runner.cuda_memory import CudaMemory, allocate_device_region, device_bytes
from pd.testing import TransferConformance
from pd.testing.transfer_harness import BLOCK, MIB
from pd.testing.transfer_peer import RemoteSide, pattern
from pd.transfer.digest import digest_span, digest_spans
from tests.gpu.cuda_side import CudaSide, cuda_memory

FACTORY = "pd.transfer.plugin:make_direct"
DEVICE = "cuda:0"


def second_gpu() -> str:
    """Its number for CUDA_VISIBLE_DEVICES."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[1]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class TestDirectIpc(TransferConformance):
    """Two processes on one GPU. `peer_environment` is what the other one has besides."""

    factory = FACTORY
    secret = "cluster secret"
    side = CudaSide
    receiver_driven = True
    authenticates = True
    peer_environment: ClassVar[dict[str, str]] = {}
    way: ClassVar[str] = "device"

    def remote(self, identity: str, secret: str | None = None, regions: int = 1) -> RemoteSide:
        with mock.patch.dict(os.environ, self.peer_environment):
            return super().remote(identity, secret, regions)

    def test_bytes_go_by_the_expected_way(self) -> None:
        self.connected("there")
        assert self.here.ways() == {self.way: 1}  # type: ignore[attr-defined]


class TestDirectWithoutIpc(TestDirectIpc):
    """The receiver cannot open handles: staged through pinned memory."""

    peer_environment: ClassVar = {"PD_TEST_NO_CUDA_IPC": "1"}
    way = "stream"
    # Tests that send from the other process to this one, which can open handles, are those above.


@two_gpus
class TestDirectTwoGpus(TestDirectIpc):
    peer_environment: ClassVar = {"PD_TEST_CUDA_DEVICE": "1"}


@two_gpus
class TestDirectTwoGpusOneVisibleEach(TestDirectIpc):
    def remote(self, identity: str, secret: str | None = None, regions: int = 1) -> RemoteSide:
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=second_gpu()):
            return super().remote(identity, secret, regions)


# --- the kernel ---


def scattered(seed: int, step: int) -> np.ndarray:
    """int64[n, 4] (offset, offset elsewhere, length, position): disjoint spans of all sizes in random places."""
    rng = np.random.default_rng(seed)
    lengths = (2 ** rng.uniform(4, 21.5, 100)).astype(np.int64) // step * step
    rows = np.zeros((len(lengths), 4), dtype=np.int64)
    rows[:, 2], rows[:, 3] = lengths, rng.integers(0, 1 << 20, len(lengths)) * (step // 8)
    for column in (0, 1):
        order = rng.permutation(len(lengths))
        ends = np.cumsum(lengths[order] + rng.integers(0, 60, len(lengths)) * step)
        rows[order, column] = ends - lengths[order]
    return rows


@pytest.mark.parametrize("programs", [1, 7, 32, 132, 5000])
@pytest.mark.parametrize("step", [8, 16])
@pytest.mark.parametrize("form", [Form(32, 4), Form(64, 8)])
@pytest.mark.parametrize("slices", [1, 3])
def test_any_number_of_programs_copies_exactly_the_spans(programs: int, step: int, form: Form, slices: int) -> None:
    rows = scattered(programs, step)
    raw = np.random.default_rng(1).integers(0, 256, 64 * MIB, dtype=np.uint8)
    source, target = torch.from_numpy(raw).to(DEVICE), torch.zeros(64 * MIB, dtype=torch.uint8, device=DEVICE)
    table = np.zeros((5, len(rows) + 1), dtype=np.int64)
    share = plan_share(as_words(source), as_words(target), rows[:, :3], rows[:, 3], table)
    digests, there = torch.zeros(len(rows), dtype=torch.int64, device=DEVICE), torch.from_numpy(table).to(DEVICE)
    for tiles in itertools.pairwise(share.tiles * i // slices for i in range(slices + 1)):
        copy_share(as_words(source), as_words(target), share, there, digests, programs, form, tiles)
    expected = np.zeros_like(raw)
    for at, to, length, _ in rows.tolist():
        expected[to : to + length] = raw[at : at + length]
    assert np.array_equal(target.cpu().numpy(), expected)
    keys = rows[:, 3].astype(np.uint64)
    assert np.array_equal(
        digests.cpu().numpy().view(np.uint64), digest_spans(raw, rows[:, [0, 2]].astype(np.uint64), keys)
    )


# --- mapped memory ---


@pytest.fixture(scope="module")
def memory() -> CudaMemory:
    return cuda_memory(0, False)


@pytest.fixture
def sender() -> Iterator[RemoteSide]:
    remote = RemoteSide(FACTORY, "127.0.0.1", "", {}, module="tests.gpu.cuda_side")
    remote.call("open", "P", 64 * MIB, BLOCK, timeout=120.0)
    yield remote
    remote.kill()


def mapped(memory: CudaMemory, sender: RemoteSide) -> CudaMapping:
    return memory.open(bytes.fromhex(sender.call("handle")), [64 * MIB])


def pull(memory: CudaMemory, mapping: CudaMapping, region: Region, rows: np.ndarray) -> list[int]:
    one = memory.prepare(mapping, 0, region, rows, np.zeros(len(rows), np.uint64))
    try:
        one.start()
        return one.finish().tolist()
    finally:
        one.release()


ROWS = np.array([[0, 32 * MIB, 4 * MIB], [8 * MIB, 0, 64], [63 * MIB, 16 * MIB, MIB]], dtype=np.int64)


def digests_of(raw: np.ndarray) -> list[int]:
    return [digest_span(raw[at : at + length], 0) for at, _, length in ROWS.tolist()]


def test_memory_of_another_process_is_pulled_and_digested(memory: CudaMemory, sender: RemoteSide) -> None:
    sender.call("pattern", 5)
    raw, region = pattern(5, 64 * MIB), allocate_device_region(64 * MIB, DEVICE)
    first, again = mapped(memory, sender), mapped(memory, sender)  # a second connection maps the same memory
    assert pull(memory, first, region, ROWS) == digests_of(raw)
    first.close()
    assert pull(memory, again, region, ROWS) == digests_of(raw)
    expected = np.zeros(64 * MIB, dtype=np.uint8)
    for at, to, length in ROWS.tolist():
        expected[to : to + length] = raw[at : at + length]
    assert np.array_equal(device_bytes(region).cpu().numpy(), expected)
    again.close()


def test_memory_of_a_killed_process_is_there_until_it_is_unmapped(memory: CudaMemory, sender: RemoteSide) -> None:
    sender.call("pattern", 6)
    region, mapping = allocate_device_region(64 * MIB, DEVICE), mapped(memory, sender)
    raw = pattern(6, 64 * MIB)
    assert pull(memory, mapping, region, ROWS) == digests_of(raw)
    sender.kill()
    for _ in range(20):
        assert pull(memory, mapping, region, ROWS) == digests_of(raw)
        time.sleep(0.05)
    mapping.close()
    assert float(torch.ones(1000, device=DEVICE).sum()) == 1000, "the GPU works"


def test_a_process_killed_in_the_middle_of_pulls_leaves_a_gpu_that_works(
    memory: CudaMemory, sender: RemoteSide
) -> None:
    region, mapping = allocate_device_region(64 * MIB, DEVICE), mapped(memory, sender)
    rows = np.array([[0, 0, 64 * MIB]], dtype=np.int64)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        pull(memory, mapping, region, rows)
        if sender.process.poll() is None and time.monotonic() > deadline - 1.0:
            sender.process.kill()
    mapping.close()
    torch.cuda.synchronize()
    assert float(torch.ones(1000, device=DEVICE).sum()) == 1000


def test_a_handle_that_cannot_be_opened_is_an_error_and_the_gpu_works(memory: CudaMemory) -> None:
    region = allocate_device_region(MIB, DEVICE)
    with pytest.raises(TransferError, match="cudaIpcOpenMemHandle failed"):
        memory.open(memory.export([region]), [MIB])  # no process opens its own
    for wrong in (b"", memory.export([region])[:-1]):
        with pytest.raises(TransferError):
            memory.open(wrong, [MIB])
    with pytest.raises(TransferError, match="other regions"):
        memory.open(memory.export([region]), [2 * MIB])
    assert float(torch.ones(1000, device=DEVICE).sum()) == 1000


def test_a_pull_in_many_slices_takes_what_is_free_when_each_is_launched(memory: CudaMemory, sender: RemoteSide) -> None:
    sender.call("pattern", 8)
    region, mapping = allocate_device_region(64 * MIB, DEVICE), mapped(memory, sender)
    rows = np.array([[i * MIB, (63 - i) * MIB, MIB] for i in range(64)], dtype=np.int64)
    raw, answers = pattern(8, 64 * MIB), itertools.cycle((True, False, False))
    short = {key: replace(width, tiles=7 * MIB // 16384) for key, width in memory.pulls.widths.items()}
    with mock.patch.dict(memory.pulls.widths, short), mock.patch.object(memory.pulls, "alone", lambda: next(answers)):
        pulls = [memory.prepare(mapping, 0, region, rows, np.zeros(64, np.uint64)) for _ in range(3)]
        for one in pulls:
            one.start()
        for one in pulls:
            assert one.finish().tolist() == [digest_span(raw[i * MIB : (i + 1) * MIB], 0) for i in range(64)]
            one.release()
    assert np.array_equal(device_bytes(region).cpu().numpy().reshape(64, MIB), raw.reshape(64, MIB)[::-1])
    mapping.close()


def test_pulls_do_not_wait_behind_a_step(memory: CudaMemory, sender: RemoteSide) -> None:
    sender.call("pattern", 7)
    region, mapping = allocate_device_region(64 * MIB, DEVICE), mapped(memory, sender)
    torch.cuda._sleep(4_000_000_000)  # about two seconds on the compute stream
    done = torch.cuda.Event()
    done.record()
    found = pull(memory, mapping, region, ROWS)
    assert not done.query(), "the step was still running when the pull was done"
    assert found == digests_of(pattern(7, 64 * MIB))
    torch.cuda.synchronize()
    mapping.close()


def seconds(run: Callable[[], object]) -> float:
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 5e3


@pytest.mark.parametrize("peer", ["0", pytest.param("1", marks=two_gpus)])
def test_pulled_blocks_keep_a_useful_pace(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the backend, between two processes, against one plain copy over the same mapping."""
    nbytes, rates = 1024 * MIB, []
    with mock.patch.dict(os.environ, PD_TEST_CUDA_DEVICE=peer):
        remote = RemoteSide(FACTORY, "127.0.0.1", "", {}, module="tests.gpu.cuda_side")
    here = CudaSide(FACTORY, "127.0.0.1", "", {})
    try:
        remote.call("open", "P", nbytes, 4 * MIB, timeout=120.0)
        here.open("D", nbytes, 4 * MIB)
        memory = cuda_memory(0, False)
        mapping = memory.open(bytes.fromhex(remote.call("handle")), [nbytes])
        target = as_words(device_bytes(here.region))
        plain = nbytes / seconds(lambda: target.copy_(mapping.words[0])) / 1e9
        mapping.close()
        remote.call("connect", here.descriptor())
        assert remote.call("ways") == {"device": 1}
        for tag, block in enumerate((32 << 10, 256 << 10, 4 * MIB), 1):
            here.grant(tag, [[0, nbytes]], "P")
            took = min(remote.call("send_all", "D", block, tag, 4) for _ in range(4))
            rates.append(f"{block >> 10} KiB {4 * nbytes / took / 1e9:.0f}")
    finally:
        remote.kill()
        here.close()
    with capsys.disabled():
        print(f"\n  GPU {peer} to 0, GB/s: plain copy {plain:.0f}; pulled blocks of {', '.join(rates)}")
