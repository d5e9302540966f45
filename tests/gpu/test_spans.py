"""Copies and digests of spans on the GPU, against the host; and how fast they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pd.kernels.block_copy import copy_and_digest, copy_spans
from pd.kernels.digest import digest_spans
from pd.transfer import digest as host

DEVICE = "cuda:0"
MIB = 1 << 20
SIZE = 64 * MIB


def memory(seed: int, nbytes: int = SIZE) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (nbytes // 8,), generator=generator, device=DEVICE).view(torch.uint8)


def scattered(seed: int, even: bool) -> np.ndarray:
    """int64[n, 4] (offset, offset elsewhere, length, position): disjoint spans of all sizes in random places."""
    rng = np.random.default_rng(seed)
    step = 16 if even else 8
    lengths = (2 ** rng.uniform(3, 21.5, 120)).astype(np.int64) // step * step
    rows = np.zeros((len(lengths), 4), dtype=np.int64)
    rows[:, 2] = lengths
    for column in (0, 1):
        order = rng.permutation(len(lengths))
        gaps = rng.integers(0, 60, len(lengths)) * step
        ends = np.cumsum(lengths[order] + gaps)
        rows[order, column] = ends - lengths[order]
        assert ends[-1] <= SIZE
    rows[:, 3] = rng.integers(0, 1 << 20, len(lengths)) * (2 if even else 1)
    return rows


def host_digests(source: torch.Tensor, rows: np.ndarray) -> list[int]:
    raw = source.cpu().numpy()
    return host.digest_spans(raw, rows[:, [0, 2]].astype(np.uint64), rows[:, 3].astype(np.uint64)).tolist()


def unsigned(digests: torch.Tensor) -> list[int]:
    return digests.cpu().numpy().view(np.uint64).tolist()


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_digests_are_those_of_the_host_bit_for_bit(seed: int, even: bool) -> None:
    source, rows = memory(seed), scattered(seed, even)
    assert unsigned(digest_spans(source, rows[:, [0, 2, 3]])) == host_digests(source, rows)


def test_a_span_of_a_gibibyte_and_spans_of_nothing_have_their_digests() -> None:
    source = memory(7, 1024 * MIB + 64)
    rows = np.array([[8, 0, 1024 * MIB + 16, 5], [0, 0, 0, 0], [64, 0, 4 * MIB, 0], [16, 0, 0, 3]], dtype=np.int64)
    assert unsigned(digest_spans(source, rows[:, [0, 2, 3]])) == host_digests(source, rows)
    assert digest_spans(source, np.zeros((0, 3), dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_copies_write_exactly_the_spans(seed: int, even: bool, digests: bool) -> None:
    source, target, rows = memory(seed), memory(seed + 100), scattered(seed, even)
    expected = target.cpu()
    kept = source.cpu()
    for at, to, length, _ in rows.tolist():
        expected[to : to + length] = kept[at : at + length]
    if digests:
        assert unsigned(copy_and_digest(source, target, rows[:, :3], rows[:, 3])) == host_digests(source, rows)
    else:
        copy_spans(source, target, rows[:, :3])
    assert torch.equal(target.cpu(), expected) and torch.equal(source.cpu(), kept)


def test_memory_that_begins_at_an_odd_word_is_copied_and_digested() -> None:
    source, target, rows = memory(1)[8:], memory(2)[8:], scattered(3, even=True)
    rows = rows[rows[:, :3].sum(1) < SIZE - 8 * MIB]
    assert unsigned(copy_and_digest(source, target, rows[:, :3], rows[:, 3])) == host_digests(source, rows)
    for at, to, length, _ in rows.tolist():
        assert torch.equal(target[to : to + length], source[at : at + length])


def test_a_gather_and_a_scatter_give_back_what_was_there() -> None:
    pool, block = memory(4), 256 << 10
    ids = np.random.default_rng(0).permutation(SIZE // block)[:100].astype(np.int64)
    staging = torch.zeros(100 * block, dtype=torch.uint8, device=DEVICE)
    places, lengths = np.arange(100, dtype=np.int64) * block, np.full(100, block, dtype=np.int64)
    copy_spans(pool, staging, np.column_stack((ids * block, places, lengths)))
    assert torch.equal(staging.view(100, block), pool.view(-1, block)[torch.from_numpy(ids).to(DEVICE)])
    other = torch.zeros_like(pool)
    copy_spans(staging, other, np.column_stack((places, ids * block, lengths)))
    mask = torch.zeros(SIZE // block, dtype=torch.bool, device=DEVICE)
    mask[torch.from_numpy(ids).to(DEVICE)] = True
    assert torch.equal(other.view(-1, block)[mask], pool.view(-1, block)[mask])
    assert not other.view(-1, block)[~mask].any()


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Per run, on the device, the queue being full."""
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / rounds


def test_digests_run_at_the_speed_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """256 blocks of 4 MiB, scattered: against a plain copy, which moves every byte twice."""
    block, count = 4 * MIB, 256
    source = memory(5, count * block)
    target = torch.empty_like(source)
    order = np.random.default_rng(1).permutation(count).astype(np.int64) * block
    spans = np.column_stack((order, np.full(count, block), np.zeros(count, dtype=np.int64)))
    copy_rate = 2 * count * block / seconds(lambda: target.copy_(source))
    rate = count * block / seconds(lambda: digest_spans(source, spans))
    with capsys.disabled():
        print(f"\n  digest reads {rate / 1e9:.0f} GB/s; a plain copy moves {copy_rate / 1e9:.0f}")
    assert rate > 0.6 * copy_rate
