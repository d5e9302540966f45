"""What may land: grants, cuts at block boundaries, and the copy loop that looks at the epoch and the grant."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd.abc import Region
from pd.errors import ProtocolError, TransferError
from pd.transfer.digest import CHUNK, digest_span
from pd.transfer.direct_ledger import Ledger, cut, within
from pd.transfer.direct_shm import Target, copy_chunks
from pd.transfer.direct_tcp import HostSource, StreamSource

SIZE = 1 << 16


def region(index=0, nbytes=SIZE, block_bytes=0, first_word=0):
    raw = np.zeros(nbytes, dtype=np.uint8)
    return Region(index, int(raw.ctypes.data), nbytes, "cpu", raw.data, raw, block_bytes, first_word)


def spans(*rows):
    return np.array(rows, dtype=np.uint64).reshape(-1, 5)


def local(*ranges, where=0):
    """Grant spans from [offset, length]."""
    return spans(*([where, offset, 0, 0, length] for offset, length in ranges))


def covers(ledger, tag, offset, length, where=0, sender="P"):
    grant = ledger.find(sender, tag)
    columns = (np.array([value], dtype=np.int64) for value in (where, offset, length))
    return grant is not None and grant.live and grant.covers(*columns)


# --- grants ---


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), min_size=1, max_size=8), st.integers(0, 40),
       st.integers(1, 10))  # fmt: skip
def test_a_span_is_granted_exactly_when_all_its_bytes_are(ranges, offset, length):
    ledger = Ledger([region(nbytes=64)])
    cut_at = len(ranges) // 2
    for part in (ranges[:cut_at], ranges[cut_at:]):  # a second grant of the same tag adds to the first
        ledger.grant(1, local(*part), "P")
    allowed = {byte for start, count in ranges for byte in range(start, start + count)}
    assert covers(ledger, 1, offset, length) == all(byte in allowed for byte in range(offset, offset + length))


def test_a_grant_is_for_one_region_one_tag_and_one_sender():
    ledger = Ledger([region(0), region(1)])
    ledger.grant(1, local((0, 64), where=1), "P")
    assert covers(ledger, 1, 0, 64, where=1)
    assert not covers(ledger, 1, 0, 64, where=0)
    assert not covers(ledger, 2, 0, 64, where=1)
    assert not covers(ledger, 1, 0, 64, where=1, sender="Q")


@pytest.mark.parametrize(("where", "offset", "length"), [(0, SIZE - 8, 16), (2, 0, 8), (0, 0, 0), (0, 2**64 - 8, 16)])
def test_a_grant_outside_the_regions_is_refused(where, offset, length):
    with pytest.raises(TransferError):
        Ledger([region(0), region(1)]).grant(1, local((offset, length), where=where), "P")


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.sampled_from([1, 2]))
def test_bounds_are_those_of_exact_arithmetic(where, offset, length, regions):
    columns = [np.array([value], dtype=np.uint64) for value in (where, offset, length)]
    sizes = np.array([100, 200][:regions], dtype=np.uint64)
    expected = where < regions and 0 < length and offset + length <= (100, 200)[where]
    assert within(*columns, sizes) == expected


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 210), st.integers(0, 210)), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
)
def test_bounds_near_the_end_of_a_region_are_exact(rows, regions):
    columns = np.array(rows, dtype=np.uint64).T
    sizes = (100, 200)[:regions]
    expected = all(where < regions and 0 < length and offset + length <= sizes[where] for where, offset, length in rows)
    assert within(*columns, np.array(sizes, dtype=np.uint64)) == expected


def test_revoke_waits_for_a_copy_and_says_no_when_it_does_not_end():
    ledger = Ledger([region()])
    ledger.grant(1, local((0, 64)), "P")
    grant = ledger.find("P", 1)
    with grant.lock:
        assert not ledger.revoke(1, "P", timeout=0.01)
        assert not grant.live  # whoever copies stops after this span
    assert ledger.revoke(1, "P", timeout=0.01)
    assert ledger.find("P", 1) is None
    assert ledger.revoke(1, "P", timeout=0.0)


def test_an_expelled_sender_has_no_grants_gets_none_and_leaves_no_digests():
    ledger = Ledger([region(block_bytes=64)])
    ledger.grant(1, local((0, 64)), "P")
    ledger.grant(1, local((0, 64)), "Q")
    chunks = cut(spans([0, 0, 0, 0, 64]), [region(block_bytes=64)])
    ledger.record("P", 1, chunks.applied([np.uint64(5)]))
    assert ledger.expel("P", 1.0)
    assert ledger.find("P", 1) is None and covers(ledger, 1, 0, 64, sender="Q")
    assert not len(ledger.take(1, "P"))
    ledger.record("P", 1, chunks.applied([np.uint64(5)]))
    assert not len(ledger.take(1, "P"))
    with pytest.raises(TransferError, match="expelled"):
        ledger.grant(2, local((0, 64)), "P")


def test_a_post_that_is_here_before_its_grant_waits_for_it():
    ledger = Ledger([region()])
    found = []
    thread = threading.Thread(target=lambda: found.append(ledger.find("P", 7, patience=20.0)))
    thread.start()
    ledger.grant(7, local((0, 64)), "P")
    thread.join(20)
    assert found == [ledger.find("P", 7)] and found[0] is not None


@pytest.mark.parametrize("end", [lambda ledger: ledger.revoke(7, "P", 1.0), lambda ledger: ledger.expel("P", 1.0)])
def test_a_post_whose_grant_was_taken_back_does_not_wait(end):
    ledger = Ledger([region()])
    end(ledger)
    began = time.monotonic()
    assert ledger.find("P", 7, patience=20.0) is None
    assert time.monotonic() - began < 10


def test_a_tag_that_is_granted_again_after_a_revoke_starts_clean():
    ledger = Ledger([region()])
    ledger.grant(1, local((0, 64)), "P")
    ledger.revoke(1, "P", 1.0)
    ledger.grant(1, local((128, 64)), "P")
    assert not covers(ledger, 1, 0, 64) and covers(ledger, 1, 128, 64)


# --- cutting ---


@settings(max_examples=60)
@given(st.integers(0, 40), st.integers(1, 60), st.integers(0, 5))
def test_pieces_follow_the_blocks_and_cover_the_span_once(start, words, first_word):
    one = region(nbytes=1 << 12, block_bytes=80, first_word=first_word)
    np.frombuffer(one.buffer, np.uint8)[:] = np.random.default_rng(start).integers(0, 256, 1 << 12, dtype=np.uint8)
    chunks = cut(spans([0, 0, 0, start * 8, words * 8]), [one])
    at = start * 8
    for _, offset, length in chunks.pieces.tolist():
        assert offset == at and offset // 80 == (offset + length - 1) // 80
        at += length
    assert at == (start + words) * 8
    memory = np.frombuffer(one.buffer, np.uint8)
    for offset, length, word in zip(chunks.offset, chunks.length, chunks.word, strict=True):
        assert word == first_word + offset % 80 // 8
        assert length <= CHUNK and memory[offset : offset + length].size == length


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=6),
    st.sampled_from([(80, 80), (64, 64), (80, 64), (4096, 4096)]),
    st.sampled_from([0, 16, 48]),
)
def test_posts_over_regions_of_like_and_unlike_blocks_are_cut_alike(rows, blocks, longest):
    regions = [region(i, 1 << 12, block, first_word=3 * i) for i, block in enumerate(blocks)]
    chunks = cut(spans(*([5, 8 * at, where, 8 * at, 8 * words] for where, at, words in rows)), regions, longest)
    pieces = []
    for where, at, words in rows:
        edges = sorted({8 * at, *range(0, 1 << 12, blocks[where]), 8 * (at + words)})
        inside = [edge for edge in edges if 8 * at <= edge <= 8 * (at + words)]
        pieces += [[where, low, high - low] for low, high in itertools.pairwise(inside)]
    assert chunks.pieces.tolist() == pieces
    starts = [*chunks.piece_starts.tolist(), len(chunks.table)]
    for piece, (first, last) in zip(pieces, itertools.pairwise(starts), strict=True):
        where, at, _ = piece
        part = chunks.table[first:last]
        assert part[:, 4].sum() == piece[2] and (part[:, 4] <= (longest or CHUNK)).all()
        assert part[:, 3].tolist() == part[:, 1].tolist() == [at + sum(part[:i, 4]) for i in range(len(part))]
        assert part[:, 5].tolist() == [3 * where + (one % blocks[where]) // 8 for one in part[:, 3].tolist()]


def test_a_long_piece_is_copied_in_chunks_whose_digests_add_up():
    nbytes = 3 * CHUNK + 64
    one = region(nbytes=nbytes, block_bytes=nbytes, first_word=7)
    memory = np.frombuffer(one.buffer, np.uint8)
    memory[:] = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    chunks = cut(spans([0, 0, 0, 0, nbytes]), [one])
    assert len(chunks.length) == 4 and len(chunks.piece_starts) == 1
    sums = [
        np.uint64(digest_span(memory[o : o + n], w))
        for o, n, w in zip(chunks.offset, chunks.length, chunks.word, strict=True)
    ]
    assert chunks.applied(sums).tolist() == [[0, 0, nbytes, digest_span(memory, 7)]]


@pytest.mark.parametrize("row", [[0, 0, 0, 4, 64], [0, 0, 0, 0, 12]])
def test_spans_that_are_no_whole_words_are_moved_without_digests(row):
    chunks = cut(spans(row), [region(block_bytes=64)])
    assert not chunks.digested and sum(chunks.length) == row[4]


def test_source_offsets_follow_the_cuts():
    chunks = cut(spans([1, 1000, 0, 32, 96]), [region(block_bytes=64)])
    assert chunks.table[:, :5].tolist() == [[1, 1000, 0, 32, 32], [1, 1032, 0, 64, 64]]


# --- copying ---


class Source:
    """A sender's memory; `script` is called with the number of times that its epoch was looked at."""

    def __init__(self, nbytes, script=lambda looks: False):
        self.regions = [np.arange(nbytes, dtype=np.uint64).astype(np.uint8)]
        self.looks, self._script = 0, script

    def ended(self):
        self.looks += 1
        return self._script(self.looks)


