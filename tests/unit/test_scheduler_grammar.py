"""Requests with a grammar wait until the runner has compiled it, and fail alone when it cannot be used."""

from __future__ import annotations

import random

import pytest

from pd import messages as m
from pd.scheduler import events as ev
from pd.scheduler.actions import CompileGrammar
from pd.scheduler.core import Core
from pd.scheduler.grammars import REMEMBERED
from pd.testing.instance import Client, Instance, settings
from pd.testing.sim_cluster import SimCluster, SimConfig
from pd.types import FinishReason


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def asked(instance: Instance) -> list[m.GrammarCompile]:
    return [action.message for action in instance.actions if isinstance(action, CompileGrammar)]


def compiled(instance: Instance, number: int, problem: str = "") -> None:
    instance.handle(ev.GrammarCompiled(instance.now, number, problem))


def error_of(client: Client) -> m.Finish:
    assert client.finish is not None and client.finish.reason is FinishReason.ERROR
    return client.finish


def core_of(instance: Instance) -> Core:
    assert instance.scheduler.core is not None
    return instance.scheduler.core


# --- the gate -------------------------------------------------------------------------------------------------------


def test_a_request_waits_for_its_grammar_and_nobody_waits_for_it() -> None:
    instance = Instance()
    slow = instance.submit(1, prompt(5), 4, grammar="g")
    other = instance.submit(2, prompt(6), 4)
    instance.run()
    assert len(other.tokens) == 4 and not slow.tokens
    assert [(one.number, one.grammar) for one in asked(instance)] == [(1, "g")]
    compiled(instance, 1)
    instance.run()
    assert len(slow.tokens) == 4


def test_a_grammar_is_asked_for_once_while_it_is_remembered() -> None:
    instance = Instance()
    clients = [instance.submit(key, prompt(5, key), 2, grammar="g") for key in (1, 2)]
    assert len(asked(instance)) == 1
    compiled(instance, 1)
    clients.append(instance.submit(3, prompt(5, 3), 2, grammar="g"))
    instance.run()
    assert [len(client.tokens) for client in clients] == [2, 2, 2] and len(asked(instance)) == 1
    for number in range(2, REMEMBERED + 2):
        instance.submit(100 + number, prompt(5, number), 1, grammar=f"g{number}")
        compiled(instance, number)
    instance.run()
    instance.submit(4, prompt(5, 4), 1, grammar="g")
    assert asked(instance)[-1].grammar == "g", "it was the oldest"


def test_the_grammar_that_is_forgotten_is_the_one_that_was_not_used_for_longest() -> None:
    instance = Instance()
    for number in range(1, REMEMBERED + 2):
        if number == REMEMBERED + 1:
            instance.submit(1000, prompt(5), 1, grammar="g1")  # used again
        instance.submit(number, prompt(5, number), 1, grammar=f"g{number}")
        compiled(instance, number)
    count = len(asked(instance))
    instance.submit(2001, prompt(5), 1, grammar="g1")
    assert len(asked(instance)) == count
    instance.submit(2002, prompt(5), 1, grammar="g2")
    assert asked(instance)[-1].grammar == "g2"


def test_a_grammar_that_cannot_be_used_is_the_clients_error() -> None:
    instance = Instance()
    clients = [instance.submit(key, prompt(5, key), 2, grammar="g") for key in (1, 2)]
    compiled(instance, 1, "unknown special token")
    for client in clients:
        finish = error_of(client)
        assert finish.status == 400 and "unknown special token" in finish.message
    instance.submit(3, prompt(5), 2, grammar="g")
    assert len(asked(instance)) == 2, "a failure is not remembered"


def test_one_that_ends_while_it_waits_for_its_grammar_stays_ended() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 2, grammar="g")
    late = instance.submit(2, prompt(5), 2, grammar="g", client_timeout_ms=1000)
    instance.handle(ev.AbortRequested(0.0, 1, "gone"))
    instance.tick(2.0)
    assert client.finish is not None and client.finish.reason is FinishReason.ABORT
    assert error_of(late).status == 504
    compiled(instance, 1)
    assert not instance.runner.pending
    instance.audit()


