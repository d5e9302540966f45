"""The schedulers' log lines: the story of each request and peer on both sides, one line for each event of it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from pd.messages import Cancel, Goodbye, Prefill
from pd.scheduler import events as ev
from pd.testing.instance import Instance, settings
from pd.testing.sim_cluster import SimCluster, SimConfig
from pd.types import HandoffId

#: What a landed hand-off's lines say of time, in ms: on the prefill instance, and on the decode instance.
TIMES = ("push_ms", "after_compute_ms", "after_first_ms")


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def world(config: SimConfig | None = None, **scheduler: object) -> SimCluster:
    options = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": "never", **scheduler}
    config = replace(config or SimConfig(), scheduler=options, control={"heartbeat_interval": 0.5})
    return SimCluster(1, config)


def lines(sim: SimCluster, **wanted: object) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(node, level, event, other fields) of the lines that carry `wanted`."""
    found = [(node, line.level, line.event, dict(line.fields)) for node, line in sim.logs]
    return [
        (node, level, event, {k: v for k, v in fields.items() if k not in wanted})
        for node, level, event, fields in found
        if wanted.items() <= fields.items()
    ]


def events(sim: SimCluster, **wanted: object) -> list[str]:
    return [f"{node} {event}" for node, _, event, _ in lines(sim, **wanted)]


def of(sim: SimCluster, node: str, event: str) -> dict[str, Any]:
    [(level, fields)] = [(x[1], x[3]) for x in lines(sim) if (x[0], x[2]) == (node, event)]
    return {"level": level, **fields}


def until(sim: SimCluster, node: str, event: str, bound: float = 20.0) -> None:
    end = sim.now + bound
    while f"{node} {event}" not in events(sim):
        assert sim.now < end, f"{node} never logged {event}: {events(sim)}"
        sim.run(sim.now + 0.001)


def test_a_request_can_be_followed_through_both_sides_by_its_id() -> None:
    sim = world()
    sim.submit(sim.nodes["d0"], prompt(8), 3)
    assert sim.settle(20)
    sim.submit(sim.nodes["d0"], prompt(8) + prompt(11, 2), 3)
    assert sim.settle(20)
    handoff = of_rid(sim, "r2", "d0", "handoff_asked")["handoff"]
    story = lines(sim, rid="r2", handoff=handoff)
    took = [fields.pop(name) for *_, fields in story for name in TIMES if name in fields]
    assert len(took) == 3 and all(0 < ms < 20 for ms in took)
    assert story == [
        ("d0", "info", "handoff_asked", {"prefill": "tcp://p0:1", "tokens": 19, "emitted": 0, "blocks": 3}),
        ("p0", "info", "handoff_accepted", {"decode": "d0", "tokens": 19}),
        ("p0", "info", "handoff_started", {"cached": 8}),
        ("p0", "info", "handoff_landed", {"decode": "d0", "blocks": 3, "bytes": 192}),
        ("d0", "info", "handoff_landed", {"blocks": 3, "bytes": 192}),
    ]
    assert len(lines(sim, rid="r2")) == 5


def of_rid(sim: SimCluster, rid: str, node: str, event: str) -> dict[str, Any]:
    [fields] = [x[3] for x in lines(sim, rid=rid) if (x[0], x[2]) == (node, event)]
    return fields


def test_nothing_is_logged_per_token_chunk_push_or_step() -> None:
    told = []
    for length, tokens in ((8, 2), (180, 2), (8, 60)):
        sim = world()
        sim.submit(sim.nodes["d0"], prompt(length), tokens)
        assert sim.settle(20)
        sim.run(sim.now + 1.0)
        steps = [node.scheduler.core.stats.steps for node in sim.nodes.values() if node.scheduler.core is not None]
        told.append((events(sim), sum(steps)))
    assert told[0][0] == told[1][0] == told[2][0]
    assert told[1][1] > told[0][1] + 15 and told[2][1] > told[0][1] + 50


