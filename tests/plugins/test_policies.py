"""pd-policies: every policy passes the suite; the tree is what it says; cache_aware and load follow their rules."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Mapping
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_policies import CacheAware, LeastLoad, PowerOfTwo, PrefixTree, RoundRobin
from pd_policies.tree import NODE_COST

from pd.abc import PolicyContext, RouteRequest, RoutingPolicy, WorkerView
from pd.errors import ConfigError
from pd.plugins import load_plugins
from pd.router.plugin import Random
from pd.testing import PolicySuite
from pd.types import Load


class TestRandom(PolicySuite):
    def make(self, context: PolicyContext) -> RoutingPolicy:
        return Random(context)


class TestRoundRobin(PolicySuite):
    def make(self, context: PolicyContext) -> RoutingPolicy:
        return RoundRobin(context)


class TestPowerOfTwo(PolicySuite):
    def make(self, context: PolicyContext) -> RoutingPolicy:
        return PowerOfTwo(context)


class TestLeastLoad(PolicySuite):
    def make(self, context: PolicyContext) -> RoutingPolicy:
        return LeastLoad(context)


class TestCacheAware(PolicySuite):
    def make(self, context: PolicyContext) -> RoutingPolicy:
        return CacheAware(context)


def view(name: str, in_flight: int = 0, load: Load | None = None, age: float = 0.1) -> WorkerView:
    return WorkerView(f"http://{name}", "prefill", in_flight, load, age)


def ask(text: str | None = None, ids: list[int] | None = None) -> RouteRequest:
    return RouteRequest(1, "/v1/completions", text, ids)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def cache_aware(clock: Clock | None = None, **options: str) -> CacheAware:
    return CacheAware(PolicyContext("prefill", options, random.Random(1).random, clock or Clock()))


def power_of_two(seed: int = 1) -> PowerOfTwo:
    return PowerOfTwo(PolicyContext("decode", {}, random.Random(seed).random))


# --- registration ---------------------------------------------------------------------------------------------------


def test_the_plugin_registers_its_policies_and_which_pools_they_prefer() -> None:
    entry = metadata.EntryPoint("policies", "pd_policies.plugin", "pd")
    policies: Mapping[str, object] = load_plugins([entry]).policies()
    assert set(policies) == {"cache_aware", "power_of_two", "least_load", "round_robin"}
    preferred = {name: entry.prefer for name, entry in load_plugins([entry]).policies().items() if entry.prefer}
    assert preferred == {"cache_aware": "prefill", "power_of_two": "decode"}


# --- load -----------------------------------------------------------------------------------------------------------


def test_power_of_two_takes_the_less_loaded_of_its_two() -> None:
    policy = power_of_two()
    idle, busy = view("idle", 1, Load(running=1, waiting=1)), view("busy", 0, Load(running=2, waiting=2))
    assert all(policy.choose(ask(), [busy, idle]) is idle for _ in range(50))


def test_power_of_two_draws_two_different_workers_and_each_equally_often() -> None:
    policy, counts = power_of_two(), dict.fromkeys(range(4), 0)
    workers = [view(str(n), n, Load()) for n in counts]
    for _ in range(6000):
        counts[policy.choose(ask(), workers).in_flight] += 1
    # worker n wins against the 3 - n workers that have more to do, out of 6 pairs
    assert counts[3] == 0
    for n in range(3):
        assert abs(counts[n] - 6000 * (3 - n) / 6) < 200


@pytest.mark.parametrize(
    "silent", [view("b", 0, None), view("b", 0, Load(), age=60.0)], ids=["no report", "old report"]
)
def test_a_worker_without_a_fresh_report_never_wins_by_silence(silent: WorkerView) -> None:
    heard = view("a", 0, Load(running=500, waiting=90))
    for policy in (power_of_two(), LeastLoad(PolicyContext("decode", {}, random.Random(1).random))):
        for pair in ([heard, silent], [silent, heard]):
            assert all(policy.choose(ask(), pair) is heard for _ in range(20))


def test_a_worker_without_a_report_is_used_when_the_other_really_has_more_to_do() -> None:
    heard, silent = view("a", 5, Load(running=5)), view("b", 1)
    assert power_of_two().choose(ask(), [heard, silent]) is silent


def test_round_robin_goes_around_and_survives_a_changing_pool() -> None:
    policy = RoundRobin(PolicyContext("decode"))
    workers = [view(name) for name in "abc"]
    assert [policy.choose(ask(), workers).url[-1] for _ in range(6)] == list("abcabc")
    assert {policy.choose(ask(), workers[:2]).url[-1] for _ in range(2)} == {"a", "b"}


# --- cache_aware ----------------------------------------------------------------------------------------------------


def test_a_prompt_goes_where_its_prefix_went() -> None:
    policy, workers = cache_aware(), [view(name) for name in "abcd"]
    homes = {n: policy.choose(ask(f"{n}" * 50 + "question 1"), workers).url for n in range(4)}
    assert len(set(homes.values())) == 4  # the smallest tree each time
    for turn in range(20):
        for n, home in homes.items():
            assert policy.choose(ask(f"{n}" * 50 + f"question {turn}"), workers).url == home


def test_a_match_below_the_threshold_goes_to_the_smallest_tree() -> None:
    policy, workers = cache_aware(), [view("a"), view("b")]
    first = policy.choose(ask("s" * 30 + "x" * 70), workers)
    second = policy.choose(ask("s" * 30 + "y" * 70), workers)  # 0.30 is not more than 0.3
    assert second is not first
    policy = cache_aware()
    first = policy.choose(ask("s" * 31 + "x" * 69), workers)
    assert policy.choose(ask("s" * 31 + "y" * 69), workers) is first


def test_token_ids_match_token_ids_and_never_text() -> None:
    policy, workers = cache_aware(), [view("a"), view("b")]
    ids = [65, 66, 67, 120_000, 56_000, 65_279, 1_114_111] * 20
    home = policy.choose(ask(ids=ids), workers)
    other = next(worker for worker in workers if worker is not home)
    assert policy.choose(ask("".join(map(chr, ids))), workers) is other
    for n in range(5):
        assert policy.choose(ask(ids=[*ids, n]), workers) is home
    policy = cache_aware()
    assert policy.choose(ask(ids=[7]), workers) is not policy.choose(ask(ids=[8]), workers)


@pytest.mark.parametrize(
    ("low", "high", "balanced"),
    [(0, 64, False), (0, 65, True), (130, 195, False), (129, 194, True), (1000, 1100, False)],
)
def test_imbalance_beyond_both_thresholds_overrules_the_cache(low: int, high: int, balanced: bool) -> None:
    policy = cache_aware()
    prompt = ask("p" * 100)
    home = policy.choose(prompt, [view("a")])
    assert home.url == "http://a"
    chosen = policy.choose(prompt, [view("a", high), view("b", low)])
    assert (chosen.url == "http://b") is balanced
    if balanced:  # and the prompt is known there from then on
        assert policy.choose(prompt, [view("b", 1), view("c", 0)]).url == "http://b"


def test_equal_matches_go_to_the_less_loaded_worker() -> None:
    policy = cache_aware()
    for name in "abc":
        policy.choose(ask("shared prefix"), [view(name)])
    assert policy.choose(ask("shared prefix"), [view("a", 3), view("b", 1), view("c", 2)]).url == "http://b"


def test_trees_of_workers_that_have_gone_are_dropped_after_the_interval() -> None:
    clock = Clock()
    policy = cache_aware(clock)
    policy.choose(ask("hello"), [view("a"), view("b")])
    policy.choose(ask("goodbye"), [view("a"), view("b")])
    assert set(policy.trees) == {"http://a", "http://b"}
    clock.now = 30.0
    policy.choose(ask("x"), [view("a")])
    assert "http://b" in policy.trees
    for clock.now in (61.0, 122.0):
        policy.choose(ask("x"), [view("a")])
    assert set(policy.trees) == {"http://a"}


def test_options_are_read_and_bad_ones_named() -> None:
    policy = cache_aware(cache_threshold="0.9", max_tree_size="1000")
    assert policy.cache_threshold == 0.9 and policy.max_tree_size == 1000
    with pytest.raises(ConfigError, match=r"balance_abs_threshold.*'many'"):
        cache_aware(balance_abs_threshold="many")


# --- the tree -------------------------------------------------------------------------------------------------------


def common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check(tree: PrefixTree) -> None:
    """Size, ages and edges are consistent: every node listed once, parents younger than children."""
    order = {node: age for age, node in enumerate(tree._ages)}
    seen, size, stack = set(), 0, [tree._root]
    while stack:
        node = stack.pop()
        for first, child in (node.children or {}).items():
            assert child.parent is node and child.edge and child.edge[0] == first
            if node is not tree._root:
                assert order[node] > order[child]
            size += len(child.edge) + NODE_COST
            seen.add(child)
            stack.append(child)
    assert seen == order.keys() and size == tree.size


texts = st.lists(st.text(alphabet="ab", max_size=12), max_size=30)


@given(texts, st.text(alphabet="abc", max_size=14))
def test_a_match_is_the_longest_common_prefix_with_anything_inserted(known: list[str], query: str) -> None:
    tree = PrefixTree(1 << 30)
    for text in known:
        tree.insert(text)
    check(tree)
    assert tree.match(query) == max((common(text, query) for text in known), default=0)


@given(texts, st.integers(0, 12))
def test_the_tree_never_exceeds_its_size_and_forgets_the_oldest_first(known: list[str], nodes: int) -> None:
    limit = nodes * (NODE_COST + 12)
    tree = PrefixTree(limit)
    for index, text in enumerate(known):
        tree.insert(text)
        assert tree.size <= limit
        check(tree)
        # Its path has a node for each place at which an earlier text left it, and one for its end.
        nodes_of_path = len({common(text, other) for other in known[:index]} | {len(text)})
        if nodes_of_path * NODE_COST + len(text) <= limit:
            assert tree.match(text) == len(text)  # the youngest is there


def test_use_keeps_a_prefix_and_disuse_loses_it() -> None:
    tree = PrefixTree(3 * (NODE_COST + 10))
    for name in "abc":
        tree.insert(name * 10)
    tree.insert("a" * 10)
    tree.insert("d" * 10)
    assert [tree.match(name * 10) for name in "abcd"] == [10, 0, 10, 10]


def test_memory_stays_near_the_size_that_is_accounted() -> None:
    limit = 4 << 20
    rng = random.Random(1)
    tracemalloc.start()
    try:
        for length in (0, 4000):
            tree = PrefixTree(limit)
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(20_000 if not length else 4000):
                tree.insert(f"{rng.random()}" + "x" * length)
            used = tracemalloc.get_traced_memory()[0] - before
            assert tree.size <= limit < 1.2 * tree.size
            assert used < 1.25 * limit
    finally:
        tracemalloc.stop()


def test_matching_a_32k_prompt_against_a_full_tree_is_cheap() -> None:
    rng, tree = random.Random(1), PrefixTree(1 << 26)
    system = "".join(chr(rng.randint(97, 122)) for _ in range(24_000))
    for n in range(3000):
        tree.insert(system + f" user {n} says " + str(rng.random()) * 100)
    prompt = system + " user 1234 says something else entirely " + "z" * 8000
    times = []
    for _ in range(200):
        start = time.perf_counter()
        matched = tree.match(prompt)
        times.append(time.perf_counter() - start)
    assert matched >= 24_000 + len(" user 1234 says ")
    assert sorted(times)[100] < 0.0005
