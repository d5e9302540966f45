"""Penalties, bias and masks by the interpreted kernels, against the reference in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pd.kernels import shaping, shaping_triton
from pd.kernels.sampling import add_bias, penalise
from pd.kernels.shaping import Penalties, token_bits


def penalties(slots: list[int]) -> Penalties:
    rows = len(slots)
    return Penalties(
        slot=torch.tensor(slots, dtype=torch.int32),
        repetition=torch.linspace(0.7, 1.5, rows),
        frequency=torch.linspace(-0.5, 0.9, rows),
        presence=torch.linspace(1.0, -0.3, rows),
    )


@pytest.mark.parametrize("vocab", [5, 33, 4100])
def test_penalties_are_those_of_the_tokens(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1))
    slots, known = [2, -1, 0, 3], penalties([2, -1, 0, 3])
    prompts = {slot: rng.integers(0, vocab, 40) for slot in (0, 2, 3)}
    emitted = {slot: rng.integers(0, vocab, 60) for slot in (0, 2, 3)}
    seen, counts = torch.zeros(5, (vocab + 31) // 32, dtype=torch.int32), torch.zeros(5, vocab, dtype=torch.int16)
    for slot in prompts:
        seen[slot] = torch.from_numpy(token_bits(prompts[slot], vocab))
    for step in range(60):
        tokens = torch.tensor([emitted.get(slot, rng.integers(0, vocab, 60))[step] for slot in slots]).int()
        shaping_triton.count_tokens(counts, known.slot, tokens)
    shaped, reference, expected = logits.clone(), logits.clone(), logits.clone()
    shaping_triton.apply_penalties(shaped, known, seen, counts)
    shaping.apply_penalties(reference, known, seen, counts)
    for row, slot in enumerate(slots):
        if slot >= 0:
            before, after = torch.from_numpy(prompts[slot]), torch.from_numpy(emitted[slot])
            penalise(
                expected[row],
                torch.cat((before, after)),
                after,
                repetition=float(known.repetition[row]),
                frequency=float(known.frequency[row]),
                presence=float(known.presence[row]),
            )
    assert torch.equal(reference, expected)
    assert torch.allclose(shaped, expected, rtol=3e-7, atol=3e-7)
    assert torch.equal(shaped[1], logits[1])
    assert counts[[1, 4]].sum() == 0


def test_counting_by_the_kernel_and_by_torch_is_the_same() -> None:
    slots, tokens = torch.tensor([3, -1, 0], dtype=torch.int32), torch.tensor([7, 8, 9], dtype=torch.int32)
    counts = torch.zeros(4, 10, dtype=torch.int16)
    other = counts.clone()
    for _ in range(2):
        shaping_triton.count_tokens(counts, slots, tokens)
        shaping.count_tokens(other, slots, tokens)
    assert torch.equal(counts, other)
    assert counts[3, 7] == counts[0, 9] == 2
    assert counts.sum() == 4


def test_a_count_that_is_full_stays() -> None:
    slots, tokens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32)
    counts = torch.zeros(2, 3, dtype=torch.int16)
    counts[0, 2] = shaping.MOST_COUNTED - 1
    other = counts.clone()
    for _ in range(2):
        shaping_triton.count_tokens(counts, slots, tokens)
        shaping.count_tokens(other, slots, tokens)
    assert torch.equal(counts, other)
    assert counts[:, 2].tolist() == [shaping.MOST_COUNTED, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_ignores_what_is_outside(dtype: torch.dtype) -> None:
    row = torch.tensor([0, 0, 2, -1, 1, 1], dtype=torch.int32)
    token = torch.tensor([3, 699, 0, 5, 700, -1], dtype=torch.int32)
    value = torch.tensor([2.5, -1.0, float("-inf"), 9.0, 9.0, 9.0])
    logits = torch.randn(3, 700).to(dtype)
    shaped, reference = logits.clone(), logits.clone()
    shaping_triton.add_bias_rows(shaped, row, token, value)
    shaping.add_bias_rows(reference, row, token, value)
    add_bias(logits[0], {3: 2.5, 699: -1.0})
    add_bias(logits[2], {0: float("-inf")})
    assert torch.equal(shaped, logits)
    assert torch.equal(reference, logits)


@pytest.mark.parametrize(("vocab", "words"), [(5000, 157), (5000, 200), (5000, 100), (31, 1)])
def test_masks_leave_the_tokens_that_have_a_bit(vocab: int, words: int) -> None:
    mask = torch.from_numpy(np.random.default_rng(words).integers(-(2**31), 2**31, (3, words)).astype(np.int32))
    rows = torch.tensor([3, -1, 0], dtype=torch.int32)
    logits = torch.randn(4, vocab)
    shaped, reference, expected = logits.clone(), logits.clone(), logits.clone()
    shaping_triton.forbid_rows(shaped, rows, mask)
    shaping.forbid_rows(reference, rows, mask)
    for entry, row in ((0, 3), (2, 0)):
        bits = np.unpackbits(mask[entry].numpy().view(np.uint8), bitorder="little")[:vocab].astype(bool)
        allowed = torch.from_numpy(np.pad(bits, (0, vocab - len(bits))))
        expected[row] = expected[row].masked_fill(~allowed, float("-inf"))
    assert torch.equal(shaped, expected)
    assert torch.equal(reference, expected)