def test_a_cancelled_request_is_told_on_both_sides() -> None:
    sim = world()
    sim.config.step_time = (0.2, 0.2)
    client = sim.submit(sim.nodes["d0"], prompt(60), 6)
    sim.run(0.3)
    sim.abort(client)
    sim.run(sim.now + 1.0)
    assert events(sim, rid="r1")[-2:] == ["d0 handoff_cancelled", "p0 handoff_cancelled"]
    assert of(sim, "d0", "handoff_cancelled")["reason"] == "client left"
    assert of(sim, "p0", "handoff_cancelled")["level"] == "info"


def test_a_hand_off_that_fails_or_expires_says_why_on_both_sides() -> None:
    sim = world()
    sim.config.step_time = (0.4, 0.4)
    sim.submit(sim.nodes["d0"], prompt(60), 6, timeout=0.5)
    assert sim.settle(20)
    sim.run(sim.now + 1.0)
    assert {"d0 handoff_asked", "p0 handoff_expired"} <= set(events(sim, rid="r1"))
    assert of(sim, "p0", "handoff_expired")["reason"] == "the request's deadline passed"
    sim = world()
    side = sim.nodes["p0"].scheduler.prefill
    assert side is not None
    sim.config.step_time = (0.4, 0.4)
    sim.submit(sim.nodes["d0"], prompt(60), 6)
    until(sim, "p0", "handoff_started")
    sim.kill(sim.nodes["d0"])
    sim.run(sim.now + 1.0)
    assert of(sim, "p0", "handoff_lost")["level"] == of(sim, "p0", "decode_down")["level"] == "warning"
    assert of(sim, "p0", "handoff_lost")["reason"] == "decode instance lost: connection lost"


def test_a_refused_hand_off_is_told_on_both_sides() -> None:
    sim = world()
    sim.submit(sim.nodes["d0"], prompt(12), 2)
    until(sim, "d0", "prefill_up")
    sim.nodes["p0"].scheduler.prefill.handoffs.accepting = False  # type: ignore[union-attr]
    sim.run(sim.now + 0.02)
    assert events(sim, rid="r1")[:3] == ["d0 handoff_asked", "p0 handoff_refused", "d0 handoff_refused"]
    assert of_rid(sim, "r1", "p0", "handoff_refused")["reason"] == "draining"


def test_blocks_that_a_lost_sender_may_still_write_are_told_from_quarantine_to_release() -> None:
    sim = world(SimConfig(revocable=False))
    sim.config.write_delay = (0.3, 0.3)
    sim.submit(sim.nodes["d0"], prompt(12), 6)
    until(sim, "p0", "handoff_started")
    sim.kill(sim.nodes["p0"])
    sim.settle(20)
    sim.run(sim.now + 40.0)
    story = [event for event in events(sim) if event.startswith("d0") and "prefill_refused" not in event]
    asked = story.index("d0 handoff_asked")
    assert story[asked:] == [
        "d0 handoff_asked",
        "d0 prefill_down",
        "d0 handoff_failed",
        "d0 request_failed",
        "d0 handoff_quarantined",
        "d0 prefill_expelled",
        "d0 handoff_released",
    ]
    assert of(sim, "d0", "handoff_quarantined") == {
        "level": "warning", "rid": "r1", "handoff": of(sim, "d0", "handoff_asked")["handoff"],
        "prefill": "tcp://p0:1", "blocks": 3,
    }  # fmt: skip
    assert of(sim, "d0", "handoff_released")["blocks"] == 3
    assert of(sim, "d0", "prefill_expelled") == {"level": "warning", "peer": "p0", "incarnation": 1, "handoffs": 1}


