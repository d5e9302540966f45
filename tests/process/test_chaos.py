"""Processes are killed and frozen at random while clients ask without a pause: no answer is wrong, late or missing."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from fault_kit import DEADLINE, MARGIN, Ask, Cluster, fault_cluster, send

pytestmark = [pytest.mark.process, pytest.mark.slow]

CLIENTS, SECONDS = 6, 60.0
MEMBERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
PARTS = ("", "", "'s runner", "'s scheduler", "'s api")
LENGTHS = (5, 40, 150, 300, 500)


@pytest.fixture(scope="module", params=["shm", "tcp"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With so little memory that cached blocks are evicted and requests wait for each other."""
    settings = ("--transfer-memory", request.param, "--max-total-tokens", "4000")
    with fault_cluster(tmp_path_factory.mktemp("chaos"), *settings) as found:
        yield found


class Clients:
    """Threads that ask the router until they are told to stop. `seen`: every request, and the text that is right."""

    def __init__(self, url: str, right: list[tuple[list[int], str]]) -> None:
        self.seen: list[tuple[Ask, str]] = []
        self._url, self._right = url, right
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60.0)
            assert not thread.is_alive()

    def _run(self, number: int) -> None:
        source = random.Random(number)
        while not self._stop.is_set():
            prompt, text = source.choice(self._right)
            ask = Ask(self._url, prompt, stream=source.random() < 0.7).start().wait()
            self.seen.append((ask, text))
            if ask.outcome != "tokens":
                self._stop.wait(0.1)


def strike(cluster: Cluster, source: random.Random) -> str:
    """Kills a member or a part of one, or freezes it for a while. Returns what it did."""
    name = source.choice(MEMBERS) + source.choice(PARTS)
    number = source.choice((signal.SIGKILL, signal.SIGSTOP))
    try:
        victims = cluster.victim(name)
    except (ValueError, psutil.Error):
        return f"{name} is starting again"
    try:
        send(victims, number)
        time.sleep(source.uniform(0.3, 4.0))
    finally:
        if number is signal.SIGSTOP:
            send(victims, signal.SIGCONT)
    return f"{number.name} of {name}"


def test_random_deaths_and_freezes_never_cost_more_than_an_error(cluster: Cluster) -> None:
    cluster.wait_until_healthy()
    source = random.Random(1)
    prompts = [[source.randrange(2, 256) for _ in range(source.choice(LENGTHS))] for _ in range(24)]
    asks = [Ask(cluster.router, prompt, stream=False).start().wait() for prompt in prompts]
    assert all(ask.outcome == "tokens" for ask in asks), asks
    right = [(ask.prompt, ask.text) for ask in asks]
    clients, strikes = Clients(cluster.router, right), []
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            strikes.append(strike(cluster, source))
            time.sleep(source.uniform(0.2, 3.0))
    finally:
        clients.stop()
    for ask, text in clients.seen:
        assert text == ask.text if ask.outcome == "tokens" else text.startswith(ask.text), (ask, text)
        assert ask.outcome != "timeout" and ask.seconds <= DEADLINE + MARGIN + 0.5, (ask, strikes)
    answered = sum(ask.outcome == "tokens" for ask, _ in clients.seen)
    assert answered > len(clients.seen) / 2 and len(strikes) > 5, (answered, len(clients.seen), strikes)
    cluster.wait_until_healthy()
    for prompt, text in right:
        ask = Ask(cluster.router, prompt, stream=False).start().wait()
        assert (ask.outcome, ask.text) == ("tokens", text), ask
