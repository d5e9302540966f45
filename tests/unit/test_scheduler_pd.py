"""Prefill and decode schedulers together, step by step, on a virtual clock."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pd.api.metrics import Latencies, exposition
from pd.messages import Answer, Ask, Cancel, Failed
from pd.scheduler import events as ev
from pd.scheduler.actions import Exit, OpenSession, Reply, SendPeer
from pd.testing.fake_runner import reference_tokens
from pd.testing.instance import TINY_MODEL, Client, Instance, settings
from pd.testing.sim_cluster import Node, SimCluster, SimConfig
from pd.types import FinishReason, HandoffId, InstanceState, Role, SamplingParams

BLOCK_BYTES = 64


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def world(prefills: int = 1, decodes: int = 1, local: str = "never", **scheduler: object) -> SimCluster:
    options = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": local, **scheduler}
    return SimCluster(1, SimConfig(prefills, decodes, scheduler=options, control={"heartbeat_interval": 0.5}))


def finish(sim: SimCluster, client: Client, rest: float = 1.0) -> Client:
    assert sim.settle(20), "the request never ended"
    sim.check_answers()
    sim.check_digests()
    sim.run(sim.now + rest)
    sim.check_rest()
    return client


def stats(node: Node):  # type: ignore[no-untyped-def]
    assert node.scheduler.core is not None
    return node.scheduler.core.stats


def landed_bytes(node: Node) -> int:
    assert node.scheduler.decode is not None
    return node.scheduler.decode.handoffs.landed_bytes


def test_a_prompt_is_computed_there_lands_here_and_is_decoded_here() -> None:
    sim = world()
    client = finish(sim, sim.submit(sim.nodes["d0"], prompt(19), 9))
    assert client.tokens == reference_tokens(prompt(19), SamplingParams(), 9)
    assert (stats(sim.nodes["p0"]).computed, stats(sim.nodes["d0"]).computed) == (19, 0)
    assert landed_bytes(sim.nodes["d0"]) == 5 * BLOCK_BYTES, "four full blocks and the partial one"
    assert client.started is not None and client.started.prefill == "http://p0"


def test_a_hit_on_the_decode_instance_is_not_pushed_again() -> None:
    sim = world()
    finish(sim, sim.submit(sim.nodes["d0"], prompt(16), 2))
    before = landed_bytes(sim.nodes["d0"])
    sim.nodes["p0"].scheduler.core.prefix.flush()  # type: ignore[union-attr]
    client = finish(sim, sim.submit(sim.nodes["d0"], prompt(16) + prompt(8, 2), 4))
    assert landed_bytes(sim.nodes["d0"]) - before == 2 * BLOCK_BYTES
    assert client.started is not None and client.started.cached_tokens == 0, "the prefill instance computed it all"


def test_a_hit_on_the_prefill_instance_is_pushed_without_being_computed() -> None:
    sim = world(decodes=2)
    finish(sim, sim.submit(sim.nodes["d0"], prompt(16), 2))
    client = finish(sim, sim.submit(sim.nodes["d1"], prompt(16) + prompt(8, 2), 4))
    assert stats(sim.nodes["p0"]).computed == 16 + 8
    assert landed_bytes(sim.nodes["d1"]) == 6 * BLOCK_BYTES
    assert client.started is not None and client.started.cached_tokens == 16


def test_a_hit_on_both_costs_neither_compute_nor_bytes() -> None:
    sim = world()
    finish(sim, sim.submit(sim.nodes["d0"], prompt(16), 2))
    before = landed_bytes(sim.nodes["d0"])
    finish(sim, sim.submit(sim.nodes["d0"], prompt(16) + prompt(8, 2), 4))
    assert stats(sim.nodes["p0"]).computed == 16 + 8
    assert landed_bytes(sim.nodes["d0"]) - before == 2 * BLOCK_BYTES


def test_wanted_prompt_logprobs_are_computed_anew_but_pushed_only_where_they_lack() -> None:
    sim = world(local="short:30")
    finish(sim, sim.submit(sim.nodes["d0"], prompt(32), 2))
    computed, bytes_before = stats(sim.nodes["p0"]).computed, landed_bytes(sim.nodes["d0"])
    finish(sim, sim.submit(sim.nodes["d0"], prompt(32) + prompt(3, 2), 4, logprob_start=0))
    assert stats(sim.nodes["p0"]).computed - computed == 35, "too much for local prefill, which would need it all"
    assert landed_bytes(sim.nodes["d0"]) - bytes_before == BLOCK_BYTES
    assert stats(sim.nodes["d0"]).computed == 0
    finish(sim, sim.submit(sim.nodes["d0"], prompt(32) + prompt(3, 3), 4, logprob_start=20))
    assert stats(sim.nodes["d0"]).computed == 35 - 16, "pages before the position that judges token 20 are used"


def test_a_request_that_ends_with_its_first_token_answers_before_its_blocks_have_landed() -> None:
    sim = world()
    sim.config.write_delay = (2.0, 2.0)
    client = sim.submit(sim.nodes["d0"], prompt(10), 1)
    sim.run(0.2)
    assert client.ended and len(client.tokens) == 1
    finish(sim, client, rest=4.0)


def test_the_first_token_is_emitted_before_the_last_block_has_landed() -> None:
    sim = world()
    sim.config.write_delay = (1.0, 1.0)
    client = sim.submit(sim.nodes["d0"], prompt(10), 5)
    sim.run(0.5)
    assert len(client.tokens) == 1 and not client.ended
    finish(sim, client)


def late_blocks(token_at: float, write: float, **limits: object) -> tuple[SimCluster, Client]:
    """A request whose first token comes at about `token_at` and whose blocks land `write` s later."""
    sim = world()
    finish(sim, sim.submit(sim.nodes["d0"], prompt(4, 9), 1))  # the session is up
    sim.config.step_time, sim.config.write_delay = (token_at, token_at), (write, write)
    client = sim.submit(sim.nodes["d0"], prompt(7), 5, **limits)  # type: ignore[arg-type]
    start = sim.now
    sim.run(start + token_at + 0.1)
    assert len(client.tokens) == 1 and not client.ended
    sim.config.step_time = (0.001, 0.001)
    return sim, client


def test_the_default_deadline_begins_anew_with_the_first_token_of_a_hand_off() -> None:
    sim, client = late_blocks(1.2, 1.5, idle_timeout_ms=2_000)
    finish(sim, client)
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH


def test_without_a_second_token_the_default_deadline_ends_a_hand_off() -> None:
    sim, client = late_blocks(1.2, 9.0, idle_timeout_ms=2_000)
    sim.run(sim.now + 1.7)
    assert not client.ended
    sim.run(sim.now + 0.3)
    assert client.finish is not None and client.finish.status == 504
    finish(sim, client, rest=9.0)


def test_no_token_moves_a_clients_own_deadline() -> None:
    sim, client = late_blocks(1.2, 9.0, timeout=2.0)
    sim.run(sim.now + 0.5)
    assert not client.ended
    sim.run(sim.now + 0.3)
    assert client.finish is not None and client.finish.status == 504
    finish(sim, client, rest=9.0)


def test_chunks_are_pushed_while_the_next_one_computes() -> None:
    sim = world()
    sim.config.step_time = (0.1, 0.1)
    sim.config.write_delay = (0.001, 0.001)
    client = sim.submit(sim.nodes["d0"], prompt(24), 3)
    sim.run(0.25)
    assert stats(sim.nodes["p0"]).steps == 2, "the third chunk is still being computed"
    blocks = next(iter(sim.nodes["d0"].grants.values()))
    assert (sim.nodes["d0"].runner.memory[blocks[:4]] >= 0).all(), "the first two chunks are here"
    assert (sim.nodes["d0"].runner.memory[blocks[4:]] < 0).all()
    finish(sim, client)


def test_retracted_requests_are_replayed_through_prefill() -> None:
    sim = world()
    sim.config.num_blocks = 10
    sim.restart(sim.nodes["d0"])
    clients = [sim.submit(sim.nodes["d0"], prompt(9, key), 20) for key in range(3)]
    for client in clients:
        finish(sim, client)
    core = sim.nodes["d0"].scheduler.core
    assert core is not None and core.batcher.retractions > 0
    assert stats(sim.nodes["d0"]).computed == 0, "never means never, for replays too"


@pytest.mark.parametrize("local", ["fallback", "short:4"])
def test_without_a_prefill_the_decode_instance_computes_itself_under(local: str) -> None:
    sim = world(local=local)
    client = finish(sim, sim.submit(sim.nodes["d0"], prompt(13), 4, prefills=()))
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH
    assert stats(sim.nodes["d0"]).computed == 13


def test_without_a_prefill_never_answers_503() -> None:
    sim = world()
    client = finish(sim, sim.submit(sim.nodes["d0"], prompt(13), 4, prefills=()))
    assert client.finish is not None and client.finish.status == 503
    assert "names none" in client.finish.message


def test_short_counts_the_tokens_that_the_decode_instance_lacks() -> None:
    sim = world(local="short:5")
    finish(sim, sim.submit(sim.nodes["d0"], prompt(16), 2))
    assert stats(sim.nodes["d0"]).computed == 0
    finish(sim, sim.submit(sim.nodes["d0"], prompt(16) + prompt(5, 3), 2))
    assert stats(sim.nodes["d0"]).computed == 5


def test_pending_local_prefill_is_bounded() -> None:
    sim = world(local="fallback", local_prefill_queue=20)
    clients = [sim.submit(sim.nodes["d0"], prompt(18, key), 4, prefills=()) for key in range(4)]
    for client in clients:
        finish(sim, client)
    statuses = [client.finish.status for client in clients if client.finish is not None]
    assert 503 in statuses and 200 in statuses


def test_a_dead_prefill_is_replaced_by_the_next_one() -> None:
    sim = world(prefills=2)
    sim.config.step_time = (0.05, 0.05)
    client = sim.submit(sim.nodes["d0"], prompt(24), 6)
    sim.run(0.12)
    sim.kill(sim.nodes["p0"])
    finish(sim, client)
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH
    assert stats(sim.nodes["p1"]).computed == 24


def test_a_frozen_prefill_is_given_up_after_the_links_heartbeats_and_does_no_harm_when_it_thaws() -> None:
    sim = world(prefills=2)
    client = sim.submit(sim.nodes["d0"], prompt(24), 6)
    sim.run(0.006)
    sim.freeze(sim.nodes["p0"])
    sim.run(sim.now + 2.0)
    assert client.ended
    sim.thaw(sim.nodes["p0"])
    finish(sim, client, rest=5.0)


def test_an_emitted_token_is_never_emitted_again_when_the_prefill_dies_after_it() -> None:
    sim = world(prefills=2)
    sim.config.write_delay = (5.0, 5.0)
    client = sim.submit(sim.nodes["d0"], prompt(12), 6)
    sim.run(0.3)
    assert len(client.tokens) == 1
    sim.kill(sim.nodes["p0"])
    sim.config.write_delay = (0.001, 0.001)
    finish(sim, client)
    assert client.tokens == reference_tokens(prompt(12), SamplingParams(), 6)


def test_damaged_blocks_are_recomputed_never_answered() -> None:
    sim = world()
    sim.corruption = 1.0
    client = sim.submit(sim.nodes["d0"], prompt(12), 6)
    sim.run(0.2)
    sim.corruption = 0.0
    assert sim.settle(20)
    sim.check_answers()
    decode = sim.nodes["d0"].scheduler.decode
    assert decode is not None and decode.handoffs.outcomes["digest_mismatch"] >= 1
    assert client.ended


def test_a_first_token_that_the_model_does_not_have_is_another_attempt_not_an_answer() -> None:
    sim = world(prefills=2)
    sim.nodes["p0"].runner.next_token = lambda tokens, sampling: TINY_MODEL.vocab_size
    client = finish(sim, sim.submit(sim.nodes["d0"], prompt(12), 6))
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH
    assert client.started is not None and client.started.prefill == "http://p1"


def test_without_another_prefill_a_strange_first_token_ends_the_request_and_nothing_else() -> None:
    sim = world()
    sim.nodes["p0"].runner.next_token = lambda tokens, sampling: -1
    client = finish(sim, sim.submit(sim.nodes["d0"], prompt(12), 6))
    assert client.finish is not None and client.finish.status == 503 and not client.tokens
    assert "outside the vocabulary" in client.finish.message
    assert sim.nodes["d0"].alive


def test_a_cancel_reaches_the_prefill_instance() -> None:
    sim = world()
    sim.config.step_time = (0.2, 0.2)
    client = sim.submit(sim.nodes["d0"], prompt(60), 6)
    sim.run(0.3)
    sim.abort(client)
    sim.run(sim.now + 1.0)
    core = sim.nodes["p0"].scheduler.core
    assert core is not None and not core.requests and not core.batcher.busy
    assert stats(sim.nodes["p0"]).steps < 8, "the rest of the prompt was not computed"
    sim.check_rest()


def test_a_prefill_instance_whose_transfer_thread_hangs_ends_and_the_next_one_is_asked() -> None:
    sim = world(prefills=2, step_timeout=5.0)
    sim.config.write_delay = (60.0, 60.0)
    client = sim.submit(sim.nodes["d0"], prompt(12), 6)
    sim.run(0.5)
    sick, receiver = sim.nodes["p0"], sim.nodes["d0"].identity
    sick.deaf = True
    sim.abort(client)  # its push must be reset
    sim.config.write_delay = (0.001, 0.001)
    sim.run(sim.now + 5.0)
    assert sick.alive, "the reset was ordered a second after the cancel"
    sim.run(sim.now + 1.2)
    assert sick.exit is not None and sick.exit.code == 1
    assert sick.exit.reason == f"the transfer thread has not answered TransferResetPeer of {receiver} for 5 s"
    other = sim.submit(sim.nodes["d0"], prompt(12, 2), 6)
    assert sim.settle(20)
    assert other.started is not None and other.started.prefill == "http://p1"


def test_a_decode_instance_whose_transfer_thread_hangs_ends_every_request() -> None:
    sim = world(step_timeout=5.0)
    finish(sim, sim.submit(sim.nodes["d0"], prompt(4, 9), 1))
    sim.nodes["d0"].deaf = True
    sim.config.revocable = False  # what is granted there stays granted
    client = sim.submit(sim.nodes["d0"], prompt(12), 6)
    sim.abort(client)
    waiting = sim.submit(sim.nodes["d0"], prompt(12, 2), 6)
    sim.run(sim.now + 7.0)
    end = sim.nodes["d0"].exit
    assert end is not None and end.code == 1 and "TransferRevoke of p0/1/0" in end.reason
    assert waiting.finish is not None and waiting.finish.status == 500


def test_a_scheduler_that_stood_still_hears_its_runner_out_before_it_judges() -> None:
    sim = world(step_timeout=5.0)
    finish(sim, sim.submit(sim.nodes["d0"], prompt(4, 9), 1))
    node = sim.nodes["d0"]
    node.deaf = True
    client = sim.submit(node, prompt(12), 6)
    sim.run(sim.now + 0.1)
    sim.abort(client)
    sim.run(sim.now + 1.2)
    later = sim.now + 9.0
    assert not [a for a in node.scheduler.handle(ev.Tick(later, 9.0)) if isinstance(a, Exit)]
    assert [a for a in node.scheduler.handle(ev.Tick(later + 0.05, 0.0)) if isinstance(a, Exit)]


def test_a_draining_prefill_finishes_its_hand_offs_refuses_new_ones_and_exits() -> None:
    from pd.scheduler import events as ev

    sim = world(prefills=2)
    sim.config.step_time = (0.05, 0.05)
    old = sim.submit(sim.nodes["d0"], prompt(24), 3)
    sim.run(0.1)
    sim.nodes["p0"].event(lambda now: ev.DrainRequested(now, 10.0))
    new = sim.submit(sim.nodes["d0"], prompt(24, 5), 3)
    for client in (old, new):
        finish(sim, client)
        assert client.finish is not None and client.finish.reason is FinishReason.LENGTH
    assert stats(sim.nodes["p1"]).computed == 24
    assert sim.nodes["p0"].exit is not None and sim.nodes["p0"].exit.code == 0
    assert sim.nodes["p0"].scheduler.state is InstanceState.DRAINING


def test_a_decode_instance_whose_runner_died_says_goodbye_and_opens_no_new_session() -> None:
    sim = world()
    sim.submit(sim.nodes["d0"], prompt(64), 9)
    decode = sim.nodes["d0"].scheduler
    while not (decode.decode is not None and not decode.decode.handoffs.quiet):
        sim.run(sim.now + 0.001)
    actions = decode.handle(ev.RunnerDied(sim.now, "frozen"))
    assert [type(a.message).__name__ for a in actions if isinstance(a, SendPeer)][-1:] == ["Goodbye"]
    assert any(isinstance(a, Exit) for a in actions)
    assert not decode.decode.handoffs.quiet, "blocks wait for the prefill instance: a reason to dial it"
    later = [a for tick in range(1, 20) for a in decode.handle(ev.Tick(sim.now + 0.5 * tick, 0.0))]
    assert not [a for a in later if isinstance(a, OpenSession)]


def test_every_field_of_a_hello_says_something() -> None:
    """Nothing travels that no code fills in: what looks like a proof must be one."""
    decode = Instance(settings(Role.DECODE))
    decode.submit(1, prompt(12), prefills=("tcp://p0:1",))
    [hello] = [action.hello for action in decode.actions if isinstance(action, OpenSession)]
    empty = {name for name in hello.__struct_fields__ if not getattr(hello, name)}
    assert empty == {"outstanding"}, "a first session leaves nothing open"


def figures(node: Node, what: str = "metrics") -> dict[str, Any]:
    """What the scheduler answers to an HTTP operation."""
    actions = node.scheduler.handle(ev.Asked(node.world.now, 0, Ask(1, what)))
    [answer] = [a.message for a in actions if isinstance(a, Reply) and isinstance(a.message, Answer)]
    return answer.data


def test_messages_of_closed_hand_offs_and_other_incarnations_are_on_metrics() -> None:
    sim = world()
    finish(sim, sim.submit(sim.nodes["d0"], prompt(12), 2))
    [session] = sim.sessions
    other = HandoffId(999, 1, 0)
    for node, message in (
        (sim.nodes["d0"], Failed(other, "late", True)),
        (sim.nodes["d0"], Failed(other, "late", True)),
        (sim.nodes["p0"], Cancel(other)),
    ):
        node.scheduler.handle(ev.PeerSaid(sim.now, session, message))
    bodies = [exposition(figures(sim.nodes[name]), Latencies(), "")[0].decode().splitlines() for name in ("d0", "p0")]
    assert 'pd_stale_messages_total{kind="Failed"} 2.0' in bodies[0]
    assert 'pd_stale_messages_total{kind="Cancel of another incarnation"} 1.0' in bodies[1]
