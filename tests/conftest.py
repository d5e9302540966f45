"""Shared by every test: one thread per numeric library, bounded property tests, an event loop with a time limit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import hypothesis
import pytest
import uvloop

T = TypeVar("T")

# Before anything imports numpy or torch: the suite runs on small machines, several processes at a time.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile(
    "pd", deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("pd"), max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "pd"))


@pytest.fixture(autouse=True)
def _settings_of_the_shell_do_not_reach_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith(("PD_", "SGLANG_")):
            monkeypatch.delenv(variable)


@pytest.fixture
def run_async() -> Callable[..., Any]:
    """`run_async(coroutine, limit=20.0)`: run it on a fresh uvloop; more than `limit` seconds is a failure."""

    def run(coroutine: Coroutine[Any, Any, T], limit: float = 20.0) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(limit):
                return await coroutine

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(bounded())

    return run


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, str]]]:
    """Names and addresses of two network namespaces that a veth pair joins."""
    from hosts_kit import hosts

    with hosts() as found:
        yield found
