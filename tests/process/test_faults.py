"""kill -9 and SIGSTOP at named points of the hand-off, on one long-lived cluster whose dead members come back."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fault_kit import DEADLINE, MARGIN, Ask, Cluster, eventually, fault_cluster, gone, send

pytestmark = pytest.mark.process

KILL, STOP = signal.SIGKILL, signal.SIGSTOP

VICTIMS = ("prefill-0", "prefill-0's runner", "decode-0's runner", "router")

#: The way of a hand-off through the processes, in order.
POINTS = (
    "prefill-0.scheduler.got:Prefill",
    "prefill-0.runner.step",
    "prefill-0.runner.push",
    "prefill-0.scheduler.sent:FirstToken",
    "decode-0.scheduler.got:FirstToken",
    "prefill-0.scheduler.sent:Landed",
    "decode-0.scheduler.got:Landed",
    "decode-0.runner.step",
)

#: `make test`: each victim once per signal, and every point once.
FEW = {
    ("prefill-0", KILL): "prefill-0.runner.push",
    ("prefill-0", STOP): "prefill-0.scheduler.sent:FirstToken",
    ("prefill-0's runner", KILL): "prefill-0.scheduler.got:Prefill",
    ("prefill-0's runner", STOP): "prefill-0.runner.step",
    ("decode-0's runner", KILL): "decode-0.scheduler.got:FirstToken",
    ("decode-0's runner", STOP): "decode-0.runner.step",
    ("router", KILL): "prefill-0.scheduler.sent:Landed",
    ("router", STOP): "decode-0.scheduler.got:Landed",
}

#: Further victims, and where they are hit, in `make test-all`.
MORE = ("decode-0", "decode-0's scheduler", "decode-0's api", "prefill-0's scheduler", "prefill-0's api")
MORE_POINTS = ("prefill-0.runner.push", "decode-0.runner.step")

#: How a request of a victim may end. From a frozen router or api nothing comes, so the client gives up.
ENDS = {
    ("prefill-0", KILL): {"tokens"},
    ("prefill-0", STOP): {"tokens", "error"},
    ("prefill-0's runner", KILL): {"tokens"},
    ("prefill-0's runner", STOP): {"tokens", "error"},
    ("decode-0's runner", KILL): {"error", "cut"},
    ("decode-0's runner", STOP): {"error", "cut"},
    ("router", KILL): {"cut"},
    ("router", STOP): {"timeout"},
    ("decode-0", KILL): {"cut"},
    ("decode-0", STOP): {"timeout"},
    ("decode-0's scheduler", KILL): {"error", "cut"},
    ("decode-0's scheduler", STOP): {"error", "cut"},
    ("decode-0's api", KILL): {"cut"},
    ("decode-0's api", STOP): {"timeout"},
    ("prefill-0's scheduler", KILL): {"tokens"},
    ("prefill-0's scheduler", STOP): {"tokens", "error"},
    ("prefill-0's api", KILL): {"tokens"},
    ("prefill-0's api", STOP): {"tokens"},
}

#: Through the router nobody waits beyond his deadline, whatever happens to a decode instance.
ROUTED_ENDS = {"tokens", "error", "cut"}

_seeds = itertools.count()


@dataclass(frozen=True)
class Case:
    victim: str
    number: signal.Signals
    point: str

    @property
    def points(self) -> tuple[str, ...]:
        """The router chooses the pair, so that the point may be reached on either."""
        return (self.point, self.point.replace("-0.", "-1.")) if self.victim == "router" else (self.point,)

    @property
    def instance(self) -> str:
        """The instance that is hit, "" if it is the router."""
        member = self.victim.partition("'s ")[0]
        return "" if member == "router" else member


def cases() -> list[object]:
    every = [*itertools.product(VICTIMS, (KILL, STOP), POINTS), *itertools.product(MORE, (KILL, STOP), MORE_POINTS)]
    return [
        pytest.param(
            Case(victim, number, point),
            marks=[] if FEW.get((victim, number)) == point else [pytest.mark.slow],
            id=f"{number.name} of {victim} at {point}",
        )
        for victim, number, point in every
    ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with fault_cluster(tmp_path_factory.mktemp("faults")) as found:
        yield found


def prompt(tokens: int = 300) -> list[int]:
    """One that nobody has in a cache."""
    source = random.Random(f"faults {next(_seeds)}")
    return [source.randrange(2, 256) for _ in range(tokens)]


def references(cluster: Cluster, *prompts: list[int]) -> list[str]:
    """What the pair that no fault will hit makes of them."""
    asks = [cluster.ask(one, stream=False, decode=1, first=1).start().wait() for one in prompts]
    for ask in asks:
        assert ask.outcome == "tokens", ask
    return [ask.text for ask in asks]


def serves(ask: Ask, text: str) -> None:
    ask.start().wait()
    assert (ask.outcome, ask.text) == ("tokens", text), ask


@pytest.mark.parametrize("case", cases())
def test_whoever_dies_or_freezes_requests_end_and_nothing_leaks(cluster: Cluster, case: Case) -> None:
    cluster.wait_until_healthy()
    prompts = [prompt() for _ in range(3)]
    texts = references(cluster, *prompts)
    victims = cluster.victim(case.victim)
    asks = [cluster.ask(one, stream=stream) for one, stream in zip(prompts[:2], (True, False), strict=True)]
    if case.victim == "router":
        asks = [Ask(cluster.router, ask.prompt, ask.stream) for ask in asks]
    bystander = cluster.ask(prompts[2], stream=True, decode=1, first=1)
    routed = [Ask(cluster.router, ask.prompt, ask.stream) for ask in asks] if case.victim in MORE else []

    cluster.faults.arm(*case.points)
    began = time.monotonic()
    for ask in (*asks, bystander, *routed):
        ask.start()
    try:
        cluster.faults.wait(case.points)
        send(victims, case.number)
        if case.number is KILL:
            eventually(lambda: all(gone(victim) for victim in victims), 5.0)
        cluster.faults.release(*case.points)
        check_ends(ENDS[case.victim, case.number], [ask.wait() for ask in asks], texts)
        check_ends(ROUTED_ENDS, [ask.wait() for ask in routed], texts)
        bystander.wait()
        assert (bystander.outcome, bystander.text) == ("tokens", texts[2]), bystander
        check_survivors(cluster, case, began)
    finally:
        cluster.faults.release(*case.points)
        if case.number is STOP:
            send(victims, signal.SIGCONT)
    check_comeback(cluster, case, prompts[0], texts[0])
    if case.number is KILL:
        assert not {victim.pid for victim in victims} & {process.pid for process in cluster.victim(case.victim)}


def check_ends(ends: set[str], asks: list[Ask], texts: list[str]) -> None:
    for ask, text in zip(asks, texts, strict=False):
        assert ask.outcome in ends, ask
        assert ask.seconds <= DEADLINE + MARGIN + 0.5, ask
        assert text.startswith(ask.text), ask  # never a wrong token, even before an error
        if ask.outcome == "tokens":
            assert ask.text == text, ask
        if ask.outcome == "error":
            assert ask.problem, ask


def check_survivors(cluster: Cluster, case: Case, began: float) -> None:
    """Within 2 s of the last request's end (of a frozen router: of its deadline) they hold nothing any more."""
    survivors = [name for name in cluster.names if name != case.instance]
    bound = max(0.1, began + DEADLINE + 2.0 - time.monotonic()) if (case.victim, case.number) == ("router", STOP) else 2
    for name in survivors:
        eventually(lambda name=name: cluster.clean(name), bound, lambda name=name: (name, cluster.books(name)))
    mine = prompt(100)
    (text,) = references(cluster, mine)
    if case.instance != "decode-0":  # whichever prefill instance is left, or itself
        serves(cluster.ask(mine, stream=True), text)
    if case.victim != "router":
        through = [Ask(cluster.router, mine, stream=False)]

        def routed() -> bool:
            through[0] = Ask(cluster.router, mine, stream=False).start().wait()
            return through[0].outcome == "tokens"

        eventually(routed, DEADLINE, lambda: through[0])
        assert through[0].text == text


def check_comeback(cluster: Cluster, case: Case, mine: list[int], text: str) -> None:
    """On its old addresses the victim works again, and is used again."""
    cluster.wait_until_healthy()
    serves(Ask(cluster.router, mine, stream=True), text)
    last: list[Ask] = []

    def used() -> bool:
        ask = cluster.ask(prompt(100), stream=False).start().wait()
        last[:] = [ask]
        return ask.outcome == "tokens" and ask.used == "prefill-0"

    eventually(used, 10.0, lambda: last)
