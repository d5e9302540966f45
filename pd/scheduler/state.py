"""The scheduler as a pure state machine: `handle(event) -> actions`.

No await, no clock, no socket, no torch. Events are facts (`events.py`), actions are orders (`actions.py`); the shell
(`service.py`) only moves them. The parts: `batch.py` decides what a step computes, `handoff` whom to ask and when
memory is quiet, `admission.py` what enters; this module knows what tokens and failures mean for a request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from pd.messages import Answer, Finish, FirstChoice, FirstToken, LogprobRow, StepDone, Submit, TokenLogprobs
from pd.scheduler import events as ev
from pd.scheduler import failures, report
from pd.scheduler.actions import Action, Exit, Reply, RunStep, Transfer
from pd.scheduler.admission import Admission
from pd.scheduler.batch import Chunk, InFlight
from pd.scheduler.choices import Choices, name_rows, of_each
from pd.scheduler.core import Core, SchedulerSettings
from pd.scheduler.decode_side import DecodeSide
from pd.scheduler.operate import Operator
from pd.scheduler.prefill_side import PrefillSide, split_digests
from pd.scheduler.profile import Profiling
from pd.scheduler.request import ALL_BUT_LAST, Request, State
from pd.scheduler.transfer_watch import TransferWatch
from pd.types import MAX_CHOICES, FinishReason, InstanceState, Role

#: A tick that is late by more, seconds, judges nobody: the runner may have answered while this process stood still.
LATE_TICK = 1.0


class Scheduler:
    """One instance's scheduler. Starting until the runner is up, then Ready, Draining after `DrainRequested`."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.settings = settings
        self.state = InstanceState.STARTING
        self.out: list[Action] = []
        self.core: Core | None = None
        self.decode: DecodeSide | None = None
        self.prefill: PrefillSide | None = None
        self.admission: Admission | None = None
        self.choices: Choices | None = None
        self._reporter: report.Reporter | None = None
        self._watch: TransferWatch | None = None
        self._drain_by = float("inf")
        self._exited = False
        self.operator, self.profiling = Operator(self.out), Profiling(self.out)
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.RequestSubmitted: self._submitted,
            ev.AbortRequested: self._abort,
            ev.Asked: self._asked,
            ev.Commanded: self.operator.command,
            ev.ProfileAsked: self.profiling.asked,
            ev.ApiLost: self._api_lost,
            ev.DrainRequested: self._drain,
            ev.RunnerUp: self._runner_up,
            ev.StepFinished: self._step_finished,
            ev.GrammarCompiled: self._grammar_compiled,
            ev.ProfileSaid: self.profiling.said,
            ev.RunnerDied: self._runner_died,
            ev.TransferSaid: self._transfer_said,
            ev.HelloReceived: self._hello,
            ev.SessionUp: self._session_up,
            ev.SessionRefused: self._session_refused,
            ev.SessionDown: self._session_down,
            ev.PeerSaid: self._peer_said,
            ev.Tick: self._tick,
        }

    def handle(self, event: ev.Event) -> list[Action]:
        """Apply one fact; returns the orders that follow from it, to be carried out in order."""
        self._handlers[type(event)](event)
        core = self.core
        if core is not None and not self._exited:
            now = event.now
            if self.prefill is not None:
                self.prefill.let_go(now)
            self._notices(now)
            assert self.admission is not None
            if not self.operator.paused:
                self.admission.run(now)
                self._notices(now)
            while not self.operator.paused and (order := core.batcher.order(now)) is not None:
                self.out.append(RunStep(order))
                if self.prefill is not None:
                    self.prefill.handoffs.ordered(order.step)
            core.outputs.flush(self.out)
            if self.decode is not None:
                self.decode.tell_legs(now)
            if self.state is InstanceState.DRAINING:
                self._maybe_exit(now)
        out = self.out[:]
        self.out.clear()  # the parts hold on to this very list
        if self._watch is not None:
            for action in out:
                if isinstance(action, Transfer):
                    self._watch.sent(event.now, action.command)
        return out

    # --- the instance ---

    def _runner_up(self, event: ev.RunnerUp) -> None:
        core = self.core = Core(self.settings, event.ready, self.out)
        self.decode, self.prefill = report.make_sides(core, event.ready)
        self.admission = Admission(core, self.decode, self.prefill)
        self.choices = Choices(core, self.decode)
        self._reporter = report.Reporter(core, self.decode, self.prefill)
        self.operator.attach(core, self.choices, self._reporter, self.admission)
        self.profiling.attach()
        if self.settings.role is not Role.UNIFIED:
            self._watch = TransferWatch((event.ready.rank,), self.settings.scheduler.step_timeout)
        if self.state is InstanceState.STARTING:
            self.state = InstanceState.READY
        core.log("ready", blocks=core.pool.total, tokens=core.capacity_tokens)
        self._reporter.publish(event.now, self.state, force=True)

    def _runner_died(self, event: ev.RunnerDied) -> None:
        """Nothing can be computed or received any more: everything ends with a clear error, then the instance."""
        self._end_all(event.now, f"the instance's runner died: {event.reason}", 500)
        self._exit(1, event.reason)

    def _drain(self, event: ev.DrainRequested) -> None:
        self.state = InstanceState.DRAINING
        self._drain_by = event.now + event.bound
        self.operator.drain()
        if self.core is None or self._reporter is None:
            self._exit(0, "drained before it was ready")
        else:
            self._reporter.publish(event.now, self.state, force=True)
        if self.prefill is not None:
            self.prefill.drain()

    def _maybe_exit(self, now: float) -> None:
        core = self.core
        assert core is not None
        quiet = self.prefill is None or self.prefill.handoffs.quiet
        quiet = quiet and (self.decode is None or self.decode.handoffs.quiet)
        if not core.requests and not core.batcher.busy and quiet:
            self._exit(0, "drained")
        elif now >= self._drain_by:
            self._end_all(now, "the instance was stopped before the request was done", 503)
            self._exit(0, "drain bound passed")

    def _end_all(self, now: float, reason: str, status: int) -> None:
        core = self.core
        if core is None:
            return
        for request in list(core.requests.values()):
            if request.remote is not None:
                assert self.prefill is not None
                self.prefill.handoffs.fail(now, request.remote, reason, retryable=True)
            else:
                self._end(now, request, Finish(FinishReason.ERROR, message=reason, status=status))
        core.outputs.flush(self.out)

    def _exit(self, code: int, reason: str) -> None:
        if not self._exited:
            self._exited = True
            self.state = InstanceState.DRAINING  # until the process has ended
            for side in (self.decode, self.prefill):
                if side is not None:
                    side.handoffs.goodbye(reason)
            self.out.append(Exit(code, reason))

    # --- api ---

    def _submitted(self, event: ev.RequestSubmitted) -> None:
        submit, core = event.submit, self.core
        if core is None or self.state is not InstanceState.READY:
            word = "draining" if self.state is InstanceState.DRAINING else "starting"
            self._reject(submit, 503, f"the instance is {word}", code=word)
            return
        tokens = len(submit.tokens_i32) // 4
        problem = self._problem(submit, tokens, core)
        if problem is not None:
            self._reject(submit, *problem)
            return
        request = Request(submit.key, submit.rid, submit.tokens_i32, tokens, submit.sampling)
        left = min(core.capacity_tokens, self.settings.context_length) - tokens
        request.max_tokens = submit.sampling.max_tokens or left
        if not submit.sampling.max_tokens:
            request.sampling = msgspec.structs.replace(submit.sampling, max_tokens=left)
        request.choices = submit.choices
        request.logprob_start = submit.logprob_start
        request.prompt_top_logprobs = submit.prompt_top_logprobs
        request.prefills, request.salt, request.room = submit.prefills, submit.salt, submit.room
        request.priority, request.probe = submit.priority, submit.probe
        request.idle_timeout = submit.idle_timeout_ms / 1000
        if submit.client_timeout_ms is not None:
            request.deadline = event.now + submit.client_timeout_ms / 1000
        if self.prefill is not None and not request.probe:
            self.prefill.leg_came(event.now, request)
            return
        core.add(request, event.now)
        if self.decode is not None:
            self.decode.has_leg(request)

    def _problem(self, submit: Submit, tokens: int, core: Core) -> tuple[int, str, str | None, str | None] | None:
        """(status, message, param, code) when the request can never be served here."""
        if self.settings.role is Role.PREFILL and submit.room < 0 and not submit.probe:
            return 400, "this is a prefill instance: send requests to a decode instance or the router", None, None
        most = MAX_CHOICES
        if self.settings.role is not Role.PREFILL:  # decode alone knows how much it can run
            most = min(most, self.settings.scheduler.max_running_requests)
        if not 1 <= submit.choices <= most:
            return 400, f"n must be between 1 and {most} here, got {submit.choices}", "n", None
        if tokens < 1:
            return 400, "the prompt is empty", "prompt", None
        strange = core.strange_token(submit.tokens_i32)
        if strange is not None:
            return 400, f"token id {strange} is outside the vocabulary of {core.vocab_size}", "prompt", None
        bound = min(core.capacity_tokens, self.settings.context_length)
        if tokens >= bound:
            message = f"the prompt has {tokens} tokens; at most {bound - 1} fit beside one output token"
            return 400, message, "prompt", "context_length_exceeded"
        if tokens + submit.sampling.max_tokens > bound and self.settings.role is not Role.PREFILL:
            message = f"prompt ({tokens}) and max_tokens ({submit.sampling.max_tokens}) exceed {bound} tokens"
            return 400, message, "max_tokens", "context_length_exceeded"
        waiting = len(core.waiting) + core.grammars.held if self.prefill is None else self.prefill.rooms.legs
        if waiting >= self.settings.scheduler.max_queued_requests:
            return 503, f"{waiting} requests are waiting already; try again later", None, "overloaded"
        return None

    def _reject(
        self, submit: Submit, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        self.out.append(report.rejection(submit.key, status, message, param, code))
        if self.decode is not None:
            self.decode.refused(submit, status, message)

    def _abort(self, event: ev.AbortRequested) -> None:
        if self.choices is not None:
            finish = Finish(FinishReason.ABORT, message=event.reason, status=499)
            self.choices.abort(event.now, event.key, event.choice, finish)

    def _api_lost(self, event: ev.ApiLost) -> None:
        if self.core is not None:
            for request in [r for r in self.core.requests.values() if r.worker == event.worker and r.remote is None]:
                self._end(event.now, request, Finish(FinishReason.ABORT, message="the api worker died", status=499))

    def _end(self, now: float, request: Request, finish: Finish) -> None:
        """A client's request ends, with all of its choices, for a reason outside of its tokens."""
        assert self.choices is not None
        self.choices.end_all(now, request, finish)

    def _asked(self, event: ev.Asked) -> None:
        if self._reporter is None:
            data: dict[str, object] = {"error": "the instance is starting"}
        else:
            data = self._reporter.answer(event.ask.what)
        self.out.append(Reply(event.worker, Answer(event.ask.token, data)))

    # --- steps ---

    def _step_finished(self, event: ev.StepFinished) -> None:
        core, done = self.core, event.done
        assert core is not None, "a step cannot finish before the runner is up"
        flight = core.batcher.finished(event.now, done)
        if self.prefill is not None:
            self.prefill.handoffs.step_done(done.step)
        core.stats.steps += 1
        core.stats.compute_us += done.compute_us
        if done.failed:
            failures.rows_failed(core, self.prefill, event.now, flight, done)
            self._notices(event.now)
        count = len(flight.decode)
        if count:
            self._decoded(event.now, flight, done)
        if flight.chunks:
            self._chunks_done(event.now, flight, done)

    def _grammar_compiled(self, event: ev.GrammarCompiled) -> None:
        assert self.core is not None, "only a runner that is up can have compiled"
        failures.grammar_compiled(self.core, self.prefill, event)

    def _decoded(self, now: float, flight: InFlight, done: StepDone) -> None:
        """One token for each decode row, unless it left meanwhile."""
        core = self.core
        assert core is not None
        count = len(flight.decode)
        raw = done.tokens_i32
        tokens = np.frombuffer(raw, dtype="<i4", count=count).tolist()
        ended: list[tuple[Request, int]] = []
        late = 0
        at = 0
        for request, epoch, token in zip(flight.decode, flight.epochs, tokens, strict=True):
            if request.epoch == epoch:
                request.tokens += raw[at : at + 4]
                request.emitted += 1
                request.heard_at = now
                if token in request.stops or request.emitted >= request.max_tokens:
                    ended.append((request, token))
            else:
                late += 1
            at += 4
        rows = done.logprobs
        if flight.chunks and rows:
            rows = [row for row in rows if row.index < count]
        if not late and len(core.workers) == 1:
            worker = flight.decode[0].worker
            keys, choices = done.keys_i64[: 8 * count], b""
            if core.families:
                keys, choices = name_rows(keys)
            core.outputs.forward(worker, keys, choices, done.counts_u8[:count], raw[: 4 * count], rows)
        else:
            self._rows_one_by_one(flight, raw, rows)
            core.stats.late_tokens += late
        for request, token in ended:
            finish = request.finish_of(token)
            assert finish is not None
            core.finish(request, finish)

    def _rows_one_by_one(self, flight: InFlight, raw: bytes, rows: list[LogprobRow]) -> None:
        assert self.core is not None
        logprobs = {row.index: row.logprobs for row in rows}
        for index, (request, epoch) in enumerate(zip(flight.decode, flight.epochs, strict=True)):
            if request.epoch == epoch:
                self.core.outputs.row(request, raw[4 * index : 4 * index + 4], logprobs.get(index))

    def _chunks_done(self, now: float, flight: InFlight, done: StepDone) -> None:
        core = self.core
        assert core is not None
        logprobs = {row.index: row.logprobs for row in done.logprobs}
        prompts = {row.index: row.logprobs for row in done.prompt_logprobs}
        counts = done.counts_u8
        at = sum(counts[: len(flight.decode)])
        for chunk, digests in zip(flight.chunks, split_digests(done, flight.chunks), strict=True):
            size = counts[chunk.row]
            raw, at = done.tokens_i32[4 * at : 4 * (at + size)], at + size
            request = chunk.request
            if request.epoch != chunk.epoch:
                core.stats.late_tokens += size
                continue
            if chunk.row in prompts:
                request.prompt_logprobs.append(prompts[chunk.row])
            if request.remote is not None:
                assert self.prefill is not None
                tokens = np.frombuffer(raw, dtype="<i4").tolist()
                self.prefill.chunk_done(now, chunk, digests, tokens, of_each(logprobs.get(chunk.row), size))
            else:
                self._local_chunk_done(now, chunk, raw, logprobs.get(chunk.row))

    def _local_chunk_done(self, now: float, chunk: Chunk, raw: bytes, logprobs: TokenLogprobs | None) -> None:
        core, request = self.core, chunk.request
        assert core is not None
        request.done = chunk.end
        core.batcher.cache(request, chunk.end)
        if chunk.last:
            request.done = ALL_BUT_LAST
            if request.choices > 1:
                assert self.choices is not None
                tokens = np.frombuffer(raw, dtype="<i4").tolist()
                self.choices.first(now, request, tokens, of_each(logprobs, len(tokens)))
            else:
                self._first(now, request, raw, logprobs)

    def _first(self, now: float, request: Request, raw: bytes, logprobs: TokenLogprobs | None) -> Finish | None:
        """The first token of this attempt, wherever it was sampled. An emitted token is a fact."""
        core = self.core
        assert core is not None
        token = int.from_bytes(raw[:4], "little", signed=True)
        request.tokens += raw[:4]
        request.emitted += 1
        request.heard_at = now
        if not request.started:
            core.outputs.started(request)
        core.outputs.row(request, raw[:4], logprobs)
        finish = request.finish_of(token)
        if request.leg:
            assert self.decode is not None
            self.decode.answer_leg(request, [FirstChoice(token, logprobs, finish)])
        if finish is not None:
            if self.decode is not None:
                self.decode.drop(now, request, "finished with its first token")
            core.finish(request, finish)
        return finish

    # --- peers ---

    def _first_token(self, now: float, request: Request, message: FirstToken) -> None:
        assert self.decode is not None and self.choices is not None
        if not request.started:
            request.cached = message.cached_tokens
            if message.prompt_logprobs is not None:
                request.prompt_logprobs = [message.prompt_logprobs]
        if request.choices > 1:
            choices = message.choices
            self.choices.first(now, request, [c.token for c in choices], [c.logprobs for c in choices])
        else:
            first = message.choices[0]
            self._first(now, request, first.token.to_bytes(4, "little", signed=True), first.logprobs)
        self.decode.heard(request)

    def _notices(self, now: float) -> None:
        for side in (self.prefill, self.decode):
            while side is not None and (notices := side.handoffs.take_notices()):
                assert self.admission is not None
                self.admission.peers_changed()
                for notice in notices:
                    if isinstance(side, PrefillSide):
                        side.notice(now, notice)
                    else:
                        came = side.notice(now, notice)
                        if came is not None:
                            self._first_token(now, *came)

    def _transfer_said(self, event: ev.TransferSaid) -> None:
        if self._watch is not None:
            self._watch.answered(event.now, event.event)
        for side in (self.prefill, self.decode):
            if side is not None:
                side.handoffs.transfer_said(event.now, event.event)

    def _hello(self, event: ev.HelloReceived) -> None:
        if self.prefill is None:
            self.out.append(report.not_a_prefill(event.conn, self.state))
        else:
            self.prefill.handoffs.hello(event.now, event.conn, event.hello)

    def _session_up(self, event: ev.SessionUp) -> None:
        if self.decode is not None:
            self.decode.handoffs.session_up(event.now, event.endpoint, event.welcome)
            self.decode.session_up(event.now, event.endpoint)
        self._peers_changed()

    def _session_refused(self, event: ev.SessionRefused) -> None:
        if self.decode is not None:
            self.decode.handoffs.session_refused(event.now, event.endpoint, event.reason, event.permanent)
            self.decode.session_decided()
        self._peers_changed()

    def _session_down(self, event: ev.SessionDown) -> None:
        for side in (self.prefill, self.decode):
            if side is not None:
                side.handoffs.session_down(event.now, event.session, event.reason)
        self._peers_changed()

    def _peer_said(self, event: ev.PeerSaid) -> None:
        side = self.prefill if self.prefill is not None else self.decode
        if side is not None:
            side.handoffs.peer_said(event.now, event.session, event.message)
        self._peers_changed()

    def _peers_changed(self) -> None:
        if self.admission is not None:
            self.admission.peers_changed()

    # --- time ---

    def _hung(self, core: Core, now: float) -> str:
        """Why the runner is taken for dead although its connection stands, or ""."""
        flights, bound = core.batcher.inflight, self.settings.scheduler.step_timeout
        since = self.profiling.quiet_since(now)
        if flights and now - max(flights[0].at, since) > bound:
            return f"step {flights[0].step} takes longer than {bound:g} s"
        return self._watch.problem(now, since) if self._watch is not None else ""

    def _tick(self, event: ev.Tick) -> None:
        if self._exited:
            return  # the sessions have been closed, and none is to be opened
        core = self.core
        if core is None:
            if event.now >= self._drain_by:
                self._exit(0, "drain bound passed")
            return
        core.stats.lags.append(event.lag)
        hung = self._hung(core, event.now) if event.lag <= LATE_TICK else ""
        if hung:
            self._runner_died(ev.RunnerDied(event.now, hung))
            return
        for request in core.expired(event.now):
            waited = event.now - request.heard_at
            message = f"deadline passed in state {request.state.value}, {waited:.1f} s after its last token"
            self._end(event.now, request, Finish(FinishReason.ERROR, message=message, status=504))
        for side in (self.prefill, self.decode):
            if side is not None:
                side.handoffs.tick(event.now)
        if self.prefill is not None:
            self.prefill.tick(event.now)
        assert self._reporter is not None
        self._reporter.publish(event.now, self.state)
        assert self.admission is not None
        self.admission.look_again()
        self._reporter.audit_when_idle(event.now)
        self._peers_changed()


__all__ = ["Scheduler", "SchedulerSettings", "State"]
