"""Device memory as the transfer core uses it: copies, digests, staging, several threads, beside running steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pd.abc import Region
from pd.errors import ConfigError, TransferError
from pd.runner.cuda_memory import CHUNK, CudaMemory, allocate_device_region, device_bytes
from pd.runner.kv_pool import KvPool, allocate_region
from pd.transfer.digest import digest_span
from pd.transfer.spans import Pool, block_spans
from pd.transfer.staging import Staging
from pd.types import BlockShape
from tests.transfer_kit import ScriptedBackend

DEVICE = "cuda:0"
SHAPE = BlockShape(tokens=32, kv_heads=8, layers=8, head_dim=128, itemsize=2)


@pytest.fixture(scope="module")
def memory() -> CudaMemory:
    return CudaMemory(0)


def noise(nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def filled(nbytes: int, seed: int) -> tuple[Region, np.ndarray]:
    region, raw = allocate_device_region(nbytes, DEVICE), noise(nbytes, seed)
    device_bytes(region).copy_(torch.from_numpy(raw))
    torch.cuda.synchronize()
    return region, raw


def test_a_region_is_zeroed_and_one_that_does_not_fit_is_a_wrong_setting() -> None:
    region = allocate_region(3 * SHAPE.nbytes, None, DEVICE)
    assert region.device == DEVICE and region.buffer is None and not device_bytes(region).any()
    pool = KvPool(region, SHAPE, 3, torch.bfloat16)
    assert pool.tensor.data_ptr() == region.address and pool.tensor.is_cuda
    pool.tensor[1] = 1.0
    pool.copy(1, 2, 5)
    assert pool.tensor[2, ..., :5, :].eq(1).all() and not pool.tensor[2, ..., 5:, :].any()
    with pytest.raises(ConfigError, match="--mem-fraction-static: cuda:0 has no"):
        allocate_device_region(1 << 42, DEVICE)


@pytest.mark.parametrize("nbytes", [0, 8, 4096, CHUNK - 8, CHUNK, CHUNK + 8, 3 * CHUNK, 5 * CHUNK + 24])
def test_what_is_copied_to_the_device_comes_back(memory: CudaMemory, nbytes: int) -> None:
    region, before = filled(nbytes + 80, 1)
    raw = noise(nbytes, nbytes)
    memory.copy(region, 64, memoryview(raw.tobytes()), to_device=True)
    expected = before.copy()
    expected[64 : 64 + nbytes] = raw
    assert np.array_equal(device_bytes(region).cpu().numpy(), expected)
    back = bytearray(nbytes)
    memory.copy(region, 64, memoryview(back), to_device=False)
    assert back == raw.tobytes()


def test_digests_of_several_regions_are_those_of_the_host(memory: CudaMemory) -> None:
    (first, a), (second, b) = filled(1 << 20, 2), filled(1 << 22, 3)
    spans = np.array([[1, 8, 4096], [0, 0, 1 << 20], [1, 0, 1 << 22], [0, 24, 0]], dtype=np.uint64)
    keys = np.array([3, 64, 0, 1], dtype=np.uint64)
    expected = [
        digest_span((a, b)[region][offset : offset + length], key)
        for (region, offset, length), key in zip(spans.tolist(), keys.tolist(), strict=True)
    ]
    digests = memory.digest([first, second], spans, keys)
    assert digests.dtype == np.uint64 and digests.tolist() == expected
    assert memory.digest([first], spans[:0], keys[:0]).tolist() == []


def test_memory_that_torch_did_not_allocate_is_reached_by_its_address(memory: CudaMemory) -> None:
    region, raw = filled(1 << 16, 4)
    foreign = Region(0, region.address + 64, (1 << 16) - 64, DEVICE)
    assert device_bytes(foreign).data_ptr() == foreign.address
    spans, keys = np.array([[0, 0, foreign.nbytes]], dtype=np.uint64), np.array([8], dtype=np.uint64)
    assert memory.digest([foreign], spans, keys).tolist() == [digest_span(raw[64:], 8)]


def test_spans_outside_a_region_and_memory_of_other_devices_are_refused(memory: CudaMemory) -> None:
    region, _ = filled(4096, 5)
    with pytest.raises(TransferError, match="outside region"):
        memory.copy(region, 4096 - 8, memoryview(bytearray(16)), to_device=False)
    with pytest.raises(TransferError, match="outside region"):
        memory.digest([region], np.array([[0, 4096, 8]], np.uint64), np.zeros(1, np.uint64))
    host = bytearray(64)
    with pytest.raises(TransferError, match="memory of cpu, not of cuda:0"):
        memory.copy(Region(0, 0, 64, "cpu", memoryview(host)), 0, memoryview(host), to_device=False)


def test_threads_copy_and_digest_at_once(memory: CudaMemory) -> None:
    nbytes = 3 * CHUNK + 8
    region, _ = filled(8 * nbytes, 6)

    def work(part: int) -> bool:
        good = True
        for turn in range(5):
            raw = noise(nbytes, 100 * part + turn)
            memory.copy(region, part * nbytes, memoryview(raw), to_device=True)
            memory.fence()
            span = np.array([[0, part * nbytes, nbytes]], dtype=np.uint64)
            good &= memory.digest([region], span, np.array([turn], np.uint64)).tolist() == [digest_span(raw, turn)]
            back = np.empty_like(raw)
            memory.copy(region, part * nbytes, memoryview(back), to_device=False)
            good &= bool(np.array_equal(back, raw))
        return good

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


def test_transfers_do_not_wait_behind_a_step_and_later_steps_see_what_they_wrote(memory: CudaMemory) -> None:
    region, _ = filled(CHUNK, 7)
    raw = noise(CHUNK, 8)
    torch.cuda._sleep(4_000_000_000)  # about two seconds on the compute stream
    ran_on = torch.cuda.Event()
    ran_on.record()
    memory.copy(region, 0, memoryview(raw), to_device=True)
    memory.fence()
    digests = memory.digest([region], np.array([[0, 0, CHUNK]], np.uint64), np.zeros(1, np.uint64))
    waited = ran_on.query()
    seen = device_bytes(region).clone()
    assert not waited, "the step was still running when all of it was done"
    assert digests.tolist() == [digest_span(raw, 0)]
    assert np.array_equal(seen.cpu().numpy(), raw)


def test_blocks_are_staged_through_the_hosts_mirror(memory: CudaMemory) -> None:
    region, raw = filled(8 * SHAPE.nbytes, 9)
    pool = Pool(region, SHAPE)
    staging = Staging(ScriptedBackend({}), [pool], memory)
    (mirror,) = staging.regions()
    assert staging.active and mirror.buffer is not None
    mirrored = np.frombuffer(mirror.buffer, dtype=np.uint8).reshape(8, -1)
    spans = block_spans(pool, 0, np.array([1, 4, 5]))
    staging.hold(spans)
    staging.load(spans)
    for block in (1, 4, 5):
        assert np.array_equal(mirrored[block], raw.reshape(8, -1)[block])
    mirrored[4] = 7
    staging.store(spans)
    staging.release(spans)
    now = device_bytes(region).cpu().numpy().reshape(8, -1)
    assert (now[4] == 7).all() and np.array_equal(now[[1, 5]], raw.reshape(8, -1)[[1, 5]])


def rate(nbytes: int, run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    for _ in range(5):
        run()
    return 5 * nbytes / (time.perf_counter() - start) / 1e9


def test_copies_keep_a_useful_pace(memory: CudaMemory, capsys: pytest.CaptureFixture[str]) -> None:
    nbytes = 256 << 20
    region, raw = filled(nbytes, 10)
    view = memoryview(raw)
    up = rate(nbytes, lambda: memory.copy(region, 0, view, to_device=True))
    down = rate(nbytes, lambda: memory.copy(region, 0, view, to_device=False))
    with capsys.disabled():
        print(f"\n  one thread copies {up:.1f} GB/s to the device, {down:.1f} GB/s from it")
    assert min(up, down) > 1
