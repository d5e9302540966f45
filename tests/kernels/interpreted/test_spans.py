"""Copies and digests of spans by the interpreted kernel, against numpy on the host."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pd.kernels import reference, spans_triton
from pd.kernels.spans import TILE_ROWS, Form, share_table, word_alignment
from pd.kernels.spans_triton import run_pass, run_share
from pd.transfer.digest import RUN, digest_spans

TILE = spans_triton.ROWS * RUN
MIXED = [
    # offset in source, in target, length, position of the first word: in words
    (3, 10, 1, 0),
    (64, 100, 63, 1),
    (128, 200, 64, 64),
    (201, 301, 130, 63),
    (400, 500, TILE, 64 * 5),
    (400 + TILE, 600 + TILE, TILE + 1, 64 * 7 + 3),
    (400 + 3 * TILE, 700 + 3 * TILE, 2 * TILE + 77, 2**20 + 17),
    (5, 0, 0, 9),
]
EVEN = [(2, 4, 126, 64), (256, 640, TILE + 64, 2), (256 + 2 * TILE, 1024 + 2 * TILE, TILE, 640)]


def words(count: int, seed: int) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)
    return torch.from_numpy(raw.view(np.int64))


def host_digests(source: torch.Tensor, table: np.ndarray) -> list[int]:
    spans = (table[:, [0, 2]] * 8).astype(np.uint64)
    return digest_spans(source.numpy().view(np.uint8), spans, table[:, 3].astype(np.uint64)).tolist()


@pytest.mark.parametrize("rows", [MIXED, EVEN], ids=["odd words", "even words"])
@pytest.mark.parametrize("copies", [False, True], ids=["reads", "copies"])
def test_digests_are_those_of_the_host_bit_for_bit(rows: list[tuple[int, ...]], copies: bool) -> None:
    table = np.array(rows, dtype=np.int64)
    source, target = words(8 * TILE, 1), words(8 * TILE, 2)
    expected = target.clone()
    digests = torch.zeros(len(table), dtype=torch.int64)
    run_pass(source, target if copies else None, table, digests)
    assert digests.numpy().view(np.uint64).tolist() == host_digests(source, table)
    assert torch.equal(digests, reference.digest_spans(source, table))
    if copies:
        reference.copy_spans(source, expected, table)
    assert torch.equal(target, expected), "exactly the spans were written"


def test_a_copy_without_digests_writes_exactly_the_spans() -> None:
    table = np.array(MIXED, dtype=np.int64)
    source, target = words(8 * TILE, 3), words(8 * TILE, 4)
    expected = target.clone()
    reference.copy_spans(source, expected, table)
    run_pass(source, target, table, None)
    assert torch.equal(target, expected)


def test_no_spans_are_no_launch() -> None:
    source = words(8, 5)
    digests = torch.full((0,), 7, dtype=torch.int64)
    run_pass(source, None, np.zeros((0, 4), dtype=np.int64), digests)
    run_pass(source, source, np.zeros((2, 4), dtype=np.int64), None)
    assert torch.equal(source, words(8, 5))


def test_a_base_at_an_odd_word_is_read_and_written_word_by_word() -> None:
    table = np.array(EVEN, dtype=np.int64)
    source, target = words(8 * TILE + 1, 6)[1:], words(8 * TILE + 1, 7)[1:]
    digests = torch.zeros(len(table), dtype=torch.int64)
    run_pass(source, target, table, digests)
    assert digests.numpy().view(np.uint64).tolist() == host_digests(source, table)
    for at, to, count, _ in table.tolist():
        assert torch.equal(target[to : to + count], source[at : at + count])


GAPS = MIXED[-1:] + EVEN + MIXED[-1:]


@pytest.mark.parametrize("rows", [TILE_ROWS, 2 * TILE_ROWS])
@pytest.mark.parametrize("cuts", [(), (0.5,), (0.1, 0.2, 0.9)], ids=["whole", "halves", "slices"])
@pytest.mark.parametrize("programs", [1, 3, 100])
@pytest.mark.parametrize("spans", [MIXED, EVEN, GAPS], ids=["odd words", "even words", "gaps"])
def test_however_spans_are_shared_all_are_copied_and_digested_once(spans, programs: int, cuts, rows: int) -> None:
    spans = np.array(spans, dtype=np.int64)
    source, target = words(8 * TILE, 8), words(8 * TILE, 9)
    expected = target.clone()
    reference.copy_spans(source, expected, spans)
    table = np.full((5, len(spans) + 1), 7, dtype=np.int64)
    tiles = share_table(table, spans.T)
    alignment = word_alignment(spans.T, source, target)
    digests = torch.zeros(len(spans), dtype=torch.int64)
    bounds = [0, *(int(cut * tiles) for cut in cuts), tiles]
    for some in itertools.pairwise(bounds):
        count = min(programs, some[1] - some[0])
        if count:
            run_share(source, target, digests, torch.from_numpy(table), alignment, some, count, Form(rows, 4))
    assert torch.equal(target, expected), "exactly the spans were written"
    assert digests.numpy().view(np.uint64).tolist() == host_digests(source, spans)


def test_blocks_are_found_without_a_search() -> None:
    """As many tiles in every span; the first and the last one of each span belong to it."""
    count, size = 5, 3 * TILE
    spans = np.array([[i * size, (count - 1 - i) * size, size, 0] for i in range(count)], dtype=np.int64)
    source, target = words(count * size, 10), words(count * size, 11)
    table = np.zeros((5, count + 1), dtype=np.int64)
    tiles = share_table(table, spans.T)
    digests = torch.zeros(count, dtype=torch.int64)
    run_share(source, target, digests, torch.from_numpy(table), 2, (0, tiles), tiles, Form(TILE_ROWS, 4))
    assert torch.equal(target.view(count, size), source.view(count, size).flip(0))
    assert digests.numpy().view(np.uint64).tolist() == host_digests(source, spans)
