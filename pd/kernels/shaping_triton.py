"""Penalties, bias and masks on the GPU: one pass over the logits of the rows that ask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pd.kernels.shaping import MOST_COUNTED, Penalties

TILE = 4096
#: Entries of a list that one program works off.
ENTRIES = 128
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _bits(words, ids, inside):
    """Of each token the bit in these words, int32; 0 outside."""
    return (tl.load(words + ids // 32, mask=inside, other=0) >> (ids % 32)) & 1


@triton.jit
def penalty_pass(
    logits,
    slots,
    repetitions,
    frequencies,
    presences,
    seen,
    counts,
    stride,
    seen_stride,
    counts_stride,
    vocab,
    TILE: tl.constexpr,
):
    """Grid (tiles, rows)."""
    row = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = ids < vocab
        at = logits + row.to(tl.int64) * stride + ids
        x = tl.load(at, mask=inside, other=0.0)
        count = tl.load(counts + slot * counts_stride + ids, mask=inside, other=0).to(tl.float32)
        known = (_bits(seen + slot * seen_stride, ids, inside) > 0) | (count > 0)
        repetition = tl.zeros((TILE,), tl.float32) + tl.load(repetitions + row)
        x = tl.where(known, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        taken = tl.load(frequencies + row) * count + tl.load(presences + row)
        tl.store(at, tl.where(count > 0, x - taken, x), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def count_pass(counts, slots, tokens, counts_stride, rows, vocab, MOST: tl.constexpr, ENTRIES: tl.constexpr):
    """Grid (ceil(rows / ENTRIES),)."""
    lanes = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    slot = tl.load(slots + lanes, mask=lanes < rows, other=-1).to(tl.int64)
    token = tl.load(tokens + lanes, mask=lanes < rows, other=-1)
    valid = (slot >= 0) & (token >= 0) & (token < vocab)
    at = counts + slot * counts_stride + token
    count = tl.load(at, mask=valid, other=0).to(tl.int32)
    tl.store(at, tl.minimum(count + 1, MOST).to(tl.int16), mask=valid)


@triton.jit(do_not_specialize=["entries"])
def bias_pass(logits, rows, tokens, values, stride, entries, vocab, ENTRIES: tl.constexpr):
    """Grid (ceil(entries / ENTRIES),)."""
    lanes = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    row = tl.load(rows + lanes, mask=lanes < entries, other=-1).to(tl.int64)
    token = tl.load(tokens + lanes, mask=lanes < entries, other=-1)
    valid = (row >= 0) & (token >= 0) & (token < vocab)
    at = logits + row * stride + token
    value = tl.load(values + lanes, mask=valid, other=0.0)
    tl.store(at, tl.load(at, mask=valid, other=0.0).to(tl.float32) + value, mask=valid)


@triton.jit
def mask_pass(logits, rows, masks, stride, mask_stride, words, vocab, TILE: tl.constexpr):
    """Grid (tiles, entries). Nothing is read of the logits."""
    entry = tl.program_id(1)
    row = tl.load(rows + entry).to(tl.int64)
    if row >= 0:
        ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
        allowed = _bits(masks + entry.to(tl.int64) * mask_stride, ids, ids < 32 * words) > 0
        barred = tl.full((TILE,), float("-inf"), tl.float32).to(logits.dtype.element_ty)
        tl.store(logits + row * stride + ids, barred, mask=(ids < vocab) & ~allowed)


def apply_penalties(logits: torch.Tensor, penalties: Penalties, seen: torch.Tensor, counts: torch.Tensor) -> None:
    rows, vocab = logits.shape
    columns = penalties.slot, penalties.repetition, penalties.frequency, penalties.presence
    strides = logits.stride(0), seen.stride(0), counts.stride(0)
    with torch.cuda.device_of(logits):
        penalty_pass[(triton.cdiv(vocab, TILE), rows)](
            logits, *columns, seen, counts, *strides, vocab, TILE=TILE, **OPTIONS
        )


def count_tokens(counts: torch.Tensor, slot: torch.Tensor, tokens: torch.Tensor) -> None:
    rows, vocab = len(slot), counts.shape[1]
    with torch.cuda.device_of(counts):
        count_pass[(triton.cdiv(rows, ENTRIES),)](
            counts, slot, tokens, counts.stride(0), rows, vocab, MOST=MOST_COUNTED, ENTRIES=ENTRIES, **OPTIONS
        )


def add_bias_rows(logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor, value: torch.Tensor) -> None:
    entries, vocab = len(row), logits.shape[1]
    if entries:
        with torch.cuda.device_of(logits):
            bias_pass[(triton.cdiv(entries, ENTRIES),)](
                logits, row, token, value, logits.stride(0), entries, vocab, ENTRIES=ENTRIES, **OPTIONS
            )


def forbid_rows(logits: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> None:
    vocab, (entries, words) = logits.shape[1], mask.shape
    if entries:
        with torch.cuda.device_of(logits):
            mask_pass[(triton.cdiv(vocab, TILE), entries)](
                logits, rows, mask, logits.stride(0), mask.stride(0), words, vocab, TILE=TILE, **OPTIONS
            )