def test_waiting_for_a_grammar_counts_as_waiting() -> None:
    instance = Instance()
    limit = instance.config.scheduler.max_queued_requests
    for key in range(limit):
        instance.submit(key, prompt(3, key), 1, grammar="g")
    refused = instance.submit(limit, prompt(3), 1, grammar="g")
    assert refused.rejected is not None and refused.rejected.status == 503


def test_those_that_end_while_they_wait_for_their_grammar_do_not_count_as_waiting() -> None:
    instance = Instance(settings(max_queued_requests=2))
    for key in range(6):
        client = instance.submit(key, prompt(3, key), 1, grammar="g")
        assert client.rejected is None
        instance.handle(ev.AbortRequested(0.0, key, "gone"))
    last = instance.submit(9, prompt(3), 1, grammar="g")
    compiled(instance, 1)
    instance.run()
    assert len(last.tokens) == 1 and core_of(instance).grammars.held == 0


@pytest.mark.parametrize("choice", [0, 1])
def test_a_choice_that_is_ended_while_the_grammar_is_compiled_does_not_go_on(choice: int) -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 4, grammar="g", choices=2)
    instance.handle(ev.AbortRequested(0.0, 1, "not wanted", choice))
    compiled(instance, 1)
    instance.run()
    assert [len(c.tokens) for c in client.choices] == ([1, 4] if choice == 0 else [4, 1])
    assert client.ended and not core_of(instance).families


def test_every_choice_has_one_end_when_their_grammar_cannot_be_used() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(5), 4, grammar="g", choices=3)
    compiled(instance, 1, "unknown special token")
    assert [error_of(choice).status for choice in client.choices] == [400, 400, 400]
    assert not core_of(instance).requests and not core_of(instance).families


# --- rows that fail -------------------------------------------------------------------------------------------------


def test_a_row_that_fails_ends_its_request_and_no_other() -> None:
    for length in (3, 11):  # with its prompt's only chunk, and with a later one
        instance = Instance()
        instance.runner.fails = "g"
        other = instance.submit(1, prompt(5), 6)
        client = instance.submit(2, prompt(length), 6, grammar="g")
        compiled(instance, 1)
        instance.run()
        assert len(other.tokens) == 6
        assert not client.tokens and error_of(client).status == 400
        assert "no token fits" in error_of(client).message
        assert instance.audit()["owned"] == 0


def test_a_row_that_fails_while_decoding_gives_none_of_its_tokens_out() -> None:
    instance = Instance()
    other = instance.submit(1, prompt(5), 9)
    client = instance.submit(2, prompt(5, 2), 9, grammar="g")
    compiled(instance, 1)
    while len(client.tokens) < 3:
        instance.finish_step()
    instance.runner.fails = "g"
    instance.run()
    assert error_of(client).status == 400 and len(client.tokens) == 3 and len(other.tokens) == 9
    assert instance.audit()["owned"] == 0


def test_when_the_row_of_a_prompt_fails_every_choice_has_one_end() -> None:
    instance = Instance()
    instance.runner.fails = "g"
    other = instance.submit(1, prompt(5), 6)
    client = instance.submit(2, prompt(7), 6, grammar="g", choices=3)
    compiled(instance, 1)
    instance.run()
    assert [error_of(choice).status for choice in client.choices] == [400, 400, 400]
    assert len(other.tokens) == 6 and not core_of(instance).families and instance.audit()["owned"] == 0


