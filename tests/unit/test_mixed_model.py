"""Property tests of everything at once: several choices, rooms and legs, grammars, operators' commands, api workers,
health checks, drains, retraction, deaths and freezes, in one simulated cluster.

The simulation checks the schedulers' books and indices after every event; at the end every client has its one end,
every token and logprob is right, and nobody holds anything.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from functools import partial

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pd import messages as m
from pd.scheduler import events as ev
from pd.testing.fake_runner import reference_tokens
from pd.testing.instance import Client
from pd.testing.sim_cluster import Node, SimCluster, SimConfig
from pd.types import FinishReason, Role, SamplingParams

SCENARIOS = int(os.environ.get("PD_TEST_SCENARIOS", "400")) // 5
TIMEOUT = 3.0
WORKERS = 3
#: Grammar -> tokens after which it fails.
FAILING = {"fails at once": 0, "fails later": 2}
GRAMMARS = ["", "", "", "one", "another", "unusable", *FAILING]


#: What a few dozen scenarios must have seen.
EXPECTED = (
    *("pause abort", "pause retract", "pause in_place", "probe", "kill", "freeze", "session lost", "api lost", "drain"),
    *("hand-off failed", "abort", "abort by rid", "health checks passed", "tokens came late", "a row fails"),
    *("request_retracted", "request_replayed", "a choice is asked for alone", "leg_came", "handoff_landed"),
    *("request length 200", "request stop 200", "request abort 499", "request abort 200", "request error 400"),
    *("request error 503", "request error 504", "leg length 200", "leg stop 200", "leg error 400"),
    *("leg error 409", "leg error 503", "leg error 504"),
)


def _config(rnd: random.Random, faults: bool) -> SimConfig:
    scheduler: dict[str, object] = {
        "chunked_prefill_size": rnd.choice([4, 8]),
        "max_prefill_tokens": rnd.choice([16, 32]),
        "max_running_requests": rnd.choice([4, 8]),
        "local_prefill": rnd.choice(["never", "fallback", "short:6"]),
    }
    if faults and rnd.random() < 0.2:
        scheduler["max_queued_requests"] = 3
    return SimConfig(
        prefills=rnd.choice([1, 2]),
        decodes=rnd.choice([1, 2]),
        num_blocks=rnd.choice([25, 33, 65]),
        revocable=rnd.random() < 0.5,
        write_delay=rnd.choice([(0.0002, 0.005), (0.001, 0.3)]),
        compile_time=rnd.choice([(0.001, 0.004), (0.05, 0.5)]),
        unusable=frozenset({"unusable"}),
        failing=FAILING,
        scheduler=scheduler,
        control={"heartbeat_interval": 0.5, "bootstrap_timeout": TIMEOUT if faults else 20.0},
    )


class Scenario:
    """One interleaving. `faults` False: only what must not change any answer happens."""

    def __init__(self, seed: int, faults: bool) -> None:
        self.rnd = rnd = random.Random(seed)
        self.faults = faults
        self.world = SimCluster(seed, _config(rnd, faults))
        if faults and rnd.random() < 0.1:
            self.world.corruption = 0.05
        self.shared = [rnd.randrange(100) for _ in range(24)]
        self.done: Counter[str] = Counter()
        self.probes: list[tuple[Node, Client]] = []

    def nodes(self, role: Role) -> list[Node]:
        return [node for node in self.world.nodes.values() if node.role is role]

    def run(self) -> SimCluster:
        rnd, world = self.rnd, self.world
        for number in range(rnd.randrange(2, 14)):
            for half in self.request(number):
                if self.faults and rnd.random() < 0.05:
                    continue  # the router could not send it
                half()
                world.run(world.now + rnd.random() * rnd.choice([0.001, 0.02]))
                self.disturb()
        self.finish()
        return world

    # --- requests ---

    def request(self, number: int) -> list[Callable[[], Client]]:
        """What its router sends: one request, or two halves in any order."""
        rnd, config = self.rnd, self.world.config
        prompt = self.shared[: rnd.randrange(24)] + [rnd.randrange(100) for _ in range(rnd.randrange(1, 20))]
        choices, most = rnd.choice([1, 1, 2, 3, 4]), rnd.randrange(1, 20)
        stop: tuple[int, ...] = ()
        if rnd.random() < 0.3:
            drawn = SamplingParams(seed=number, choice=rnd.randrange(choices))
            stop = (rnd.choice(reference_tokens(prompt, drawn, most)),)
        wishes = {
            "seed": number,
            "stop": stop,
            "choices": choices,
            "grammar": rnd.choice(GRAMMARS),
            "sampling": {"logprobs": rnd.random() < 0.3},
            "logprob_start": rnd.choice([-1, -1, -1, 0, rnd.randrange(len(prompt))]),
            "worker": rnd.randrange(WORKERS),
            "rid": rnd.choice([f"r{number}", f"batch-{number % 3}"]),
            "priority": rnd.choice([0, 0, 0, 1]),
            "salt": rnd.choice(["", "", "other"]),
        }
        if self.faults:
            wishes["timeout"] = rnd.choice([None, None, None, 3.0])
            wishes["idle_timeout_ms"] = rnd.choice([600_000, 600_000, 2000])
        decode, prefill = rnd.choice(self.nodes(Role.DECODE)), rnd.choice(self.nodes(Role.PREFILL))
        if rnd.random() < 0.5:
            return [partial(self.world.submit, decode, prompt, most, **wishes)]
        wishes["room"] = number if not self.faults or rnd.random() < 0.8 else rnd.randrange(3)
        named = [prefill.endpoint]
        if rnd.random() < 0.3:  # the room's instance is the last that it names
            named = list(dict.fromkeys([*(f"tcp://p{i}:1" for i in range(config.prefills)), *named][::-1]))[::-1]
        halves = [
            partial(self.world.submit_leg, prefill, prompt, most, **wishes),
            partial(self.world.submit, decode, prompt, most, prefills=named, **wishes),
        ]
        rnd.shuffle(halves)
        return halves

    # --- what happens meanwhile ---

    def disturb(self) -> None:
        rnd = self.rnd
        acts: list[Callable[[Node], None]] = [self.pause, self.proceed, self.probe]
        if self.faults:
            acts += [
                self.kill,
                self.freeze,
                self.lose_session,
                self.abort,
                self.abort,
                self.abort_by_rid,
                self.lose_api,
                self.drain,
                self.fail_handoff,
            ]
        if rnd.random() < 0.45:
            act = rnd.choice(acts)
            act(rnd.choice(list(self.world.nodes.values())))

    def pause(self, node: Node) -> None:
        mode = self.rnd.choice(["in_place", "retract", "abort"] if self.faults else ["in_place", "retract"])
        self.done[f"pause {mode}"] += 1
        self.world.command(node, m.Pause(1, mode))
        if self.rnd.random() < 0.8:
            self.world.later(self.rnd.random() * 0.3, partial(self.proceed, node))

    def proceed(self, node: Node) -> None:
        self.world.command(node, m.Continue(2))

    def probe(self, node: Node) -> None:
        self.done["probe"] += 1
        client = self.world.submit(node, [1], 1, prefills=[], probe=True, timeout=20.0, priority=1 << 20)
        self.probes.append((node, client))

    def kill(self, node: Node) -> None:
        self.done["kill"] += 1
        self.world.kill(node)
        self.world.later(self.rnd.random() * 2, partial(self.restart, node))

    def restart(self, node: Node) -> None:
        if not node.alive and self.world.nodes[node.name] is node:
            self.world.restart(node)

    def freeze(self, node: Node) -> None:
        if node.alive and not node.frozen:
            self.done["freeze"] += 1
            self.world.freeze(node)
            self.world.later(self.rnd.random() * 4, partial(self.world.thaw, node))

    def lose_session(self, node: Node) -> None:
        if self.world.sessions:
            self.done["session lost"] += 1
            self.world.lose(self.rnd.choice(list(self.world.sessions.values())))

    def lose_api(self, node: Node) -> None:
        self.done["api lost"] += 1
        self.world.lose_api(node, self.rnd.randrange(WORKERS))

    def drain(self, node: Node) -> None:
        if not node.alive:
            return
        self.done["drain"] += 1
        bound = self.rnd.choice([0.02, 1.0, 10.0])
        node.event(lambda now: ev.DrainRequested(now, bound))

        def again() -> None:
            self.restart(node)
            if node.alive:
                self.world.later(0.5, again)

        again()

    def fail_handoff(self, node: Node) -> None:
        side = node.scheduler.prefill
        if side is not None and side._requests and node.alive and not node.frozen:
            self.done["hand-off failed"] += 1
            id = self.rnd.choice(list(side._requests))
            side.handoffs.fail(self.world.now, id, "out of luck", self.rnd.random() < 0.8)
            node.event(ev.Tick)

    def abort(self, node: Node) -> None:
        running = [client for client in self.world.clients.values() if not client.ended]
        if running:
            self.done["abort"] += 1
            client = self.rnd.choice(running)
            self.world.abort(client, self.rnd.choice([-1, *range(len(client.choices))]))

    def abort_by_rid(self, node: Node) -> None:
        rnd, world = self.rnd, self.world
        here = [key for key in world.submits if world.prompts[key][2] is node]
        if not here:
            return
        self.done["abort by rid"] += 1
        rid = world.submits[rnd.choice(here)].rid if rnd.random() < 0.9 else ""
        index = rnd.randrange(4) if rid and rnd.random() < 0.3 else -1
        world.command(node, m.AbortMatching(3, rid if index < 0 else f"{rid}-{index}"))
        if not node.alive or node.frozen:
            return
        for key in here:
            client, name = world.clients[key], world.submits[key].rid
            if index < 0 and (not rid or name == rid):
                assert client.ended, f"request {key} goes on"
            elif index >= 0 and name == rid and index < len(client.choices) > 1 and client.started is not None:
                assert client.choices[index].over, f"choice {index} of request {key} goes on"

    # --- the end ---

    def finish(self) -> None:
        world = self.world
        end = world.now + 90
        while world.now < end and not all(client.ended for client in world.clients.values()):
            for node in world.nodes.values():
                if node.alive and not node.frozen and node.scheduler.operator.paused:
                    self.proceed(node)
            world.run(world.now + 0.5)
        left = {key: str(client) for key, client in world.clients.items() if not client.ended}
        assert not left, f"never ended: {left}"
        world.check_answers()
        world.check_digests()
        if self.faults:
            self.check_deadlines()
        else:
            self.check_outcomes()
        world.tick = 0.25  # it would do the same with more of them, later
        world.run(world.now + (45 if self.faults else 21))  # expel, redial, rooms, reconciliation have their time
        world.check_rest()
        for node in self.nodes(Role.PREFILL):
            side = node.scheduler.prefill
            assert side is not None and not len(side.rooms), f"{node.name} still has rooms"

    def check_deadlines(self) -> None:
        """A deadline ends all choices that go on, with one clear error."""
        for key, client in self.world.clients.items():
            late = {c.finish.message for c in client.choices if c.finish is not None and c.finish.status == 504}
            assert len(late) <= 1, f"request {key}: {late}"

    def check_outcomes(self) -> None:
        """Without faults a request's own wishes say how each of its choices ends."""
        world = self.world
        for key, client in world.clients.items():
            prompt, sampling, _ = world.prompts[key]
            most = world.config.scheduler["max_running_requests"]
            if len(client.choices) > most:  # type: ignore[operator]
                continue
            for index, choice in enumerate(client.choices):
                drawn = SamplingParams(seed=sampling.seed, choice=index, stop_token_ids=sampling.stop_token_ids)
                want = reference_tokens(prompt, drawn, sampling.max_tokens)
                bound = 0 if sampling.grammar in world.config.unusable else FAILING.get(sampling.grammar, 1 << 30)
                if key in world.legs:
                    want = want[:1]
                assert choice.finish is not None, f"request {key}: {client}"
                got = choice.finish.reason
                if len(want) <= bound:
                    assert got in (FinishReason.STOP, FinishReason.LENGTH), f"request {key}: {choice.finish}"
                else:
                    assert got is FinishReason.ERROR and choice.tokens == want[:bound], f"request {key}: {choice}"
                    assert choice.finish.status == 400, choice.finish