def copying(script=lambda looks: False, block_bytes=0):
    ours = region(nbytes=8 << 20, block_bytes=block_bytes)
    ledger = Ledger([ours])
    ledger.grant(1, local((0, 8 << 20)), "P")
    chunks = cut(spans(*([0, i << 20, 0, i << 20, 1 << 20] for i in range(8))), [ours])
    return Target([ours]), ledger.find("P", 1), chunks, Source(8 << 20, script)


@pytest.mark.parametrize("block_bytes", [0, 1 << 20])
def test_a_post_is_copied_whole(block_bytes):
    target, grant, chunks, source = copying(block_bytes=block_bytes)
    sums = copy_chunks(chunks, source, target, grant)
    assert np.array_equal(target.bytes[0], source.regions[0])
    assert len(sums) == (len(chunks.length) if block_bytes else 0)
    assert not grant.lock.locked()


def test_an_epoch_that_ends_while_a_batch_is_copied_is_not_a_landing():
    _, _, chunks, _ = copying()
    last = 2 * 8  # the look after the last batch
    target, grant, chunks, source = copying(lambda looks: looks >= last)
    assert copy_chunks(chunks, source, target, grant) is None
    assert source.looks == last


def test_an_epoch_that_has_ended_lets_nothing_be_read():
    target, grant, chunks, source = copying(lambda looks: True)
    assert copy_chunks(chunks, source, target, grant) is None
    assert not target.bytes[0].any()


