"""What every routing policy must do. A plugin's test file is a subclass that says how to make one:

    class TestMine(PolicySuite):
        def make(self, context):
            return Mine(context)

Every `test_…` method runs under pytest without further fixtures.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from pd.abc import PolicyContext, RouteRequest, RoutingPolicy, WorkerView
from pd.types import Load

#: A policy runs on the router's event loop. The median choice for a 32,000-character prompt must be faster than this.
CHOICE_BOUND = 0.005


def worker(name: str, in_flight: int = 0, *, load: Load | None = None, load_age: float = 0.1) -> WorkerView:
    return WorkerView(f"http://{name}:30000", "decode", in_flight, load, load_age if load is not None else 0.0)


def request(number: int = 1, text: str | None = None, token_ids: Sequence[int] | None = None) -> RouteRequest:
    return RouteRequest(number, "/v1/completions", text, token_ids)


class PolicySuite:
    """Subclass it, name the class Test…, implement `make`."""

    def make(self, context: PolicyContext) -> RoutingPolicy:
        raise AssertionError("a PolicySuite says how its policy is made")

    def policy(self, seed: int = 1) -> RoutingPolicy:
        return self.make(PolicyContext("decode", {}, random.Random(seed).random, time.monotonic))

    def test_it_has_the_interface(self) -> None:
        policy = self.policy()
        assert isinstance(policy, RoutingPolicy)
        assert isinstance(policy.wants_prompt, bool)

    def test_the_only_worker_is_chosen(self) -> None:
        policy, only = self.policy(), worker("a")
        assert all(policy.choose(request(n, "hello"), [only]) is only for n in range(5))

    def test_the_choice_is_one_of_the_workers_given_whatever_is_known_of_them(self) -> None:
        policy, rng = self.policy(), random.Random(2)
        for number in range(300):
            workers = [
                worker(
                    f"w{i}",
                    rng.choice([0, 1, 70, 10_000]),
                    load=rng.choice([None, Load(), Load(running=200, waiting=3000)]),
                    load_age=rng.choice([0.0, 1e6]),
                )
                for i in rng.sample(range(9), rng.randint(1, 9))
            ]
            before = list(workers)
            prompt = rng.choice([request(number), request(number, ""), request(number, "x" * rng.randint(1, 500))])
            chosen = policy.choose(prompt, workers)
            assert any(chosen is candidate for candidate in workers)
            assert workers == before
            if rng.random() < 0.7:
                policy.finished(prompt, chosen)

    def test_any_prompt_is_accepted(self) -> None:
        policy, workers = self.policy(), [worker("a"), worker("b")]
        prompts = [
            request(text=""),
            request(text="\x00\ud83d\ude00 \U0001f600 é"),
            request(token_ids=[]),
            request(token_ids=[0, 1, 2_000_000_000, 55_296, 65_279]),
            request(text="a" * 200_000),
            request(token_ids=list(range(50_000))),
        ]
        for prompt in [*prompts, *prompts]:
            assert policy.choose(prompt, workers) in workers

    def test_finished_is_accepted_for_a_worker_that_has_gone(self) -> None:
        policy, gone = self.policy(), worker("gone", 1)
        asked = request(text="hello")
        assert policy.choose(asked, [gone]) is gone
        assert policy.choose(request(2, "hello"), [worker("new")]).url == worker("new").url
        policy.finished(asked, gone)
        assert policy.choose(request(3, "hello"), [worker("new")]).url == worker("new").url

    def test_the_same_randomness_gives_the_same_choices(self) -> None:
        def choices() -> list[str]:
            policy = self.policy(seed=5)
            workers = [worker(name) for name in "abcd"]
            return [policy.choose(request(n, f"prompt {n}"), workers).url for n in range(50)]

        assert choices() == choices()

    def test_every_worker_gets_its_share_of_distinct_prompts(self) -> None:
        policy = self.policy()
        counts = dict.fromkeys("abcd", 0)
        urls = {worker(name).url: name for name in counts}
        for number in range(400):
            chosen = policy.choose(request(number, f"{number} is a number"), [worker(n, c) for n, c in counts.items()])
            counts[urls[chosen.url]] += 1
        assert min(counts.values()) >= 40, counts

    def test_a_choice_does_not_hold_up_the_event_loop(self) -> None:
        policy, rng = self.policy(), random.Random(3)
        workers = [worker(f"w{i}", load=Load(running=i)) for i in range(8)]
        system = "".join(chr(rng.randint(97, 122)) for _ in range(16_000))
        times = []
        for number in range(60):
            prompt = request(number, system + str(rng.random()) * 900)
            start = time.perf_counter()
            chosen = policy.choose(prompt, workers)
            times.append(time.perf_counter() - start)
            policy.finished(prompt, replace(chosen))
        assert sorted(times)[len(times) // 2] < CHOICE_BOUND
