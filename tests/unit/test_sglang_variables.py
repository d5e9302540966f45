"""What the six SGLANG_DISAGGREGATION_* variables change, each seen in what an instance does with two values of it."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pd.abc import TransferCapabilities
from pd.config import ServeConfig
from pd.errors import ConfigError
from pd.instance import Plan
from pd.messages import Push, TransferConnect, TransferConnected, TransferPush, TransferPushed
from pd.runner.transfer import engine_config
from pd.scheduler import actions as act
from pd.scheduler.handoff import HandoffConfig
from pd.settings import parse
from pd.testing.instance import TINY_MODEL, Client
from pd.testing.sim_cluster import SimCluster, SimConfig
from pd.transfer.engine import EngineConfig, TransferEngine
from pd.types import FinishReason
from tests.handoff_kit import Prefill
from tests.transfer_kit import FakePeer, FakeTicket, NoDevice, QueuePort, ScriptedBackend, capabilities, i32, pool

#: Good values that are nobody's default.
EVERY = {
    "THREAD_POOL_SIZE": "5",
    "QUEUE_SIZE": "2",
    "BOOTSTRAP_TIMEOUT": "7",
    "HEARTBEAT_INTERVAL": "0.5",
    "HEARTBEAT_MAX_FAILURE": "3",
    "WAITING_TIMEOUT": "9",
}
PREFILLS = ("THREAD_POOL_SIZE", "QUEUE_SIZE", "BOOTSTRAP_TIMEOUT", "HEARTBEAT_MAX_FAILURE")
DECODES = ("HEARTBEAT_INTERVAL", "HEARTBEAT_MAX_FAILURE", "WAITING_TIMEOUT")


def given(role: str, **variables: object) -> ServeConfig:
    """`pd serve` with these variables."""
    environ = {f"SGLANG_DISAGGREGATION_{name}": str(value) for name, value in variables.items()}
    return parse(ServeConfig, ["/m", "--role", role], environ)


# --- where they are read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode", "unified"])
def test_all_six_may_be_set_on_every_instance(role: str) -> None:
    config = given(role, **EVERY)
    assert (config.transfer.transfer_threads, config.transfer.transfer_queues) == (5, 2)
    assert (config.control.bootstrap_timeout, config.control.waiting_timeout) == (7.0, 9.0)
    assert (config.control.heartbeat_interval, config.control.heartbeat_max_failure) == (0.5, 3)


@pytest.mark.parametrize("text", ["-1", "0", "many", "nan"])
@pytest.mark.parametrize("name", EVERY)
def test_a_bad_value_is_refused_by_its_variables_name_where_it_acts_and_not_elsewhere(name: str, text: str) -> None:
    for role, read in (("prefill", PREFILLS), ("decode", DECODES), ("unified", ())):
        if name in read:
            with pytest.raises(ConfigError) as caught:
                given(role, **{name: text})
            assert caught.value.field == f"SGLANG_DISAGGREGATION_{name}"
        else:
            assert given(role, **{name: text}) == given(role)


# --- thread pool and queues: the runner's transfer engine on a prefill instance --------------------------------------


class Blocking(ScriptedBackend):
    """A backend whose posts return when the data is there, which is when a test lets it."""

    def __init__(self, network: dict[str, ScriptedBackend], kind: TransferCapabilities) -> None:
        super().__init__(network, kind)
        self.entered: queue.Queue[str] = queue.Queue()
        self._open, self._opened = threading.Condition(), dict[str, int]()

    def post(self, peer: FakePeer, spans: object, tag: int) -> FakeTicket:
        self.entered.put(peer.identity)
        with self._open:
            assert self._open.wait_for(lambda: self._opened.get(peer.identity, 0) > 0, 10), "the test opened nothing"
            self._opened[peer.identity] -= 1
        return super().post(peer, spans, tag)  # type: ignore[arg-type]

    def open_for(self, peer: str, posts: int) -> None:
        with self._open:
            self._opened[peer] = self._opened.get(peer, 0) + posts
            self._open.notify_all()

    def begun(self, count: int) -> list[str]:
        """The peers of the next posts, which must begin, and of no more than these."""
        found = [self.entered.get(timeout=10) for _ in range(count)]
        with pytest.raises(queue.Empty):
            self.entered.get(timeout=0.1)
        return found


class Pushing:
    """The engine of a prefill instance with the settings that it got, and one decode instance behind every queue."""

    def __init__(self, config: EngineConfig, peers: int) -> None:
        network: dict[str, ScriptedBackend] = {}
        kind = capabilities(concurrent_posts=True, blocking_post=True, max_spans_per_post=1)
        self.backend = Blocking(network, kind)
        self.backend.open("P")
        self.engine = TransferEngine(self.backend, [pool(8, 5)], NoDevice(), config, self._failed)
        self.engine.register()
        self.port = QueuePort()
        self.engine.start(self.port)
        self.peers: list[str] = []
        for name in self._names(peers):
            there = ScriptedBackend(network)
            there.open(name)
            there.register([pool(8).region])
            descriptor = TransferEngine(there, [pool(8)], NoDevice(), EngineConfig(), self._failed).descriptor()
            self.port.give(TransferConnect(name, descriptor))
            assert self.port.next() == TransferConnected(name)
            self.peers.append(name)

    @staticmethod
    def _failed(error: BaseException) -> None:
        raise error

    def _names(self, count: int) -> Iterator[str]:
        """Decode instances of different queues where there are several: the first of each four that do not collide."""
        four = TransferEngine(self.backend, [pool(8)], NoDevice(), EngineConfig(queues=4), self._failed)
        by_queue: dict[int, str] = {}
        for number in range(100):
            by_queue.setdefault(id(four._shard(f"D{number}")[0]), f"D{number}")
        yield from list(by_queue.values())[:count]

    def push(self, peer: str, index: int = 0, blocks: int = 1) -> None:
        """Of blocks that are no neighbours: a post each."""
        there = i32(*range(0, 2 * blocks, 2))
        self.port.give(TransferPush(Push(peer, 7, index, there, there, 0, 0)))

    def ended(self, count: int = 1) -> list[str]:
        events = [self.port.next() for _ in range(count)]
        assert all(isinstance(event, TransferPushed) for event in events), events
        return [event.peer for event in events]


@contextmanager
def pushing(peers: int, **variables: object) -> Iterator[Pushing]:
    config = given("prefill", **variables)
    made = Pushing(engine_config(Plan(config, TINY_MODEL, "p", 1, "", Path()).runner().config), peers)
    try:
        yield made
    finally:
        for peer in made.peers:
            made.backend.open_for(peer, 100)
        made.engine.close()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_so_many_decode_instances_are_served_at_once_as_there_are_threads(threads: int) -> None:
    with pushing(4, THREAD_POOL_SIZE=threads, QUEUE_SIZE=4) as p:
        for peer in p.peers:
            p.push(peer)
        assert len(set(p.backend.begun(threads))) == threads
        for peer in p.peers:
            p.backend.open_for(peer, 1)
        assert sorted(p.ended(4)) == sorted(p.peers)


def test_with_one_queue_pushes_are_served_in_the_order_in_which_they_came_whoever_they_are_for() -> None:
    with pushing(4, THREAD_POOL_SIZE=4, QUEUE_SIZE=1) as p:
        a, b, c, d = p.peers
        arrivals = [a, b, c, a, d, c, b, d]
        for index, peer in enumerate(arrivals):
            p.push(peer, index)
        for peer in arrivals:
            assert p.backend.begun(1) == [peer], "and nothing besides it"
            p.backend.open_for(peer, 1)
        p.ended(len(arrivals))


def test_with_several_queues_a_decode_instance_does_not_wait_for_anothers_pushes() -> None:
    with pushing(2, THREAD_POOL_SIZE=4, QUEUE_SIZE=4) as p:
        slow, other = p.peers
        p.push(slow, blocks=4)
        assert p.backend.begun(1) == [slow]
        for index in range(3):
            p.push(other, index)
            p.backend.open_for(other, 1)
        assert p.ended(3) == [other] * 3
        p.backend.open_for(slow, 4)
        assert p.ended() == [slow]


@pytest.mark.parametrize("queues", [1, 4])
def test_a_large_push_and_a_small_one_are_under_way_together_if_there_are_queues_for_both(queues: int) -> None:
    with pushing(2, THREAD_POOL_SIZE=4, QUEUE_SIZE=queues) as p:
        large, small = p.peers
        p.push(large, blocks=4)
        p.push(small)
        began = [large, small] if queues > 1 else [large]
        assert sorted(p.backend.begun(len(began))) == sorted(began)
        p.backend.open_for(large, 1)
        assert p.backend.begun(1) == [large], "its second block"
        p.backend.open_for(small, 1)
        if queues > 1:
            assert p.ended() == [small]
        p.backend.open_for(large, 3)
        assert p.ended(2 if queues == 1 else 1)[0] == large


def test_fewer_threads_than_queues_serve_them_all() -> None:
    with pushing(4, THREAD_POOL_SIZE=1, QUEUE_SIZE=4) as p:
        for peer in p.peers:
            p.backend.open_for(peer, 2)
            for index in range(2):
                p.push(peer, index)
        assert sorted(p.ended(8)) == sorted(2 * p.peers)


# --- the schedulers, on a virtual clock ------------------------------------------------------------------------------


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(50_000) for _ in range(length)]


def world(prefills: int = 1, local: str = "never", **variables: object) -> SimCluster:
    """Instances that all have these variables. Nothing but what they bound ends a wait within an hour."""
    control = {**vars(given("prefill", **variables).control), **vars(given("decode", **variables).control)}
    scheduler = {"chunked_prefill_size": 8, "max_prefill_tokens": 32, "local_prefill": local, "request_timeout": 3600.0}
    return SimCluster(1, SimConfig(prefills, 1, scheduler=scheduler, control=dict(control)))


def ends_at(sim: SimCluster, client: Client, time: float) -> None:
    sim.run(time - 0.1)
    assert not client.ended
    sim.run(time + 0.2)
    assert client.ended


def stuck(timeout: int, local: str = "never") -> tuple[SimCluster, Client]:
    """A client that waits for blocks which do not come."""
    sim = world(local=local, WAITING_TIMEOUT=timeout)
    sim.config.write_delay = (1000.0, 1000.0)
    return sim, sim.submit(sim.nodes["d0"], prompt(12), 6)


def error(client: Client) -> tuple[int, str]:
    assert client.finish is not None and client.finish.reason is FinishReason.ERROR, client
    return client.finish.status, client.finish.message


@pytest.mark.parametrize("timeout", [2, 5])
def test_a_leg_that_no_decode_instance_asks_for_ends_with_504_after_the_bootstrap_timeout(timeout: int) -> None:
    sim = world(BOOTSTRAP_TIMEOUT=timeout)
    leg = sim.submit_leg(sim.nodes["p0"], prompt(9), 4, room=7)
    ends_at(sim, leg, timeout)
    status, message = error(leg)
    assert status == 504 and f"(its bootstrap_room) within {timeout} s" in message


@pytest.mark.parametrize("timeout", [2, 5])
def test_a_first_token_waits_for_its_leg_as_long(timeout: int) -> None:
    for late in (-0.2, 0.2):
        sim = world(BOOTSTRAP_TIMEOUT=timeout)
        client = sim.submit(sim.nodes["d0"], prompt(9), 4, room=7, prefills=["tcp://p0:1"])
        assert sim.settle(1)
        sim.run(timeout + late)
        leg = sim.submit_leg(sim.nodes["p0"], prompt(9), 4, room=7)
        sim.run(sim.now + 0.1)
        assert leg.tokens == (client.tokens[:1] if late < 0 else [])


def lost_after(sim: SimCluster, stuck: str, heard_at: float, by: str, event: str) -> float:
    """Seconds from when `by` last heard of `stuck` until it gives it up."""
    node = sim.nodes[stuck]
    node.frozen = True  # of the process only the loop: its sockets' threads go on, so that links notice nothing
    while not any(name == by and log.event == event for name, log in sim.logs):
        sim.run(sim.now + 0.01)
        assert sim.now < heard_at + 100
    log = next(log for name, log in sim.logs if name == by and log.event == event)
    assert ("reason", "heartbeats missed") in log.fields
    return sim.now - heard_at


HEARTBEATS = [(0.5, 1), (0.5, 2), (0.5, 6), (2.0, 1), (2.0, 2), (5.0, 2)]


@pytest.mark.parametrize(("interval", "failures"), HEARTBEATS)
def test_a_prefill_instance_whose_loop_is_stuck_is_lost_after_so_many_intervals(interval: float, failures: int) -> None:
    sim = world(prefills=2, HEARTBEAT_INTERVAL=interval, HEARTBEAT_MAX_FAILURE=failures)
    sim.submit(sim.nodes["d0"], prompt(9), 2)
    assert sim.settle(1)
    sim.run(3 * interval)
    client = sim.submit(sim.nodes["d0"], prompt(20, 1), 4, prefills=["tcp://p0:1", "tcp://p1:1"])
    sim.run(sim.now + 0.004)
    decode = sim.nodes["d0"].scheduler.decode
    assert decode is not None and not client.ended
    took = lost_after(sim, "p0", decode.handoffs.peers.at("tcp://p0:1").heard_at, "d0", "prefill_down")
    assert interval * failures <= took <= interval * failures + HandoffConfig().heartbeat_grace + 2 * sim.tick
    assert sim.settle(1), "the other prefill instance was asked at once"
    sim.check_answers()
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH


@pytest.mark.parametrize(("interval", "failures"), HEARTBEATS)
def test_a_decode_instance_whose_loop_is_stuck_is_lost_after_so_many_intervals(interval: float, failures: int) -> None:
    sim = world(HEARTBEAT_INTERVAL=interval, HEARTBEAT_MAX_FAILURE=failures)
    sim.submit(sim.nodes["d0"], prompt(9), 2)
    sim.run(3 * interval)
    prefill = sim.nodes["p0"].scheduler.prefill
    assert prefill is not None
    (session,) = prefill.handoffs.peers
    took = lost_after(sim, "d0", session.heard_at, "p0", "decode_down")
    assert interval * failures <= took <= interval * failures + HandoffConfig().heartbeat_grace + 2 * sim.tick


@pytest.mark.parametrize(("interval", "failures"), [(0.001, 1), *HEARTBEATS])
def test_instances_that_have_nothing_to_say_are_never_lost(interval: float, failures: int) -> None:
    sim = world(HEARTBEAT_INTERVAL=interval, HEARTBEAT_MAX_FAILURE=failures)
    sim.submit(sim.nodes["d0"], prompt(9), 2)
    sim.run(max(5.0, 20 * interval))
    assert not [log for _, log in sim.logs if log.event in ("prefill_down", "decode_down")]


def test_a_prefill_instance_keeps_to_the_interval_of_the_decode_instance_and_to_its_own_number_of_failures() -> None:
    p = Prefill(config=HandoffConfig(heartbeat_interval=99.0, heartbeat_max_failure=4))
    p.hello(heartbeat_ms=1000)
    p.transfer(TransferConnected("d.1.0"))
    welcome = p.welcome()
    assert welcome is not None
    for now in (0.9, 1.0, 1.9, 2.0):
        p.tick(now)
        assert bool(p.sent()) == (now in (1.0, 2.0))
    p.tick(4.5)
    assert act.CloseSession(welcome.session, "heartbeats missed") not in p.orders()
    p.tick(4.6)
    assert act.CloseSession(welcome.session, "heartbeats missed") in p.orders()


@pytest.mark.parametrize("after", ["nothing", "first token"])
@pytest.mark.parametrize("timeout", [2, 5])
def test_decode_gives_the_blocks_so_long_to_come_and_then_asks_the_next_prefill_instance(
    timeout: int, after: str
) -> None:
    sim = world(prefills=2, WAITING_TIMEOUT=timeout)
    sim.config.write_delay = (1000.0, 1000.0)
    if after == "nothing":
        sim.config.step_time = (1000.0, 1000.0)
    client = sim.submit(sim.nodes["d0"], prompt(12), 6)
    sim.run(timeout - 0.1)
    sim.config.write_delay = sim.config.step_time = (0.001, 0.002)
    assert len(client.tokens) == (after == "first token") and not client.ended
    sim.run(timeout + 0.2)
    sim.check_answers()
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH
    computed = [node.scheduler.core.stats.computed for node in sim.nodes.values() if node.scheduler.core is not None]
    assert computed[1] == (12 if after == "nothing" else 13), "p1 has computed what p0 was asked for"


@pytest.mark.parametrize("timeout", [2, 5])
def test_a_client_whose_blocks_come_from_nowhere_is_told_so_after_the_waiting_timeout(timeout: int) -> None:
    sim, client = stuck(timeout)
    ends_at(sim, client, timeout)
    status, message = error(client)
    assert status == 503 and f"no KV cache within {timeout} s" in message


@pytest.mark.parametrize("timeout", [2, 5])
def test_after_the_waiting_timeout_decode_computes_the_prompt_itself_if_it_may(timeout: int) -> None:
    sim, client = stuck(timeout, local="fallback")
    ends_at(sim, client, timeout)
    sim.check_answers()
    assert client.finish is not None and client.finish.reason is FinishReason.LENGTH
