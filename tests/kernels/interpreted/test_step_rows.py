"""What a step's rows become on the device, by the interpreted kernels, against the reference."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from pd.kernels import reference
from pd.kernels.step_rows import SlotState, StepRows
from pd.kernels.step_rows_triton import launch_gather_sampling, launch_prepare_rows, launch_store_last

SLOTS, WIDTH = 9, 300


def make_state(seed: int = 0) -> SlotState:
    generator = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.int32, generator=generator)

    tables = ints(1, 1000, SLOTS, WIDTH)
    tables[-1] = 0
    return SlotState(tables, ints(0, 500, SLOTS), ints(-(2**31), 2**31 - 1, SLOTS, 8))


def copy_of(state: SlotState) -> SlotState:
    return SlotState(state.tables.clone(), state.last.clone(), state.params.clone())


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_rows() -> StepRows:
    """Tokens known and not, a new block, a row that fills up, and a prompt of three tokens that the host describes."""
    return StepRows(
        slots=i32(3, 0, 5, SLOTS - 1, 2),
        lengths=i32(17, 1, 290 * 4, 0, 12),
        grown=i32(777, -1, -1, -1, -1),
        tokens=i32(-1, 42, -1, 0, 7, 8, 9),
        positions=i32(16, 0, 290 * 4 - 1, 0, 9, 10, 11),
        blocks=i32(-5, -5, -5, -5, 11, 11, 12),
        offsets=i32(-5, -5, -5, -5, 1, 2, 3),
        tables=torch.zeros(5, WIDTH, dtype=torch.int32),
        decode=4,
    )


def test_rows_are_prepared_as_by_the_reference() -> None:
    state = make_state()
    rows, expected, before = make_rows(), make_rows(), copy_of(state)
    launch_prepare_rows(state, rows, 4)
    reference.prepare_rows(before, expected, 4)
    for field in fields(StepRows):
        if field.name != "decode":
            assert torch.equal(getattr(rows, field.name), getattr(expected, field.name)), field.name
    assert torch.equal(state.tables, before.tables)
    assert rows.tokens.tolist()[:4] == [int(state.last[3]), 42, int(state.last[5]), 0]
    assert rows.blocks.tolist() == [777, int(state.tables[0, 0]), int(state.tables[5, 289]), 0, 11, 11, 12]
    assert state.tables[3, 4] == rows.tables[0, 4] == 777
    assert rows.offsets.tolist() == [0, 0, 3, 0, 1, 2, 3]


def test_a_table_that_is_wider_than_the_rows_need_is_not_overrun() -> None:
    state, rows = make_state(), make_rows()
    narrow = replace(rows, tables=torch.full((6, 290), -7, dtype=torch.int32)[:5])
    launch_prepare_rows(state, narrow, 4)
    assert (narrow.tables[1, 1:] == -7).all() and (narrow.tables[3] == -7).all()
    assert torch.equal(narrow.tables[2], state.tables[5, :290])


@pytest.mark.parametrize("count", [1, 130])
def test_parameters_are_gathered_bit_for_bit(count: int) -> None:
    state = make_state(1)
    state.params[:, 6] = -1  # the lower half of a seed is no number with a sign
    slots = torch.arange(count, dtype=torch.int32) % SLOTS
    lengths = torch.arange(count, dtype=torch.int32) + 5
    found, expected = launch_gather_sampling(state, slots, lengths), reference.gather_sampling(state, slots, lengths)
    for field in fields(type(found)):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert one.dtype == other.dtype
        assert one.numpy().tobytes() == other.numpy().tobytes(), field.name


def test_last_tokens_are_stored() -> None:
    state = make_state()
    before = state.last.clone()
    launch_store_last(state, i32(2, 7, SLOTS - 1, SLOTS - 1), i32(100, 200, 300, 300))
    before[[2, 7, SLOTS - 1]] = i32(100, 200, 300)
    assert torch.equal(state.last, before)
