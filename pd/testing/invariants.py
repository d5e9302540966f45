"""What must hold of a scheduler's requests after every event, whatever happened: its indices say the same."""

from __future__ import annotations

from collections import Counter

from pd.scheduler.report import books
from pd.scheduler.request import Family, Request, State
from pd.scheduler.state import Scheduler

#: Inside the runner, or about to be.
COMPUTED = (State.PREFILL, State.RUNNING)


def check_scheduler(scheduler: Scheduler) -> None:
    """Raises AssertionError. The books of blocks and hand-offs, and the requests against queue, batch and families."""
    core = scheduler.core
    if core is None:
        return
    found = books(core, scheduler.decode, scheduler.prefill)
    assert found["balanced"], found
    requests = list(core.requests.values())
    for request in requests:
        check_request(scheduler, request)
    for key, family in core.families.items():
        check_family(scheduler, key, family)
    workers = Counter(request.worker for request in requests if request.remote is None)
    assert workers == core.workers, f"{workers} requests of workers, {core.workers} counted"
    count = sum(request.slots for request in requests if request.state in COMPUTED)
    assert count == core.batcher.count, f"{count} slots are taken, {core.batcher.count} counted"
    asked = sum(request.slots for request in requests if request.handoff is not None)
    assert scheduler.decode is None or asked == scheduler.decode.asked, f"{asked} slots are asked for"
    queued = {request.key for request in core.waiting}
    held = {request.key for request in requests if request.state is State.WAITING} - queued
    assert len(core.waiting) == len(queued) and core.waiting.tokens == sum(r.known for r in core.waiting)
    assert all(core.requests[key].sampling.grammar for key in held), "a request waits for nothing"
    assert core.grammars.held == len(held), f"{core.grammars.held} wait for their grammar, {len(held)} should"


def check_request(scheduler: Scheduler, request: Request) -> None:
    name, state = f"{request.rid} ({request.state.value})", request.state
    assert state is not State.GONE, f"{name} is known"
    assert (request.handoff is not None) == (state is State.ASKED), f"{name}: hand-off {request.handoff}"
    assert (state is State.LEG) <= (scheduler.prefill is not None and request.room >= 0), name
    assert (state is State.PUSHING) <= (request.remote is not None), name
    assert len(request.tokens) == 4 * (request.prompt_len + request.emitted), name
    if state in (State.LANDING, State.LEG):
        assert not request.blocks, f"{name} holds {request.blocks}"
    if state is State.LANDING:
        family = request.family
        assert family is not None and family.prompt is not None and family.prompt.handoff is not None, name


def check_family(scheduler: Scheduler, key: int, family: Family) -> None:
    core, prompt = scheduler.core, family.prompt
    assert core is not None
    assert prompt is not None or family.members, f"nobody is left of request {key}"
    if prompt is not None:
        assert core.requests.get(key) is prompt and prompt.family is family and not prompt.emitted
        assert bool(family.members) == prompt.started, "its choices are there from its first tokens on"
    for index, choice in family.members.items():
        assert choice.choice == index and choice.family is family and choice.choices == 1
        assert choice.client_key == key and core.requests.get(choice.key) is choice