def test_a_retraction_and_the_replay_are_told() -> None:
    sim = world(SimConfig(num_blocks=17), reserve_blocks=0)
    for seed in range(3):
        sim.submit(sim.nodes["d0"], prompt(8, seed), 40)
    assert sim.settle(60)
    told = [x for x in lines(sim) if x[2] == "request_retracted"]
    core = sim.nodes["d0"].scheduler.core
    assert core is not None and len(told) == core.batcher.retractions > 0
    rid, emitted = told[0][3]["rid"], told[0][3]["emitted"]
    story = events(sim, rid=rid)
    after = story[story.index("d0 request_retracted") + 1 :]
    assert after[0] in ("d0 handoff_asked", "d0 request_retracted") and emitted > 0
    assert [x[3]["emitted"] for x in lines(sim, rid=rid) if x[2] == "handoff_asked"][1] >= emitted


def test_a_replay_that_is_computed_here_is_told() -> None:
    instance = Instance(settings(reserve_blocks=0), num_blocks=17)
    for key in range(3):
        instance.submit(key, prompt(8, key), 40)
    instance.run()
    told = [(line.event, dict(line.fields)) for line in instance.logs if line.event != "ready"]
    assert {event for event, _ in told} == {"request_retracted", "request_replayed"}
    rid, emitted = told[0][1]["rid"], told[0][1]["emitted"]
    replay = next(fields for event, fields in told if event == "request_replayed" and fields["rid"] == rid)
    assert replay["emitted"] >= emitted > 0


@pytest.mark.parametrize("leaver", ["d0", "p0"])
def test_an_instance_that_leaves_in_order_warns_of_no_peer(leaver: str) -> None:
    sim = world()
    sim.submit(sim.nodes["d0"], prompt(8), 2)
    assert sim.settle(20)
    sim.nodes[leaver].event(lambda now: ev.DrainRequested(now, 10.0))
    down = [(node, level) for node, level, event, _ in lines(sim) if event.endswith("_down") and node == leaver]
    assert down == [(leaver, "info")]


def test_a_goodbye_of_a_peer_is_no_warning() -> None:
    sim = world()
    sim.submit(sim.nodes["d0"], prompt(8), 2)
    assert sim.settle(20)
    [session] = sim.sessions
    sim.nodes["p0"].event(lambda now: ev.PeerSaid(now, session, Goodbye("drained")))
    sim.run(sim.now + 3.0)
    assert of(sim, "p0", "decode_down") == {"level": "info", "peer": "d0", "session": session, "reason": "drained"}
    reset = of(sim, "p0", "decode_reset")
    assert reset == {"level": "info", "peer": "d0", "pushes": 0, "reason": "its session is over"}


def test_a_reset_that_ends_pushes_is_a_warning_and_says_why() -> None:
    sim = world()
    sim.config.write_delay = (5.0, 5.0)
    client = sim.submit(sim.nodes["d0"], prompt(8), 3)
    until(sim, "p0", "handoff_started")
    sim.run(sim.now + 0.1)
    sim.abort(client)
    sim.run(sim.now + 2.0)
    reset = of(sim, "p0", "decode_reset")
    assert reset == {"level": "warning", "peer": "d0", "pushes": 1, "reason": "stopped writes did not end"}


def test_a_peers_request_id_is_cut_to_a_bound() -> None:
    sim = world()
    sim.submit(sim.nodes["d0"], prompt(8), 2)
    assert sim.settle(20)
    [session] = sim.sessions
    id = HandoffId(sim.nodes["d0"].settings.incarnation, 99, 0)
    bad = Prefill(id, b"", 1, sim.prompts[1][1], 0, [], 1000, rid="x" * 1000)
    sim.nodes["p0"].event(lambda now: ev.PeerSaid(now, session, bad))
    sim.nodes["p0"].event(lambda now: ev.PeerSaid(now, session, Cancel(id)))
    line = of(sim, "p0", "handoff_refused")
    assert line["rid"] == "x" * 256 and line["reason"] == "mismatch" and "tokens_i32" in line["detail"]
