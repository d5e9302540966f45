"""What changes logits before they are sampled, in place and without a host synchronisation: penalties, bias, masks.

What is known of a request's tokens stays on the device, in a slot that it has while it lives: a bit for each token of
its prompt and a count for each token that it emitted. Only requests with penalties need one. Where a batch has no row
that asks, the op is not called at all; rows that do not ask cost a look at their slot. Order and meaning are those of
`pd.kernels.sampling`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pd.kernels.sampling import penalise

WORD_BITS = 32

#: A count stays at this.
MOST_COUNTED = 2**15 - 1


@dataclass(frozen=True)
class Penalties:
    """One row per row of logits, all contiguous and on their device."""

    slot: torch.Tensor  # int32[S]; below 0 where the row has no penalties
    repetition: torch.Tensor  # float32[S], 1 is off
    frequency: torch.Tensor  # float32[S], 0 is off
    presence: torch.Tensor  # float32[S], 0 is off


def token_bits(tokens: npt.ArrayLike, vocab: int) -> npt.NDArray[np.int32]:
    """int32[ceil(vocab / 32)]: bit `t % 32` of word `t // 32` is set for each of these tokens, all below `vocab`."""
    flags = np.zeros(-(-vocab // WORD_BITS) * WORD_BITS, dtype=np.uint8)
    flags[np.asarray(tokens, dtype=np.int64)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def apply_penalties(logits: torch.Tensor, penalties: Penalties, seen: torch.Tensor, counts: torch.Tensor) -> None:
    """logits float32[S, V] in place; `seen` int32[slots, ceil(V / 32)] as `token_bits` makes them, of the prompts.

    `counts` int16[slots, V]: how often the slot's request has emitted each token, at most MOST_COUNTED.
    """
    _check(logits)
    if seen.shape[1] * WORD_BITS < logits.shape[1] or counts.shape[1] != logits.shape[1]:
        raise ValueError(f"seen {tuple(seen.shape)} and counts {tuple(counts.shape)} for {logits.shape[1]} tokens")
    if logits.is_cuda:
        from pd.kernels import shaping_triton

        shaping_triton.apply_penalties(logits, penalties, seen, counts)
        return
    for row, slot in enumerate(penalties.slot.tolist()):
        if slot >= 0:
            emitted = torch.arange(logits.shape[1]).repeat_interleave(counts[slot].long())
            prompt = unpack_bits(seen[slot : slot + 1], logits.shape[1])[0].nonzero()[:, 0]
            penalise(
                logits[row],
                torch.cat((prompt, emitted)),
                emitted,
                repetition=float(penalties.repetition[row]),
                frequency=float(penalties.frequency[row]),
                presence=float(penalties.presence[row]),
            )


def count_tokens(counts: torch.Tensor, slot: torch.Tensor, tokens: torch.Tensor) -> None:
    """counts int16[slots, V] in place: one more of tokens int32[S] in each row's slot int32[S] that is not below 0.

    No two rows have the same slot. MOST_COUNTED stays.
    """
    if counts.is_cuda:
        from pd.kernels import shaping_triton

        shaping_triton.count_tokens(counts, slot, tokens)
        return
    rows = slot >= 0
    at = slot[rows].long(), tokens[rows].long()
    counts[at] = (counts[at].int() + 1).clamp(max=MOST_COUNTED).short()


def add_bias_rows(logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor, value: torch.Tensor) -> None:
    """logits [S, V] in place: add value float32[n] at (row, token), int32[n] each, no pair twice. -inf forbids it.

    An entry whose row is below 0, or whose token is outside the vocabulary, has no effect.
    """
    _check(logits)
    if logits.is_cuda:
        from pd.kernels import shaping_triton

        shaping_triton.add_bias_rows(logits, row, token, value)
        return
    inside = (row >= 0) & (token >= 0) & (token < logits.shape[1])
    logits[row[inside].long(), token[inside].long()] += value[inside].to(logits.dtype)


def forbid_rows(logits: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> None:
    """logits [S, V] in place: -inf where mask int32[m, words] has no bit, in the rows int32[m] that are not below 0.

    Bits as llguidance fills them: bit `t % 32` of word `t // 32` is set where token t may come. Words may be too many
    or too few; tokens beyond them cannot come.
    """
    _check(logits)
    if logits.is_cuda:
        from pd.kernels import shaping_triton

        shaping_triton.forbid_rows(logits, rows, mask)
        return
    wanted = rows >= 0
    index = rows[wanted].long()
    logits[index] = logits[index].masked_fill(~unpack_bits(mask[wanted], logits.shape[1]), float("-inf"))


def unpack_bits(mask: torch.Tensor, vocab: int) -> torch.Tensor:
    """mask int32[m, words] -> bool[m, vocab]; False beyond the words."""
    bits = (mask[:, :, None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=mask.device)) & 1
    bits = bits.flatten(1)[:, :vocab].bool()
    return torch.nn.functional.pad(bits, (0, vocab - bits.shape[1]))


def _check(logits: torch.Tensor) -> None:
    if logits.stride(1) != 1:
        raise ValueError("a row's logits must be contiguous")
