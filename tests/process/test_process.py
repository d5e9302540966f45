"""Children start, report, stop, fail and die; nothing of them is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pd.config import ControlConfig, LogConfig
from pd.errors import ProcessError
from pd.process import Child, ChildSpec
from tests.process.child_targets import Plan, StructPlan

pytestmark = pytest.mark.process

Run = Callable[..., Any]
TARGETS = "tests.process.child_targets"


def spec(target: str, config: Any = None, **more: Any) -> ChildSpec:
    return ChildSpec(target, f"{TARGETS}:{target}", Plan() if config is None else config, **more)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def children_of_this_process() -> set[int]:
    return {int(p) for task in Path("/proc/self/task").iterdir() for p in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(run_async: Run) -> Iterator[None]:
    run_async(asyncio.sleep(0))  # the first loop of a process opens descriptors that libuv keeps
    fds, children = set(os.listdir("/proc/self/fd")), children_of_this_process()
    yield
    gc.collect()
    assert children_of_this_process() == children
    assert set(os.listdir("/proc/self/fd")) == fds


def test_a_child_reports_ready_with_its_typed_settings_and_keeps_its_exit_code(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("echo", Plan(word="über", numbers=(1, 2, 3))))
        assert await child.ready(20) == {"word": "über", "numbers": [1, 2, 3], "loop": "uvloop"}
        assert not child.exited.done()
        assert await child.terminate(10) == 3
        assert await child.wait() == 3
        assert await child.terminate(10) == 3

    run_async(main(), 30)


def test_a_plain_main_is_stopped_by_flag_by_wait_and_by_callback(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("echo_sync", StructPlan("hello")))
        assert await child.ready(20) == {"word": "hello", "stopped": False, "early": False}
        assert await child.terminate(10) == 7
        spinning = await Child.start(spec("spin"))
        await spinning.ready(20)
        assert await spinning.terminate(10) == 0

    run_async(main(), 30)


def test_a_child_that_ignores_the_request_is_killed_after_the_bound(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("deaf"))
        await child.ready(20)
        started = time.monotonic()
        assert await child.terminate(0.2) == -signal.SIGKILL
        assert 0.15 < time.monotonic() - started < 5
        assert child.describe_exit() == "killed by SIGKILL"

    run_async(main(), 30)


def test_a_child_that_cannot_end_because_of_its_threads_is_killed_after_the_bound(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("slow_thread_at_exit"))
        await child.ready(20)
        assert await child.terminate(0.2) in (-signal.SIGKILL, -signal.SIGTERM)

    run_async(main(), 30)


def test_the_secret_travels_by_the_pipe_and_is_not_in_the_command_line(run_async: Run) -> None:
    async def main() -> None:
        plan = Plan(control=ControlConfig(cluster_secret="hush-hush"))
        child = await Child.start(spec("environment", plan, env={"PD_TEST_VARIABLE": "set"}))
        report = await child.ready(20)
        assert (report["variable"], report["secret"], report["comm"]) == ("set", "hush-hush", "pd-environment")
        assert "hush" not in report["command_line"] and "pd.child environment" in report["command_line"]
        assert len(report["fds"]) < 12
        assert await child.wait() == 0

    run_async(main(), 30)


def test_settings_that_are_logged_do_not_show_the_secret(run_async: Run, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        child = await Child.start(spec("log_the_secret", Plan(control=ControlConfig(cluster_secret="hush-hush"))))
        await child.ready(20)
        await child.wait()

    run_async(main(), 30)
    written = capfd.readouterr().err
    assert "hush" not in written and "cluster_secret='***'" in written


@pytest.mark.parametrize(
    ("target", "code", "reason"),
    [
        ("raise_model_error", 1, "model /models/x: no config.json"),
        ("raise_in_a_group", 2, "--port: taken"),
        ("raise_bug", 1, "KeyError: 'oops'"),
        ("last_words", 3, "driver says no"),
        ("no_such_function", 1, "no_such_function"),
    ],
)
def test_a_child_that_dies_first_explains_itself(run_async: Run, target: str, code: int, reason: str) -> None:
    async def main() -> None:
        child = await Child.start(spec(target))
        with pytest.raises(ProcessError) as caught:
            await child.ready(20)
        assert caught.value.exit_code == code
        assert reason in caught.value.problem and target in str(caught.value)

    run_async(main(), 30)


def test_a_crash_in_native_code_is_named_by_its_signal(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("crash"))
        with pytest.raises(ProcessError) as caught:
            await child.ready(20)
        assert caught.value.exit_code == -signal.SIGSEGV
        assert child.describe_exit().startswith("killed by SIGSEGV")

    run_async(main(), 30)


def test_a_failure_after_ready_is_an_event_with_its_reason(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("fail_later"))
        await child.ready(20)
        assert await child.wait() == 1
        assert child.describe_exit() == "exit code 1: the runner died"

    run_async(main(), 30)


def test_a_child_that_is_not_ready_in_time_is_an_error_and_still_the_parents_to_end(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("echo"))
        with pytest.raises(ProcessError, match=r"not ready within 0\.001 s"):
            await child.ready(0.001)
        assert not child.exited.done()
        await child.terminate(10)

    run_async(main(), 30)


def test_ready_is_reported_once_and_only_once(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("ready_twice"))
        await child.ready(20)
        assert await child.wait() == 1
        assert child.failure is not None and "already reported ready" in child.failure

    run_async(main(), 30)


def test_killing_a_child_is_noticed_at_once(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("echo"))
        await child.ready(20)
        os.kill(child.pid, signal.SIGKILL)
        started = time.monotonic()
        assert await child.wait() == -signal.SIGKILL
        assert time.monotonic() - started < 2

    run_async(main(), 30)


def test_cancelling_a_wait_leaves_the_child_alone_and_cancelling_terminate_kills_it(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("deaf"))
        await child.ready(20)
        waiting = asyncio.create_task(child.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not child.exited.done() and alive(child.pid)
        ending = asyncio.create_task(child.terminate(60))
        await asyncio.sleep(0.05)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert await child.wait() == -signal.SIGKILL

    run_async(main(), 30)


def test_a_child_ignores_the_terminals_interrupt(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("echo"))
        os.kill(child.pid, signal.SIGINT)  # most likely still starting: blocked, then ignored
        await child.ready(20)
        os.kill(child.pid, signal.SIGINT)
        await asyncio.sleep(0.05)
        assert not child.exited.done()
        assert await child.terminate(10) == 0

    run_async(main(), 30)


def test_a_log_line_explains_no_death(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("mourned", Plan(word="something from before")))
        assert await child.wait() == 3
        assert child.describe_exit() == "exit code 3"

    run_async(main(), 30)


def test_output_passes_through_in_whole_lines(run_async: Run, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        first, second = [await Child.start(spec("chatter", Plan(word=w * 40))) for w in "ab"]
        assert await first.wait() == await second.wait() == 0
        assert first.describe_exit() == "exit code 0: the end, without a newline"

    run_async(main(), 30)
    lines = capfd.readouterr().err.splitlines()
    for word in "ab":
        assert [line for line in lines if line.endswith(word * 40)] == [f"line {i} {word * 40}" for i in range(20_000)]


def test_a_child_logs_json_with_its_name(run_async: Run, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        child = await Child.start(spec("log_the_secret", instance="decode-0", log=LogConfig()))
        await child.ready(20)
        await child.wait()

    run_async(main(), 30)
    written = capfd.readouterr().err
    assert '"role": "log_the_secret"' in written and '"instance": "decode-0"' in written


def test_settings_that_cannot_travel_are_refused_before_anything_starts(run_async: Run) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="neither a dataclass nor a msgspec struct"):
            await Child.start(spec("echo", {"a": "dict"}))

    run_async(main())


_PARENT = """
import asyncio, uvloop
from pd.process import Child, ChildSpec
from tests.process.child_targets import Plan

