"""Synthetic prompts: every token id follows from (seed, hash id, position in the block).

Equal hash ids give equal blocks of tokens, so a trace's prefix structure survives; different ones give
different tokens. The function is a counter-based generator (splitmix64), so that a prompt can be
generated again from its record and no prompt has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DEFAULT_VOCAB_SIZE = 32_000

# One common word is one token in most vocabularies, so a chat prompt has about the wanted length.
WORDS = tuple(
    """
    the of and to in is it you that he was for on are with as his they at be this from have or by one had not
    but what all were when we there can an your which their said if do will each about how up out them then she
    many some so these would other into has more her two like him see time could no make than first been its who
    now people my made over did down only way find use may water long little very after words called just where
    most know get through back much good new write our me man too any day same right look think also around
    another came come work three word must because does part even place well such here take why help put
    different away again off went old number great tell men say small every found still between name should home
    big give air line set own under read last never us left end along while might next sound below saw something
    thought both few those always show large often together asked house world going want school important until
    form food keep children feet land side without boy once animal life enough took four head
    """.split()
)

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def plain_range(vocab_size: int) -> tuple[int, int]:
    """[lo, hi) of ids that are plain text in practice.

    Special tokens sit at the start of a vocabulary (up to 1,000 in Mistral's) or at its end (Llama 3, Qwen, DeepSeek),
    where the padding is too.
    """
    return min(1000, vocab_size // 8), max(vocab_size - vocab_size // 16, vocab_size // 8 + 1)


def prompt_tokens(
    hash_ids: Sequence[int], length: int, block_len: int, seed: int, token_range: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """int64[length]: one block of `block_len` tokens per hash id, the last one cut to `length`."""
    low, high = token_range
    ids = np.asarray(hash_ids, dtype=np.int64).view(np.uint64)
    base = _mix(ids * np.uint64(_GAMMA) + np.uint64(_mix_int(seed)))
    counter = np.arange(1, block_len + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    numbers = _mix(base[:, None] + counter).reshape(-1)[:length]
    return (numbers % np.uint64(high - low)).astype(np.int64) + low


def words(tokens: npt.NDArray[np.int64]) -> str:
    """Text of len(tokens) words for a chat message; ids are taken modulo the word list."""
    return " ".join([WORDS[token % len(WORDS)] for token in tokens.tolist()])


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser; uint64 arrays wrap around as wanted."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _mix_int(number: int) -> int:
    """The same for one Python integer: numpy warns when a scalar wraps around."""
    number = (number + _GAMMA) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
