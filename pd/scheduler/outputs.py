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
        self.choices = bytearray()
        self.counts = bytearray()
        self.tokens = bytearray()
        self.logprobs: list[LogprobRow] = []
        self.started: list[Started] = []
        self.finished: list[Finished] = []

    def message(self, raw: StepOutputs | None) -> StepOutputs:
        keys = np.array(self.keys, dtype="<i8").tobytes()
        choices = bytes(self.choices) if any(self.choices) else b""
        if raw is None:
            return StepOutputs(
                keys,
                bytes(self.counts),
                bytes(self.tokens),
                choices,
                logprobs=self.logprobs,
                started=self.started,
                finished=self.finished,
            )
        offset = len(raw.counts_u8)
        if raw.choices_u8 or choices:
            raw.choices_u8 = (raw.choices_u8 or bytes(offset)) + bytes(self.choices)
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

    def forward(
        self, worker: int, keys: bytes, choices: bytes, counts: bytes, tokens: bytes, logprobs: list[LogprobRow]
    ) -> None:
        """A step whose rows all belong to one worker: the runner's arrays travel on as they came."""
        self._raw[worker] = StepOutputs(keys, counts, tokens, choices, logprobs=logprobs)

    def row(self, request: Request, tokens: bytes, logprobs: TokenLogprobs | None) -> None:
        rows = self._of(request.worker)
        if logprobs is not None:
            rows.logprobs.append(LogprobRow(len(rows.keys), logprobs))
        rows.keys.append(request.client_key)
        rows.choices.append(request.choice)
        rows.counts.append(len(tokens) // 4)
        rows.tokens += tokens

    def started(self, request: Request) -> None:
        request.started = True
        self._of(request.worker).started.append(
            Started(request.client_key, request.cached, request.prefill_name, request.merged_prompt_logprobs())
        )

    def finished(self, request: Request, finish: Finish) -> None:
        """A prompt of several choices ends before it has any: that ends them all."""
        ends = self._of(request.worker).finished
        for choice in range(request.choice, request.choice + request.choices):
            ends.append(Finished(request.client_key, choice, finish))

    def flush(self, out: list[Action]) -> None:
        if not self._raw and not self._rows:
            return
        for worker in {**self._raw, **self._rows}:
            raw = self._raw.get(worker)
            rows = self._rows.get(worker)
            out.append(Reply(worker, rows.message(raw) if rows is not None else raw))  # type: ignore[arg-type]
        self._raw.clear()
        self._rows.clear()