async def main():
    child = await Child.start(ChildSpec("middle", "tests.process.child_targets:parent_of_two", Plan()))
    pids = (await child.ready(30))["pids"]
    print(child.pid, *pids, flush=True)
    await child.wait()

asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
"""


@pytest.mark.parametrize("victim", ["parent", "middle"])
def test_killing_a_parent_ends_its_children_and_theirs_even_with_the_interpreter_stuck(victim: str) -> None:
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(alive(pid) for pid in pids)
        os.kill(parent.pid if victim == "parent" else pids[0], signal.SIGKILL)
        parent.wait(20)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in pids if alive(pid)] == []


def test_the_end_of_the_pipe_alone_also_ends_a_child(run_async: Run) -> None:
    """Where the kernel has no parent-death signal."""

    async def main() -> None:
        child = await Child.start(spec("deaf"))
        await child.ready(20)
        asyncio.get_running_loop().remove_reader(child._channel.fileno())
        child._channel.shutdown(2)
        assert await child.wait() == -signal.SIGKILL

    run_async(main(), 30)


def test_a_child_whose_loop_is_stuck_is_aborted_and_shows_where(
    run_async: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        child = await Child.start(spec("stuck_loop", silence=0.4))
        await child.ready(20)  # the slow start is no hang
        assert await asyncio.wait_for(child.wait(), 10) == -signal.SIGABRT
        assert child.describe_exit() == "killed by SIGABRT: its event loop gave no sign of life for 0.4 s"

    run_async(main(), 30)
    assert "in stuck_loop" in capfd.readouterr().err


def test_a_frozen_child_that_is_watched_is_killed(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("echo", silence=0.4))
        await child.ready(20)
        os.kill(child.pid, signal.SIGSTOP)
        assert await asyncio.wait_for(child.wait(), 10) == -signal.SIGKILL
        assert "no sign of life" in child.describe_exit()

    run_async(main(), 30)


def test_a_watched_child_outlives_silence_of_its_parent_and_is_left_alone_while_it_runs(run_async: Run) -> None:
    async def main() -> None:
        child = await Child.start(spec("echo", silence=0.8))
        await child.ready(20)
        # As if this process had been stopped: looks that did not happen do not count.
        time.sleep(1.6)  # noqa: ASYNC251
        await asyncio.sleep(1.6)
        assert not child.exited.done()
        assert await child.terminate(10) == 0

    run_async(main(), 30)


def test_a_plain_child_starts_quickly(run_async: Run) -> None:
    async def main() -> None:
        best = 99.0
        for _ in range(3):
            started = time.monotonic()
            child = await Child.start(spec("spin"))
            await child.ready(20)
            best = min(best, time.monotonic() - started)
            await child.terminate(10)
        assert best < 2.0

    run_async(main(), 60)