def test_a_grant_that_is_revoked_between_batches_lets_nothing_more_land():
    target, grant, chunks, source = copying()

    def revoke_after_the_first_batch(looks):
        if looks == 2:
            grant.live = False
        return False

    source._script = revoke_after_the_first_batch
    assert copy_chunks(chunks, source, target, grant) is None
    assert target.bytes[0][: 1 << 20].any() and not target.bytes[0][1 << 20 :].any()


def test_no_byte_is_written_without_the_grants_lock():
    target, grant, chunks, source = copying()
    done = threading.Event()
    with grant.lock:
        thread = threading.Thread(target=lambda: (copy_chunks(chunks, source, target, grant), done.set()))
        thread.start()
        assert not done.wait(0.05)
        assert not target.bytes[0].any()
    assert done.wait(10)
    thread.join()


# --- serving a stream ---


def test_a_post_is_served_end_to_end_once_and_in_order():
    here = region(nbytes=4096)
    memory = np.frombuffer(here.buffer, np.uint8)
    memory[:] = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    table = spans([0, 512, 0, 0, 64], [0, 0, 0, 64, 128], [0, 3000, 0, 192, 8])
    source = StreamSource(table)
    expected = np.concatenate([memory[512:576], memory[0:128], memory[3000:3008]]).tobytes()
    got = b""
    for count in (10, 60, 100, 30):
        got += b"".join(bytes(view) for view in source.views(len(got), count, HostSource([here])))
    assert got == expected


@pytest.mark.parametrize(("start", "count"), [(1, 8), (0, 0), (0, 201), (2**63, 8)])
def test_bytes_outside_a_post_or_out_of_order_are_not_served(start, count):
    with pytest.raises(ProtocolError):
        StreamSource(spans([0, 0, 0, 0, 200])).views(start, count, HostSource([region(nbytes=4096)]))
