"""`pd.kernels.step_rows` on a GPU: one small program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pd.kernels.launch import columns
from pd.kernels.sampling_device import DeviceSampling
from pd.kernels.step_rows import SlotState, StepRows

#: Table entries that a program copies at a time.
ENTRIES = 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["decode", "scratch"])
def prepare_rows_kernel(
    state_tables,
    last,
    slots,
    lengths,
    grown,
    tokens,
    positions,
    blocks,
    offsets,
    tables,
    width,
    state_width,
    decode,
    scratch,
    PAGE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    length = tl.load(lengths + row)
    new = tl.load(grown + row)
    mine = state_tables + slot.to(tl.int64) * state_width
    final = tl.maximum(length - 1, 0) // PAGE
    count = tl.where(length > 0, final + 1, 0)
    for start in range(0, count, ENTRIES):
        index = start + tl.arange(0, ENTRIES)
        entries = tl.load(mine + index, mask=index < count, other=0)
        entries = tl.where((index == final) & (new >= 0), new, entries)
        tl.store(tables + row * width + index, entries, mask=index < count)
    if new >= 0:
        tl.store(mine + final, new)
    if row < decode:
        token = tl.load(tokens + row)
        if token < 0:
            tl.store(tokens + row, tl.load(last + slot))
        block = tl.load(mine + final)
        block = tl.where(new >= 0, new, block)
        block = tl.where((length > 0) & (slot != scratch), block, 0)
        tl.store(blocks + row, block)
        tl.store(offsets + row, tl.load(positions + row) % PAGE)


@triton.jit(do_not_specialize=["rows"])
def gather_sampling_kernel(
    table, slots, lengths, temperature, top_p, min_p, top_k, choice, seed, position, rows, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    slot = tl.load(slots + row, mask=mask, other=0)
    mine = table + slot * 8
    tl.store(temperature + row, tl.load(mine, mask=mask, other=0).to(tl.float32, bitcast=True), mask=mask)
    tl.store(top_p + row, tl.load(mine + 1, mask=mask, other=0).to(tl.float32, bitcast=True), mask=mask)
    tl.store(min_p + row, tl.load(mine + 2, mask=mask, other=0).to(tl.float32, bitcast=True), mask=mask)
    tl.store(top_k + row, tl.load(mine + 3, mask=mask, other=0), mask=mask)
    tl.store(choice + row, tl.load(mine + 4, mask=mask, other=0), mask=mask)
    low = tl.load(mine + 6, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(mine + 7, mask=mask, other=0).to(tl.int64)
    tl.store(seed + row, (high << 32) | low, mask=mask)
    tl.store(position + row, tl.load(lengths + row, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def store_last_kernel(last, slots, tokens, rows, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    slot = tl.load(slots + row, mask=mask, other=0)
    tl.store(last + slot, tl.load(tokens + row, mask=mask, other=0), mask=mask)


def launch_prepare_rows(state: SlotState, rows: StepRows, page_size: int) -> None:
    count = rows.slots.shape[0]
    prepare_rows_kernel[(count,)](
        state.tables,
        state.last,
        rows.slots,
        rows.lengths,
        rows.grown,
        rows.tokens,
        rows.positions,
        rows.blocks,
        rows.offsets,
        rows.tables,
        rows.tables.stride(0),
        state.tables.stride(0),
        rows.decode,
        state.scratch,
        PAGE=page_size,
        ENTRIES=ENTRIES,
        **OPTIONS,
    )


def launch_gather_sampling(state: SlotState, slots: torch.Tensor, lengths: torch.Tensor) -> DeviceSampling:
    count = slots.shape[0]
    real = columns(3, count, torch.float32, slots.device)
    whole = columns(3, count, torch.int32, slots.device)
    seed = torch.empty(count, dtype=torch.int64, device=slots.device)
    grid = (triton.cdiv(count, 128),)
    gather_sampling_kernel[grid](
        state.params, slots, lengths, *real, *whole[:2], seed, whole[2], count, ROWS=128, **OPTIONS
    )
    return DeviceSampling(real[0], whole[0], real[1], real[2], seed, whole[1], whole[2])


def launch_store_last(state: SlotState, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    count = slots.shape[0]
    store_last_kernel[(triton.cdiv(count, 128),)](state.last, slots, tokens, count, ROWS=128, **OPTIONS)
