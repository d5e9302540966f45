"""Penalties, bias and masks on the GPU against the reference on the CPU; and in a captured graph."""

from __future__ import annotations

import pytest
import torch

from pd.kernels import shaping
from pd.kernels.shaping import Penalties

DEVICE = "cuda:0"
VOCAB = 128_256


def state(rows: int, slots: int, vocab: int) -> tuple[torch.Tensor, Penalties, torch.Tensor, torch.Tensor]:
    """On the CPU: logits, penalties of every row but each third, prompts' bits, counts."""
    generator = torch.Generator().manual_seed(rows)
    words = (vocab + 31) // 32
    seen = torch.randint(-(2**31), 2**31, (slots, words), generator=generator).int()
    counts = torch.randint(0, 40, (slots, vocab), generator=generator).sub_(36).clamp_(min=0).short()
    slot = torch.randperm(slots, generator=generator)[:rows].int()
    slot[::3] = -1
    rates = 0.5 + torch.rand(3, rows, generator=generator)
    return torch.randn(rows, vocab, generator=generator), Penalties(slot, *rates), seen, counts


def on_device(penalties: Penalties) -> Penalties:
    columns = penalties.slot, penalties.repetition, penalties.frequency, penalties.presence
    return Penalties(*(one.to(DEVICE) for one in columns))


@pytest.mark.parametrize("vocab", [1, 1000, 32_003, VOCAB])
@pytest.mark.parametrize("rows", [1, 20])
def test_penalties_are_the_references(rows: int, vocab: int) -> None:
    logits, penalties, seen, counts = state(rows, 24, vocab)
    shaped = logits.to(DEVICE)
    shaping.apply_penalties(shaped, on_device(penalties), seen.to(DEVICE), counts.to(DEVICE))
    shaping.apply_penalties(logits, penalties, seen, counts)
    assert torch.allclose(shaped.cpu(), logits, rtol=3e-7, atol=1e-6)


def test_tokens_are_counted_when_a_graph_is_replayed() -> None:
    counts = torch.zeros(300, VOCAB, dtype=torch.int16, device=DEVICE)
    slot = torch.arange(256, dtype=torch.int32, device=DEVICE).flip(0)
    slot[5] = -1
    tokens = torch.arange(0, 512, 2, dtype=torch.int32, device=DEVICE)
    shaping.count_tokens(counts, slot, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shaping.count_tokens(counts, slot, tokens)
    graph.replay()
    tokens += 1
    graph.replay()
    assert int(counts.sum()) == 3 * 255
    assert counts[255, :2].tolist() == [2, 1]
    assert not counts[250].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_masks_are_the_references(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, VOCAB, generator=generator).to(dtype)
    row = torch.randint(-1, 9, (1000,), generator=generator).int()
    token = torch.randperm(VOCAB + 100, generator=generator)[:1000].int() - 50
    value = torch.randn(1000, generator=generator)
    rows = torch.tensor([8, 0, -1, 3], dtype=torch.int32)
    mask = torch.randint(-(2**31), 2**31, (4, VOCAB // 32 - 3), generator=generator).int()
    shaped = logits.to(DEVICE)
    shaping.add_bias_rows(shaped, row.to(DEVICE), token.to(DEVICE), value.to(DEVICE))
    shaping.forbid_rows(shaped, rows.to(DEVICE), mask.to(DEVICE))
    shaping.add_bias_rows(logits, row, token, value)
    shaping.forbid_rows(logits, rows, mask)
    # A sum of two numbers of about the same size keeps the error of the larger.
    assert torch.allclose(shaped.cpu(), logits, rtol=0, atol=2**-4 if dtype == torch.bfloat16 else 0)
