"""Copies of many spans in one launch: scattered blocks, a gather into or a scatter from a contiguous staging buffer."""

from __future__ import annotations

import numpy as np
import torch

from pd.kernels import reference
from pd.kernels.spans import I64, RUN, TILE_ROWS, Form, Share, as_words, share_table, span_words, word_alignment


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


def plan_share(source: torch.Tensor, target: torch.Tensor, spans: I64, positions: I64, table: I64) -> Share:
    """What `copy_share` needs for the spans of `copy_and_digest`: fills `table` int64[5, n + 1], in host memory."""
    words = np.empty((4, len(spans)), dtype=np.int64)
    words[0] = span_words("source", source, spans[:, 0], spans[:, 2])
    words[1] = span_words("target", target, spans[:, 1], spans[:, 2])
    words[2], words[3] = spans[:, 2] >> 3, positions
    return Share(share_table(table, words), word_alignment(words, source, target))


def copy_share(
    source: torch.Tensor,
    target: torch.Tensor,
    share: Share,
    table: torch.Tensor,
    digests: torch.Tensor,
    programs: int,
    form: Form,
    tiles: tuple[int, int] | None = None,
) -> None:
    """`copy_and_digest` by at most `programs` programs, which bounds the multiprocessors that it takes from others.

    `source` and `target` are int64[words]; `table` is that of `plan_share`, brought to the device. Only the `tiles`
    [first, last), all by default, are copied, and added to `digests` int64[n]. Runs on the current stream of the
    current device, which is the target's; nothing waits.
    """
    first, last = tiles if tiles is not None else (0, share.tiles)
    if not target.is_cuda:
        spans = _tiles(table.numpy(), first, last)
        reference.copy_spans(source, target, spans)
        digests += reference.digest_spans(source, spans)
        return
    from pd.kernels.spans_triton import run_share

    if last > first:
        run_share(source, target, digests, table, share.alignment, (first, last), min(programs, last - first), form)


def _tiles(table: I64, first: int, last: int) -> I64:
    """int64[n, 4]: the part of each span of a share's table that lies in these tiles, in words."""
    spans, tile = table[:4, :-1].T.copy(), TILE_ROWS * RUN
    start = table[4, :-1] * tile + (spans[:, 3] & (RUN - 1))  # of each span, on the line of all tiles
    skipped = np.clip(first * tile - start, 0, spans[:, 2])
    spans[:, 2] = np.clip(last * tile - start, skipped, spans[:, 2]) - skipped
    spans[:, [0, 1, 3]] += skipped[:, None]
    return spans


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
