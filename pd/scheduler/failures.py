"""What the runner cannot do for one request ends that request, and no other."""

from __future__ import annotations

from pd.messages import StepDone
from pd.scheduler import events as ev
from pd.scheduler.batch import InFlight
from pd.scheduler.core import Core
from pd.scheduler.handoff_base import UNCONSTRAINABLE
from pd.scheduler.prefill_side import PrefillSide
from pd.scheduler.request import Request


def rows_failed(core: Core, prefill: PrefillSide | None, now: float, flight: InFlight, done: StepDone) -> None:
    """Afterwards, once the notices are taken, these rows' tokens count as late."""
    rows = [*zip(flight.decode, flight.epochs, strict=True), *((c.request, c.epoch) for c in flight.chunks)]
    for failed in done.failed:
        request, epoch = rows[failed.index]
        if request.epoch == epoch:
            _refuse(core, prefill, now, request, failed.reason)


def grammar_compiled(core: Core, prefill: PrefillSide | None, event: ev.GrammarCompiled) -> None:
    """The requests that waited for it are queued, or end."""
    for request in core.grammars.compiled(event.number, event.problem):
        if event.problem:
            _refuse(core, prefill, event.now, request, event.problem)
        else:
            core.waiting.push(request)


def _refuse(core: Core, prefill: PrefillSide | None, now: float, request: Request, problem: str) -> None:
    """No other instance could do it either: it is the grammar that is at fault, and so the client."""
    reason = f"{UNCONSTRAINABLE}: {problem}"
    if request.remote is not None:
        assert prefill is not None
        prefill.handoffs.fail(now, request.remote, reason, retryable=False)
    else:
        core.fail(request, reason, 400)
