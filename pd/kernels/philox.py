"""Counter-based random numbers: the same inputs give the same numbers in any batch, on any instance.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), whose published test vectors
hold. Key: a row's 64-bit seed. Counter: (token id // 4, position, choice, 0); word i belongs to token id % 4 == i.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class DrawKeys:
    """One row per draw: seed (taken modulo 2**64), choice and position of the token to be sampled (modulo 2**32)."""

    seeds: tuple[int, ...]
    choices: tuple[int, ...]
    positions: tuple[int, ...]


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds. Words are uint32 values held in int64; the inputs broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two uint32 fits in 64 bits; int64 wraps to the same bits, and the mask drops the sign's copies.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _WORD) ^ c1 ^ k0,
            right & _WORD,
            ((left >> 32) & _WORD) ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def gumbel(keys: DrawKeys, vocab: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise, float32 [rows, vocab].

    -log(E) with E = -log1p(-u), u = (word + 1/2) / 2**32: small E, which decide an arg max, keep their precision.
    """
    columns = torch.arange((vocab + 3) // 4, device=device)[None]
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def column(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor([value & _WORD for value in values], dtype=torch.int64, device=device)[:, None]

    key = column(keys.seeds), column(seed >> 32 for seed in keys.seeds)
    counter = columns, column(keys.positions), column(keys.choices), zero
    words = torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :vocab]
    uniform = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
