"""Digests of spans of memory: the position-keyed sum of `pd.transfer.digest`, where the memory is."""

from __future__ import annotations

import numpy as np
import torch

from pd.kernels import reference
from pd.kernels.spans import I64, as_words, span_words


def digest_spans(memory: torch.Tensor, spans: I64) -> torch.Tensor:
    """int64[n] on the memory's device, whose bits are the digests' uint64.

    `spans` int64[n, 3], on the host: offset and length in bytes, and the position of the span's first word in its
    block, in words. A length that is no multiple of 8 is a ValueError, as is a span outside the memory.
    """
    words = as_words(memory)
    table = np.zeros((len(spans), 4), dtype=np.int64)
    table[:, 0] = span_words("spans", words, spans[:, 0], spans[:, 1])
    table[:, 2], table[:, 3] = spans[:, 1] // 8, spans[:, 2]
    if not memory.is_cuda:
        return reference.digest_spans(words, table)
    from pd.kernels.spans_triton import run_pass

    digests = torch.zeros(len(spans), dtype=torch.int64, device=memory.device)
    run_pass(words, None, table, digests)
    return digests
