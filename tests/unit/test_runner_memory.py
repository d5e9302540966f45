"""The KV pool's size and place, the runner's host memory, and how a step's inputs are laid out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pd.abc import DeviceMemory, Region
from pd.errors import ConfigError, TransferError
from pd.messages import Admit, StepOrder
from pd.runner.cuda_memory import device_bytes
from pd.runner.inputs import RequestTable, build_inputs
from pd.runner.kv_pool import DEFAULT_CPU_CAP, KvPool, allocate_region, count_blocks, free_memory
from pd.runner.memory import HostMemory
from pd.transfer.digest import DigestGeometry, digest_block, digest_span
from pd.types import BlockShape, SamplingParams
from tests.worker_driver import i32, i64

SHAPE = BlockShape(tokens=16, kv_heads=2, layers=3, head_dim=8, itemsize=4)
GIB = 1 << 30


def blocks_of(tokens: int = 0, fraction: float = 0.0, free: int = 8 * GIB) -> int:
    return count_blocks(SHAPE, max_total_tokens=tokens, fraction=fraction, free_bytes=free)


def test_the_pools_size_is_what_was_asked_for_plus_the_scratch_block() -> None:
    assert blocks_of(tokens=160) == 11
    assert blocks_of(tokens=161) == 12
    assert blocks_of(tokens=1) == 2


def test_without_a_size_the_pool_takes_a_bounded_share_of_free_memory() -> None:
    assert blocks_of(free=GIB) == int(0.15 * GIB) // SHAPE.nbytes
    assert blocks_of(free=1000 * GIB) == DEFAULT_CPU_CAP // SHAPE.nbytes
    assert blocks_of(fraction=0.5, free=1000 * GIB) == 500 * GIB // SHAPE.nbytes


def test_a_pool_that_cannot_be_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="--max-total-tokens: 1000000 tokens need"):
        blocks_of(tokens=1_000_000, free=1 << 20)
    with pytest.raises(ConfigError, match="--mem-fraction-static"):
        blocks_of(free=1000)


def test_free_memory_respects_a_containers_limit(tmp_path: Path) -> None:
    unlimited = free_memory(tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_memory(tmp_path) == 3000
    (tmp_path / "memory.current").write_text("6000\n")
    assert free_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == pytest.approx(unlimited, rel=0.5)


def test_the_pool_lies_in_the_backends_memory_where_it_supplies_some() -> None:
    asked: list[tuple[int, str]] = []
    supplied = bytearray(4 * SHAPE.nbytes)

    def supply(nbytes: int, device: str) -> Region:
        asked.append((nbytes, device))
        return Region(0, 1, nbytes, "cpu", memoryview(supplied))

    pool = KvPool(allocate_region(4 * SHAPE.nbytes, supply), SHAPE, 4, torch.float32)
    assert asked == [(4 * SHAPE.nbytes, "cpu")]
    pool.tensor[2, 1, 0, 1, 3, 5] = 7.0
    # [block, kv_head, layer, k|v, token, head_dim], contiguous
    index = ((((2 * 2 + 1) * 3 + 0) * 2 + 1) * 16 + 3) * 8 + 5
    assert np.frombuffer(supplied, np.float32)[index] == 7.0
    assert pool.layers[0].v[2, 1, 3, 5] == 7.0


def test_memory_that_is_too_small_or_not_the_hosts_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot hold"):
        allocate_region(64, lambda nbytes, device: Region(0, 1, 32, "cpu", memoryview(bytearray(32))))
    with pytest.raises(ConfigError, match="cannot hold"):
        allocate_region(64, lambda nbytes, device: Region(0, 1, 64, "cuda:0"))


def device_region(nbytes: int) -> Region:
    """What a backend supplies for a GPU, as far as that can be without one: the tensor is larger than the region."""
    owner = torch.zeros(nbytes // 4 + 32, dtype=torch.float32)
    return Region(0, owner.data_ptr() + 64, nbytes, "cuda:1", owner=owner)


def test_a_pool_on_a_device_lies_in_the_backends_memory_there() -> None:
    asked: list[tuple[int, str]] = []

    def supply(nbytes: int, device: str) -> Region:
        asked.append((nbytes, device))
        return device_region(nbytes)

    pool = KvPool(allocate_region(4 * SHAPE.nbytes, supply, "cuda:1"), SHAPE, 4, torch.float32)
    assert asked == [(4 * SHAPE.nbytes, "cuda:1")]
    assert pool.tensor.data_ptr() == pool.region.address == pool.region.owner.data_ptr() + 64
    pool.tensor[3, 1, 2, 1, 15, 7] = 7.0
    assert device_bytes(pool.region).view(torch.float32)[-1] == 7.0
    assert pool.region.owner[:16].eq(0).all() and pool.region.owner[-16:].eq(0).all()


def test_memory_of_another_device_than_the_pools_is_refused() -> None:
    for device in ("cpu", "cuda:0"):
        with pytest.raises(ConfigError, match="cannot hold"):
            allocate_region(64, lambda nbytes, device: device_region(nbytes), device)
    with pytest.raises(ConfigError, match="cannot hold"):
        allocate_region(64, lambda nbytes, device: device_region(32), "cuda:1")


def test_own_memory_is_page_aligned_zeroed_and_known_by_its_address() -> None:
    region = allocate_region(3 * SHAPE.nbytes, lambda nbytes, device: None)
    pool = KvPool(region, SHAPE, 3, torch.float32)
    assert region.address == pool.tensor.data_ptr() and region.address % 4096 == 0
    assert not pool.tensor.any() and pool.bytes.nbytes == region.nbytes


def test_a_copy_takes_the_first_tokens_of_every_head_and_layer() -> None:
    pool = KvPool(allocate_region(3 * SHAPE.nbytes), SHAPE, 3, torch.float32)
    pool.tensor[1].normal_()
    pool.copy(1, 2, 5)
    assert torch.equal(pool.tensor[2, ..., :5, :], pool.tensor[1, ..., :5, :])
    assert not pool.tensor[2, ..., 5:, :].any()


def test_host_memory_copies_and_digests_spans_within_bounds() -> None:
    memory: DeviceMemory = HostMemory()
    region = allocate_region(2 * SHAPE.nbytes)
    assert region.buffer is not None
    words = np.frombuffer(region.buffer, np.uint64)
    words[:] = np.random.default_rng(0).integers(0, 2**63, len(words), dtype=np.uint64)
    size = SHAPE.nbytes
    spans = np.array([[0, size, size], [0, 64, 128]], dtype=np.uint64)
    digests = memory.digest([region], spans, np.array([0, 8], dtype=np.uint64))
    block = np.frombuffer(region.buffer, np.uint8)[size:]
    assert digests.tolist() == [
        digest_block(block, SHAPE.tokens, DigestGeometry(SHAPE)),
        digest_span(region.buffer[64:192], 8),
    ]
    out = bytearray(16)
    memory.copy(region, 8, memoryview(out), to_device=False)
    assert out == bytes(region.buffer[8:24])
    memory.copy(region, 0, memoryview(b"x" * 16), to_device=True)
    assert bytes(region.buffer[:16]) == b"x" * 16
    memory.fence()
    with pytest.raises(TransferError, match="outside region"):
        memory.copy(region, region.nbytes - 8, memoryview(out), to_device=True)
    with pytest.raises(TransferError, match="not host memory"):
        memory.copy(Region(1, 1, 64, "cuda:0"), 0, memoryview(out), to_device=True)


def test_decode_rows_are_grouped_by_length_and_keep_their_slots() -> None:
    table = RequestTable(num_blocks=10_000)
    lengths = {1: 3, 2: 400, 3: 5, 4: 90, 5: 2000, 6: 100, 7: 64}
    free = iter(range(1, 10_000))
    admits = []
    for key, length in lengths.items():
        blocks = [next(free) for _ in range(math.ceil(length / 4))]
        computed = length - 1 if key != 7 else 60  # request 7 computes four tokens
        admits.append(Admit(key, 1, i32(range(length)), length, computed, i32(blocks), SamplingParams()))
    counts = [1, 1, 1, 1, 1, 1, 4]
    order = StepOrder(1, i64(list(lengths)), i32(counts), b"\1" * 7, admit=admits)
    table.apply(order)
    inputs = build_inputs(table.rows(order), page_size=4)
    batch = inputs.batch
    assert inputs.tokens.tolist() == [2, 399, 4, 89, 1999, 99, 60, 61, 62, 63]
    assert batch.positions.tolist() == inputs.tokens.tolist()
    assert (batch.offsets == batch.positions % 4).all()
    for place, (key, position) in enumerate(zip([1, 2, 3, 4, 5, 6, 7, 7, 7, 7], batch.positions.tolist(), strict=True)):
        assert batch.blocks[place] == table.requests[key].blocks.view[position // 4]
    assert sorted(row for group in batch.decode for row in group.rows.tolist()) == [0, 1, 2, 3, 4, 5]
    for group in batch.decode:
        blocks_used = -(-group.lengths // 4)
        assert int(blocks_used.max()) == group.tables.shape[1] < 2 * int(blocks_used.min()) + 1
        for row, ids, length in zip(group.rows.tolist(), group.tables.tolist(), group.lengths.tolist(), strict=True):
            own = table.requests[row + 1].blocks.view.tolist()
            assert ids[: len(own)] == own and set(ids) == set(own) and length == lengths[row + 1]
    (span,) = batch.prompts
    assert (span.start, span.count, span.context) == (6, 4, 64)
    assert span.table.tolist() == table.requests[7].blocks.view.tolist()


def test_a_step_without_rows_has_empty_inputs() -> None:
    inputs = build_inputs([], page_size=4)
    assert inputs.tokens.shape == (0,) and not inputs.batch.decode and not inputs.batch.prompts
