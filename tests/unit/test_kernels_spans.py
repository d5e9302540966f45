"""Digests and copies of spans on the CPU, what they refuse, and how spans are put into launches."""

from __future__ import annotations

import itertools
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from pd.kernels.block_copy import copy_and_digest, copy_share, copy_spans, plan_share
from pd.kernels.digest import digest_spans
from pd.kernels.spans import TILE_ROWS, Form, as_words, launches
from pd.transfer import digest as host

SIZE = 40_000


def memory(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8))


def table(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


SPANS = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 3000), st.integers(0, 100_000)).map(
        lambda span: (span[0] * 8, span[1] * 8, span[2])
    ),
    max_size=5,
)


@given(SPANS)
def test_digests_are_those_of_the_transfer_core(rows: list[tuple[int, int, int]]) -> None:
    spans, raw = table(*rows), memory(1)
    digests = digest_spans(raw, spans).numpy().view(np.uint64)
    expected = host.digest_spans(raw.numpy(), spans[:, :2].astype(np.uint64), spans[:, 2].astype(np.uint64))
    assert digests.tolist() == expected.tolist()


def test_a_copy_writes_exactly_the_spans_and_digests_them_on_request() -> None:
    source, target = memory(2), memory(3)
    spans = table((0, 800, 8), (16, 0, 800), (1600, 20_000, 16_384), (8, 16, 0))
    expected = target.clone()
    for at, to, length in spans.tolist():
        expected[to : to + length] = source[at : at + length]
    plain = target.clone()
    copy_spans(source, plain, spans)
    assert torch.equal(plain, expected)
    positions = np.array([0, 70, 128, 3])
    digests = copy_and_digest(source, target, spans, positions)
    assert torch.equal(target, expected)
    assert torch.equal(digests, digest_spans(source, np.column_stack((spans[:, [0, 2]], positions))))


@given(SPANS, st.lists(st.floats(0, 1), max_size=3))
def test_a_shared_copy_is_planned_to_the_last_tile(rows: list[tuple[int, int, int]], cuts: list[float]) -> None:
    source, target = memory(6), torch.zeros(SIZE, dtype=torch.uint8)
    starts = np.cumsum([0, *(length for _, length, _ in rows)])
    spans = table(*((at, int(to), length) for (at, length, _), to in zip(rows, starts, strict=False)))
    spans = spans[(spans[:, 0] + spans[:, 2] <= SIZE) & (spans[:, 1] + spans[:, 2] <= SIZE)]
    positions = np.array([word for *_, word in rows[: len(spans)]], dtype=np.int64)
    plan = np.zeros((5, len(spans) + 1), dtype=np.int64)
    share = plan_share(as_words(source), as_words(target), spans, positions, plan)
    ends = np.cumsum(
        [
            -(-(length // 8 + at % 64) // (64 * TILE_ROWS)) if length else 0
            for length, at in zip(spans[:, 2], positions, strict=True)
        ]
    )
    assert share.tiles == (ends[-1] if len(ends) else 0) and plan[4, 1:].tolist() == ends.tolist()
    digests = torch.zeros(len(spans), dtype=torch.int64)
    bounds = [0, *sorted(int(cut * share.tiles) for cut in cuts), share.tiles]
    for tiles in itertools.pairwise(bounds):
        copy_share(as_words(source), as_words(target), share, torch.from_numpy(plan), digests, 3, Form(32, 4), tiles)
    expected = torch.zeros(SIZE, dtype=torch.uint8)
    assert torch.equal(digests, copy_and_digest(source, expected, spans, positions)) and torch.equal(target, expected)


@pytest.mark.parametrize("span", [(4, 8), (0, 12), (0, SIZE + 8), (SIZE, 8), (-8, 8), (16, -8)])
def test_spans_that_are_no_whole_words_inside_the_memory_are_refused(span: tuple[int, int]) -> None:
    offset, length = span
    with pytest.raises(ValueError, match="span"):
        digest_spans(memory(4), table((offset, length, 0)))
    with pytest.raises(ValueError, match="source: a span"):
        copy_spans(memory(4), torch.zeros(4 * SIZE), table((offset, 0, length)))
    with pytest.raises(ValueError, match="a span"):
        copy_spans(torch.zeros(4 * SIZE), memory(4), table((0, offset, length)))


def test_memory_that_is_no_row_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        digest_spans(torch.zeros(8, 8).t(), table((0, 8, 0)))
    with pytest.raises(ValueError, match="start at a multiple of 8"):
        digest_spans(memory(5)[4:], table((0, 8, 0)))


@given(st.lists(st.integers(0, 5000), max_size=60))
def test_every_span_is_in_one_launch_and_most_programs_have_work(chunks: list[int]) -> None:
    needed = np.array(chunks, dtype=np.int64)
    seen: list[int] = []
    for members, most in launches(needed):
        seen += members.tolist()
        assert most == needed[members].max()
        assert needed[members].sum() * 2 > most * len(members)
    assert sorted(seen) == np.flatnonzero(needed).tolist()


def test_the_cpu_needs_no_triton() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None  # importing it is an ImportError from here on
        import numpy, torch
        import pd.runner.service
        from pd.kernels.block_copy import copy_and_digest
        words = torch.arange(8)
        copy_and_digest(words, torch.zeros(8, dtype=torch.int64), numpy.array([[0, 0, 32]]), numpy.zeros(1, int))
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
