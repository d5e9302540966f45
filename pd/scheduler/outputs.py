"""What one event means to the api workers, gathered into one message per worker."""

from __future__ import annotations

import numpy as np

from pd.messages import Finish, Finished, LogprobRow, Started, StepOutputs, TokenLogprobs
from pd.scheduler.actions import Action, Reply
from pd.scheduler.request import Request


class _Rows:
    """Rows of one worker's next message."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.counts = bytearray()
        self.tokens = bytearray()
        self.logprobs: list[LogprobRow] = []
        self.started: list[Started] = []
        self.finished: list[Finished] = []

    def message(self, raw: StepOutputs | None) -> StepOutputs:
        keys = np.array(self.keys, dtype="<i8").tobytes()
        if raw is None:
            return StepOutputs(
                keys,
                bytes(self.counts),
                bytes(self.tokens),
                logprobs=self.logprobs,
                started=self.started,
                finished=self.finished,
            )
        offset = len(raw.counts_u8)
        raw.keys_i64 += keys
        raw.counts_u8 += bytes(self.counts)
        raw.tokens_i32 += bytes(self.tokens)
        raw.logprobs = raw.logprobs + [LogprobRow(row.index + offset, row.logprobs) for row in self.logprobs]
        raw.started, raw.finished = self.started, self.finished
        return raw


class Outputs:
    """Collects during one event; `flush` turns it into actions."""

    def __init__(self) -> None:
        self._rows: dict[int, _Rows] = {}
        self._raw: dict[int, StepOutputs] = {}

    def _of(self, worker: int) -> _Rows:
        rows = self._rows.get(worker)
        if rows is None:
            rows = self._rows[worker] = _Rows()
        return rows

    def forward(self, worker: int, keys: bytes, counts: bytes, tokens: bytes, logprobs: list[LogprobRow]) -> None:
        """A step whose rows all belong to one worker: the runner's arrays travel on as they came."""
        self._raw[worker] = StepOutputs(keys, counts, tokens, logprobs=logprobs)

    def row(self, request: Request, tokens: bytes, logprobs: TokenLogprobs | None) -> None:
        rows = self._of(request.worker)
        if logprobs is not None:
            rows.logprobs.append(LogprobRow(len(rows.keys), logprobs))
        rows.keys.append(request.key)
        rows.counts.append(len(tokens) // 4)
        rows.tokens += tokens

    def started(self, request: Request) -> None:
        request.started = True
        self._of(request.worker).started.append(
            Started(request.key, request.cached, request.prefill_name, request.merged_prompt_logprobs())
        )

    def finished(self, request: Request, finish: Finish) -> None:
        self._of(request.worker).finished.append(Finished(request.key, 0, finish))

    def flush(self, out: list[Action]) -> None:
        if not self._raw and not self._rows:
            return
        for worker in {**self._raw, **self._rows}:
            raw = self._raw.get(worker)
            rows = self._rows.get(worker)
            out.append(Reply(worker, rows.message(raw) if rows is not None else raw))  # type: ignore[arg-type]
        self._raw.clear()
        self._rows.clear()
