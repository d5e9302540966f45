"""How a step's arrays are filled on the host."""

from __future__ import annotations

import numpy as np
import pytest

from pd.runner.device_inputs import Packed, fill_prompts, row_fields
from pd.runner.inputs import Growing, Request, Row
from pd.types import SamplingParams

PAGE = 4


def request(tokens: int, blocks: list[int]) -> Request:
    return Request(
        key=1,
        epoch=1,
        prompt_len=tokens,
        computed=0,
        tokens=Growing(np.arange(100, 100 + tokens, dtype=np.int32)),
        blocks=Growing(np.array(blocks, dtype=np.int32)),
        sampling=SamplingParams(),
        choices=1,
        logprob_start=-1,
        prompt_top_logprobs=0,
    )


def test_fields_begin_at_multiples_of_32_words_and_share_one_buffer() -> None:
    memory, host = Packed({"a": 3, "b": 40, "c": 1}).on_host(pinned=False)
    assert len(memory) == 32 + 64 + 32
    for value, (name, length) in enumerate((("a", 3), ("b", 40), ("c", 1)), start=1):
        assert host[name].shape == (length,)
        host[name][:] = value
    assert memory[[0, 2, 32, 71, 96]].tolist() == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("first", "blocks", "expected"),
    [
        (0, [7, 8, 9], [7, 7, 7, 7, 8, 8]),
        (3, [7, 8, 9], [7, 8, 8, 8, 8, 9]),
        (3, [7, 8], [7, 8, 8, 8, 8, 0]),
        (3, [7], [7, 0, 0, 0, 0, 0]),
        (5, [7], [0] * 6),
        (0, [], [0] * 6),
    ],
)
def test_tokens_without_a_block_write_to_scratch(first: int, blocks: list[int], expected: list[int]) -> None:
    _, host = Packed(row_fields(1, 8)).on_host(pinned=False)
    for field in host.values():
        field[:] = -9
    fill_prompts(host, [Row(request(12, blocks), first, 6, 0, False)], PAGE)
    assert host["blocks"].tolist() == [*expected, 0, 0]
    assert host["tokens"].tolist() == [*range(100 + first, 106 + first), 0, 0]
    assert host["positions"].tolist() == [*range(first, first + 6), 0, 0]
    assert host["offsets"].tolist() == [*(at % PAGE for at in range(first, first + 6)), 0, 0]
