"""Digests of the pool's blocks on the GPU, behind the step that completes them."""

from __future__ import annotations

import numpy as np
import torch

from pd.kernels.digest import digest_spans
from pd.runner.inputs import Int32
from pd.transfer.digest import DigestGeometry, valid_runs


class PoolDigests:
    """`pd.transfer.digest.digest_blocks`, launched on the current stream and not waited for."""

    def __init__(self, memory: torch.Tensor, geometry: DigestGeometry) -> None:
        """`memory` uint8: the pool's."""
        self._memory, self._geometry = memory, geometry

    def __call__(self, blocks: Int32, tokens: Int32) -> torch.Tensor:
        """int64[n] on the device, the digests' bits. A partial block is many spans, whose digests add up."""
        shape = self._geometry.shape
        tables, owners = [], []
        for index, (block, valid) in enumerate(zip(blocks.tolist(), tokens.tolist(), strict=True)):
            runs = valid_runs(self._geometry, valid, (0, shape.kv_heads)).astype(np.int64)
            runs[:, 0] += block * shape.nbytes
            tables.append(runs)
            owners.append(np.full(len(runs), index, dtype=np.int64))
        spans = digest_spans(self._memory, np.concatenate(tables))
        if len(spans) == len(blocks):
            return spans
        owner = torch.from_numpy(np.concatenate(owners)).to(spans.device, non_blocking=True)
        return torch.zeros(len(blocks), dtype=torch.int64, device=spans.device).index_add_(0, owner, spans)
