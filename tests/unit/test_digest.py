"""The digest: linear over parts, sensitive to position, blind to what is not valid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd.transfer.digest import (
    DigestGeometry,
    digest_block,
    digest_blocks,
    digest_span,
    digest_spans,
    run_keys,
    splitmix64,
    valid_runs,
)
from pd.types import BlockShape

SHAPE = BlockShape(tokens=4, kv_heads=6, layers=3, head_dim=8, itemsize=2)
MASK = (1 << 64) - 1


def reference(words: list[int], first_word: int) -> int:
    """The definition, in Python integers."""

    def key(i: int) -> int:
        z = (i + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return (z ^ (z >> 31)) | 1

    return sum(w * key((first_word + i) // 64) for i, w in enumerate(words)) & MASK


def random_bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def test_splitmix64_gives_the_published_first_output_of_seed_zero():
    assert int(splitmix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_every_key_is_odd_and_the_table_is_shared_and_read_only():
    table = run_keys(5000)
    assert np.all(table & np.uint64(1) == 1) and len(table) * 64 >= 5000
    assert run_keys(4097) is table
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=60), st.integers(0, 10_000))
def test_the_digest_is_its_definition(words, first_word):
    assert digest_span(np.array(words, np.uint64).view(np.uint8), first_word) == reference(words, first_word)


def test_a_span_longer_than_a_chunk_is_its_definition_too():
    data = random_bytes(3 * (1 << 18) + 64)
    for first_word in (0, 7, 64):
        keys = run_keys(first_word + data.size // 8)[(first_word + np.arange(data.size // 8)) // 64]
        assert digest_span(data, first_word) == int(np.dot(data.view(np.uint64), keys))


@given(st.integers(1, 39), st.integers(0, 500), st.integers(0, 99))
def test_digests_of_two_parts_add_up(cut, first_word, seed):
    data = random_bytes(40 * 8, seed)
    parts = digest_span(data[: cut * 8], first_word) + digest_span(data[cut * 8 :], first_word + cut)
    assert parts & MASK == digest_span(data, first_word)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_head_slices_of_a_block_add_up_on_separate_ranks_and_as_a_range(cut, tokens, seed):
    block = random_bytes(SHAPE.nbytes, seed)
    whole = digest_block(block, tokens, DigestGeometry(SHAPE))
    low = BlockShape(SHAPE.tokens, cut, SHAPE.layers, SHAPE.head_dim, SHAPE.itemsize)
    high = BlockShape(SHAPE.tokens, SHAPE.kv_heads - cut, SHAPE.layers, SHAPE.head_dim, SHAPE.itemsize)
    ranks = digest_block(block[: low.nbytes], tokens, DigestGeometry(low, 0))
    ranks += digest_block(block[low.nbytes :], tokens, DigestGeometry(high, cut))
    ranges = digest_block(block, tokens, DigestGeometry(SHAPE), (0, cut))
    ranges += digest_block(block, tokens, DigestGeometry(SHAPE), (cut, SHAPE.kv_heads))
    assert ranks & MASK == whole
    assert ranges & MASK == whole


@given(st.integers(0, 39), st.integers(1, 255), st.integers(0, 7))
def test_any_change_of_one_byte_changes_the_digest(word, flip, byte):
    data = random_bytes(40 * 8)
    before = digest_span(data, 0)
    data[word * 8 + byte] ^= flip
    assert digest_span(data, 0) != before


@given(st.integers(0, 19), st.integers(0, 19))
def test_two_different_runs_that_change_places_change_the_digest(i, j):
    runs = np.arange(20 * 64, dtype=np.uint64).reshape(20, 64) ** 2
    before = digest_span(runs.reshape(-1).view(np.uint8), 0)
    runs[[i, j]] = runs[[j, i]]
    assert (digest_span(runs.reshape(-1).view(np.uint8), 0) != before) == (i != j)


@given(st.integers(1, 255))
def test_bytes_that_moved_change_the_digest(shift):
    words = splitmix64(np.arange(512, dtype=np.uint64))
    assert digest_span(np.roll(words, shift).view(np.uint8), 0) != digest_span(words.view(np.uint8), 0)


def test_equal_bytes_at_another_position_have_another_digest():
    data = random_bytes(512)
    assert digest_span(data, 0) != digest_span(data, 64)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_partial_block_ignores_exactly_the_tokens_that_are_not_valid(tokens):
    geometry = DigestGeometry(SHAPE, first_head=2)
    block = random_bytes(SHAPE.nbytes)
    before = digest_block(block, tokens, geometry)
    view = block.reshape(SHAPE.kv_heads, SHAPE.layers, 2, SHAPE.tokens, SHAPE.head_dim * SHAPE.itemsize)
    view[:, :, :, tokens:] ^= 255
    assert digest_block(block, tokens, geometry) == before
    view[-1, -1, -1, tokens - 1, -1] ^= 1
    assert digest_block(block, tokens, geometry) != before


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("heads", [(0, 6), (1, 3), (5, 6)])
def test_the_runs_of_a_block_digest_to_the_block(tokens, heads):
    geometry = DigestGeometry(SHAPE, first_head=1)
    block = random_bytes(SHAPE.nbytes)
    runs = valid_runs(geometry, tokens, heads)
    parts = digest_spans(block, runs[:, :2], runs[:, 2])
    assert int(np.add.reduce(parts)) == digest_block(block, tokens, geometry, heads)


def test_blocks_of_a_pool_are_digested_in_the_order_asked():
    pool = random_bytes(SHAPE.nbytes * 5)
    geometry = DigestGeometry(SHAPE)
    got = digest_blocks(memoryview(pool), SHAPE.nbytes, [3, 0, 3], [4, 2, 1], geometry)
    want = [
        digest_block(pool[b * SHAPE.nbytes : (b + 1) * SHAPE.nbytes], t, geometry) for b, t in ((3, 4), (0, 2), (3, 1))
    ]
    assert got.dtype == np.uint64
    assert got.tolist() == want


def test_a_layout_whose_rows_are_no_whole_words_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        DigestGeometry(BlockShape(4, 1, 1, 3, 2))


def test_a_span_that_is_no_whole_number_of_words_is_refused():
    with pytest.raises(ValueError, match="whole number"):
        digest_span(b"123", 0)
