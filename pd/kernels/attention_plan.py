"""How the work of attention on a GPU is divided: what is decided on the host, from shapes and host integers alone."""

from __future__ import annotations

from typing import NamedTuple


class DecodeSplit(NamedTuple):
    """A row's context is divided into at most `parts`, of at least `least` tokens each."""

    parts: int
    least: int


#: (rows x kv heads for each multiprocessor, up to which the split applies; the split). A multiprocessor holds about
#: five programs at once, and nearly four with enough to read saturate memory. So rows of some 1,000 tokens make about
#: four programs each, and longer ones more, so that one of them does not run on alone when the others are done.
SPLITS = (
    (0.07, DecodeSplit(64, 64)),
    (0.13, DecodeSplit(32, 64)),
    (0.25, DecodeSplit(24, 64)),
    (0.5, DecodeSplit(16, 128)),
    (1.0, DecodeSplit(16, 256)),
    (2.0, DecodeSplit(8, 512)),
    (4.0, DecodeSplit(8, 1024)),
    (float("inf"), DecodeSplit(8, 2048)),
)


def decode_split(rows: int, kv_heads: int, processors: int) -> DecodeSplit:
    """By what is known when a graph is captured: lengths are not, so each program finds its own share."""
    each = rows * kv_heads / processors
    return next(split for most, split in SPLITS if each <= most)
