"""A step's results as the message that carries them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pd.messages import FailedRow, LogprobRow, PromptRow, StepDone, StepOrder
from pd.runner.inputs import Row
from pd.runner.sampler import Sampled


def step_done(
    order: StepOrder,
    rank: int,
    rows: Sequence[Row],
    sampled: Sequence[Sampled | None],
    prompts: list[PromptRow],
    failed: list[FailedRow],
    digests: bytes,
    compute_us: int,
) -> StepDone:
    """`sampled[i]` is row i's, None where it sampled nothing."""
    tokens = [result.tokens if result is not None else [] for result in sampled]
    return StepDone(
        step=order.step,
        rank=rank,
        keys_i64=order.rows_i64,
        epochs_i32=np.array([row.request.epoch for row in rows], dtype=np.int32).tobytes(),
        counts_u8=bytes(len(some) for some in tokens),
        tokens_i32=np.array([token for some in tokens for token in some], dtype=np.int32).tobytes(),
        logprobs=[
            LogprobRow(index, result.logprobs)
            for index, result in enumerate(sampled)
            if result is not None and result.logprobs is not None
        ],
        prompt_logprobs=prompts,
        digests_u64=digests,
        compute_us=compute_us,
        failed=failed,
    )


def failed_rows(rows: Sequence[Row]) -> list[FailedRow]:
    """Those that cannot be sampled any more, as far as is known now."""
    return [
        FailedRow(index, row.request.constraint.problem)
        for index, row in enumerate(rows)
        if row.sample and row.request.constraint is not None and row.request.constraint.problem
    ]