def test_a_choice_whose_row_fails_ends_alone() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(7), 9, grammar="g", choices=3)
    compiled(instance, 1)
    for _ in range(3):
        instance.finish_step()
    count = len(client.tokens)
    order = instance.runner.pending[0]
    done = instance.runner.finish()
    done.failed = [m.FailedRow(order.rows_i64.index((1 + (2 << 54)).to_bytes(8, "little")) // 8, "no token fits")]
    instance.handle(ev.StepFinished(0.0, done))
    instance.run()
    assert [len(choice.tokens) for choice in client.choices] == [9, count, 9]
    assert error_of(client.choices[1]).status == 400 and not core_of(instance).families
    assert instance.audit()["owned"] == 0


def test_a_row_that_fails_after_its_request_was_retracted_is_late() -> None:
    instance = Instance()
    client = instance.submit(1, prompt(7), 6, grammar="g", choices=2)
    compiled(instance, 1)
    for _ in range(3):
        instance.finish_step()
    instance.runner.fails = "g"
    instance.handle(ev.Commanded(0.0, 0, m.Pause(1, "retract")))
    instance.run()
    assert not client.ended, "nobody waits for what failed"
    instance.runner.fails = ""
    instance.handle(ev.Commanded(0.0, 0, m.Continue(2)))
    instance.run()
    assert [len(choice.tokens) for choice in client.choices] == [6, 6]
    assert instance.audit()["owned"] == 0


# --- prefill and decode ---------------------------------------------------------------------------------------------


def world() -> SimCluster:
    options: dict[str, object] = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": "never"}
    return SimCluster(1, SimConfig(2, 1, scheduler=options, control={"heartbeat_interval": 0.5}))


def test_both_instances_compile_before_they_admit() -> None:
    sim = world()
    clients = [sim.submit(sim.nodes["d0"], prompt(19, n), 5, grammar="g") for n in range(3)]
    assert sim.settle(20)
    sim.check_answers()
    assert [len(client.tokens) for client in clients] == [5, 5, 5]
    sim.run(sim.now + 1.0)
    sim.check_rest()


def test_what_the_prefill_instances_runner_cannot_constrain_is_an_error_and_not_tried_elsewhere() -> None:
    for cause in ("compile", "sample"):
        sim = world()
        if cause == "compile":
            sim.nodes["p0"].no_grammar = "no token fits"
        else:
            sim.nodes["p0"].runner.fails = "g"
        client = sim.submit(sim.nodes["d0"], prompt(19), 5, grammar="g")
        other = sim.submit(sim.nodes["d0"], prompt(19, 2), 5)
        assert sim.settle(20), "a request never ended"
        assert error_of(client).status == 400 and "no token fits" in error_of(client).message
        assert len(other.tokens) == 5 and sim.nodes["p1"].scheduler.core is not None
        assert sim.nodes["p1"].scheduler.core.stats.steps == 0
        sim.run(sim.now + 1.0)
        sim.check_rest()


@pytest.mark.parametrize("cause", ["compile", "sample"])
def test_what_a_prefill_instance_cannot_constrain_ends_every_choice_once(cause: str) -> None:
    sim = world()
    if cause == "compile":
        sim.nodes["p0"].no_grammar = "no token fits"
    else:
        sim.nodes["p0"].runner.fails = "g"
    client = sim.submit(sim.nodes["d0"], prompt(19), 5, grammar="g", choices=3)
    assert sim.settle(20), "a request never ended"
    assert [error_of(choice).status for choice in client.choices] == [400, 400, 400]
    sim.run(sim.now + 1.0)
    sim.check_rest()


def test_a_hand_off_that_is_cancelled_while_the_prefill_instance_compiles_leaves_nothing_there() -> None:
    sim = world()
    sim.config.compile_time = (0.2, 0.2)
    client = sim.submit(sim.nodes["d0"], prompt(19), 5, grammar="g", choices=2)
    sim.run(0.3)
    core = sim.nodes["p0"].scheduler.core
    assert core is not None and core.grammars.held == 1
    sim.abort(client)
    sim.run(0.35)
    assert core.grammars.held == 0 and not core.requests
    sim.run(1.0)
    sim.check_rest()
