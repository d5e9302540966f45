"""Copies of many spans in one launch: scattered blocks, a gather into or a scatter from a contiguous staging buffer."""

from __future__ import annotations

import numpy as np
import torch

from pd.kernels import reference
from pd.kernels.spans import I64, as_words, span_words


def copy_spans(source: torch.Tensor, target: torch.Tensor, spans: I64) -> None:
    """Copy spans int64[n, 3] (offset in `source`, offset in `target`, length; bytes, on the host).

    Both memories are reached from the source's device: they are on it, or one is a peer's that is mapped there. No span
    may be written that another one reads or writes. Offsets and lengths are multiples of 8, else ValueError.
    """
    _copy(source, target, spans, None)


def copy_and_digest(source: torch.Tensor, target: torch.Tensor, spans: I64, positions: I64) -> torch.Tensor:
    """`copy_spans`, and the digests of what was copied, in the same pass: int64[n] as `digest_spans` returns them.

    `positions` int64[n]: where each span's first word stands in its block, in words.
    """
    digests = torch.zeros(len(spans), dtype=torch.int64, device=source.device)
    _copy(source, target, spans, (positions, digests))
    return digests


def _copy(source: torch.Tensor, target: torch.Tensor, spans: I64, digest: tuple[I64, torch.Tensor] | None) -> None:
    if source.device != target.device:
        raise ValueError(f"memory of {source.device} and {target.device}: map the peer's memory on one of them")
    here, there = as_words(source), as_words(target)
    table = np.zeros((len(spans), 4), dtype=np.int64)
    table[:, 0] = span_words("source", here, spans[:, 0], spans[:, 2])
    table[:, 1] = span_words("target", there, spans[:, 1], spans[:, 2])
    table[:, 2] = spans[:, 2] // 8
    digests = None
    if digest is not None:
        table[:, 3], digests = digest
    if not source.is_cuda:
        reference.copy_spans(here, there, table)
        if digests is not None:
            digests.copy_(reference.digest_spans(here, table))
        return
    from pd.kernels.spans_triton import run_pass

    run_pass(here, there, table, digests)
