"""Which way bytes go, and how a post is cut into pulls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd.abc import Region
from pd.transfer.direct import way_to_offer
from pd.transfer.direct_device import batches
from pd.transfer.direct_ledger import cut

SIZE = 1 << 20


@pytest.mark.parametrize(
    ("near", "here", "there", "shareable", "way"),
    [
        (True, "cpu", "cpu", True, "shm"),
        (True, "cuda", "cuda", True, "device"),
        (True, "cuda", "cuda", False, "stream"),
        (True, "cpu", "cpu", False, "stream"),
        (True, "cuda", "cpu", True, "stream"),
        (True, "cpu", "cuda", True, "stream"),
        (True, "cuda", "npu", True, "stream"),
        (False, "cuda", "cuda", True, "stream"),
        (False, "cpu", "cpu", True, "stream"),
    ],
)
def test_memory_is_shared_between_equals_of_one_host(near, here, there, shareable, way):
    assert way_to_offer(near, here, there, shareable) == way


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 400)), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(8, 4000),
    st.sampled_from([0, 512]),
)
def test_pulls_take_every_chunk_once_in_order_and_keep_to_their_bounds(rows, spans, nbytes, block):
    regions = [Region(i, 0, SIZE, "fake:0", block_bytes=block) for i in range(3)]
    table = np.array([[a, 0, b, 64 * i, 8 * n] for i, (a, b, n) in enumerate(rows)], dtype=np.uint64)
    chunks = cut(table, regions, longest=nbytes // 8 * 8)
    parts = list(batches(chunks, spans, nbytes))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(chunks.table)))
    for part in parts:
        some = chunks.table[part]
        assert 0 < len(some) <= spans
        assert len(np.unique(some[:, [0, 2]], axis=0)) == 1
        assert len(some) == 1 or some[:, 4].sum() <= nbytes
