"""How the work of attention is divided."""

from __future__ import annotations

import itertools

import pytest

from pd.kernels.attention import PromptRow
from pd.kernels.attention_plan import (
    SPLITS,
    Split,
    decode_split,
    fresh_counts,
    fresh_length,
    fresh_runs,
    prompt_split,
    prompt_tiles,
)

H200 = 132


@pytest.mark.parametrize(
    ("rows", "split"),
    [
        (1, Split(64, 64)),
        (2, Split(32, 64)),
        (8, Split(16, 128)),
        (32, Split(8, 512)),
        (64, Split(8, 1024)),
        (256, Split(8, 2048)),
        (4096, Split(8, 2048)),
    ],
)
def test_contexts_are_divided_the_more_the_fewer_rows_there_are(rows: int, split: Split) -> None:
    assert decode_split(rows, 8, H200) == split


def test_fewer_heads_or_more_processors_are_as_fewer_rows() -> None:
    assert decode_split(64, 1, H200) == decode_split(8, 8, H200) == decode_split(4, 8, H200 // 2)


def test_the_longest_context_keeps_every_processor_busy_at_any_batch() -> None:
    for rows in range(1, 300):
        split = decode_split(rows, 8, H200)
        assert rows * 8 * min(split.parts, 131072 // split.least) >= 3.8 * H200


def test_more_rows_never_mean_shorter_parts() -> None:
    assert all(a[0] < b[0] and a[1].least <= b[1].least for a, b in itertools.pairwise(SPLITS))


@pytest.mark.parametrize(
    ("count", "context", "length"),
    [
        (8192, 8192, 8192),
        (8000, 8000, 8192),
        (900, 900, 1024),
        (800, 800, 0),  # too much would be padding
        (8192, 8193, 0),  # has a prefix
        (20_000, 20_000, 0),
        (2, 2, 0),
    ],
)
def test_prompts_without_a_prefix_are_padded_to_few_lengths(count: int, context: int, length: int) -> None:
    assert fresh_length(PromptRow(0, count, context)) == length


@pytest.mark.parametrize(("length", "counts"), [(1024, [1, 2, 4, 8]), (1536, [1, 2, 4]), (4096, [1, 2]), (8192, [1])])
def test_as_many_prompts_are_planned_together_as_a_step_usually_takes(length: int, counts: list[int]) -> None:
    assert fresh_counts(length) == counts


def test_neighbours_of_one_length_are_attended_to_together() -> None:
    lengths = [1000, 1024, 900, 1000, 1024, 1500, 1024, 5000, 5000]  # of which 1500 and 5000 have other lengths
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    prompts = [PromptRow(start, count, count) for start, count in zip(starts, lengths, strict=True)]
    assert [len(run) for run in fresh_runs(prompts)] == [4, 1, 1, 1, 1, 1]
    apart = [prompts[0], prompts[2], prompts[3]]  # between the first two lies one with a prefix
    assert [len(run) for run in fresh_runs(apart)] == [1, 2]
    assert [prompt for run in fresh_runs(prompts) for prompt in run] == prompts
    assert fresh_runs([]) == []


@pytest.mark.parametrize("group", [1, 4, 7, 200])
def test_tiles_cover_each_prompt_once_the_longest_first_and_those_for_cudnn_last(group: int) -> None:
    prompts = [PromptRow(0, 100, 100), PromptRow(100, 2048, 2048), PromptRow(2148, 33, 5000), PromptRow(2181, 2, 2)]
    tiles = prompt_tiles(prompts, group).tolist()
    tokens = max(1, 128 // group)
    assert sorted(tiles) == [[i, at] for i, prompt in enumerate(prompts) for at in range(0, prompt.count, tokens)]
    fresh = [index == 1 for index, _ in tiles]
    assert fresh == sorted(fresh)
    for part in (False, True):
        ends = [prompts[i].context - prompts[i].count + at for i, at in tiles if (i == 1) == part]
        assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("prompt", [PromptRow(0, 2048, 2048), PromptRow(0, 33, 5000), PromptRow(0, 1, 1)])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_a_prompt_by_itself_is_divided_as_it_is_beside_others(prompt: PromptRow, group: int) -> None:
    other = PromptRow(prompt.count, 10, 10)
    beside = [tile for tile in prompt_tiles([prompt, other], group).tolist() if tile[0] == 0]
    assert prompt_tiles([prompt], group).tolist() == beside


def test_no_prompts_make_no_tiles() -> None:
    assert prompt_tiles([], 4).shape == (0, 2)


@pytest.mark.parametrize(("tiles", "parts"), [(1, 16), (4, 8), (16, 2), (17, 1), (64, 1), (1000, 1)])
def test_keys_are_divided_where_tiles_leave_processors_idle(tiles: int, parts: int) -> None:
    assert prompt_split(tiles, 8, H200) == Split(parts, 512)
