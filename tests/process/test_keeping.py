"""What `pd up` does with a member that does not come up again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pd import cluster
from pd.cluster import Member
from tests.process.child_targets import Plan

pytestmark = pytest.mark.process


def test_a_member_that_comes_up_too_slowly_is_ended_and_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_async: Callable[..., Any]
) -> None:
    monkeypatch.setattr(cluster, "START_TIMEOUT", 3.0)
    lives = tmp_path / "lives"

    async def main() -> None:
        target = "tests.process.child_targets:ready_at_times"
        member = Member("slow", target, Plan(word=str(lives)), lambda config, _: config, drain=0.0)
        await member.start()
        keeping = asyncio.create_task(cluster._keep(member, restart=True))
        try:
            async with asyncio.timeout(20):
                while lives.read_text() != "xxx":  # noqa: ASYNC110 (the file is another process's)
                    await asyncio.sleep(0.02)
            assert member.child is not None
            assert await member.child.ready(5.0) == {}
        finally:
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping
            await member.stop()

    run_async(main(), 40)
    assert lives.read_text() == "xxx"