@settings(max_examples=SCENARIOS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_whatever_happens_at_once_every_choice_ends_once_and_is_right(seed: int) -> None:
    Scenario(seed, faults=True).run()


@settings(max_examples=SCENARIOS // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_without_faults_every_choice_ends_as_its_request_says(seed: int) -> None:
    Scenario(seed, faults=False).run()


def test_the_scenarios_reach_what_they_are_meant_to_test() -> None:
    """Otherwise the properties above would hold for want of trouble."""
    seen: Counter[str] = Counter()
    for seed in range(60):
        scenario = Scenario(seed, faults=True)
        world = scenario.run()
        seen += scenario.done
        for log in (log for _, log in world.logs):
            fields = {name: str(value) for name, value in log.fields}
            seen[log.event] += 1
            seen["a choice is asked for alone"] += log.event == "handoff_asked" and fields["emitted"] != "0"
            seen["a row fails"] += "no token fits" in fields.get("reason", "")
        for key, client in world.clients.items():
            for choice in client.choices:
                where = "leg" if key in world.legs else "request"
                if choice.finish is not None:
                    seen[f"{where} {choice.finish.reason.value} {choice.finish.status}"] += 1
        seen["health checks passed"] += sum(bool(probe.tokens) for _, probe in scenario.probes)
        seen["tokens came late"] += sum(n.scheduler.core.stats.late_tokens for n in world.lives if n.scheduler.core)
    missing = [name for name in EXPECTED if not seen[name]]
    assert not missing, f"{missing} never happened: {seen}"
