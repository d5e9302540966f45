"""How the work of attention is divided."""

from __future__ import annotations

import itertools

import pytest

from pd.kernels.attention_plan import SPLITS, DecodeSplit, decode_split

H200 = 132


@pytest.mark.parametrize(
    ("rows", "split"),
    [
        (1, DecodeSplit(64, 64)),
        (2, DecodeSplit(32, 64)),
        (8, DecodeSplit(16, 128)),
        (32, DecodeSplit(8, 512)),
        (64, DecodeSplit(8, 1024)),
        (256, DecodeSplit(8, 2048)),
        (4096, DecodeSplit(8, 2048)),
    ],
)
def test_contexts_are_divided_the_more_the_fewer_rows_there_are(rows: int, split: DecodeSplit) -> None:
    assert decode_split(rows, 8, H200) == split


def test_fewer_heads_or_more_processors_are_as_fewer_rows() -> None:
    assert decode_split(64, 1, H200) == decode_split(8, 8, H200) == decode_split(4, 8, H200 // 2)


def test_the_longest_context_keeps_every_processor_busy_at_any_batch() -> None:
    for rows in range(1, 300):
        split = decode_split(rows, 8, H200)
        assert rows * 8 * min(split.parts, 131072 // split.least) >= 3.8 * H200


def test_more_rows_never_mean_shorter_parts() -> None:
    assert all(a[0] < b[0] and a[1].least <= b[1].least for a, b in itertools.pairwise(SPLITS))
