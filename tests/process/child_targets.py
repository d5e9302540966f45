"""What the children in test_process.py run."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pd.config import ControlConfig, LogConfig
from pd.errors import ConfigError, ModelError
from pd.logs import get_logger
from pd.process import Child, ChildContext, ChildSpec


@dataclass(frozen=True)
class Plan:
    word: str = ""
    numbers: tuple[int, ...] = ()
    control: ControlConfig = field(default_factory=ControlConfig)
    log: LogConfig = field(default_factory=LogConfig)


class StructPlan(msgspec.Struct, frozen=True):
    word: str


async def echo(plan: Plan, context: ChildContext) -> int:
    context.report_ready(
        {"word": plan.word, "numbers": list(plan.numbers), "loop": type(asyncio.get_running_loop()).__module__}
    )
    await context.stopping.wait()
    return len(plan.numbers)


def echo_sync(plan: StructPlan, context: ChildContext) -> int:
    called: list[str] = []
    context.on_stop(lambda: called.append("stop"))
    context.report_ready({"word": plan.word, "stopped": context.stop_requested(), "early": context.wait_stop(0.01)})
    stopped = context.wait_stop(30)
    context.on_stop(lambda: called.append("late"))
    return 7 if stopped and context.stop_requested() and called == ["stop", "late"] else 1


def spin(plan: Plan, context: ChildContext) -> None:
    context.report_ready({})
    while not context.stop_requested():
        time.sleep(0.001)


def deaf(plan: Plan, context: ChildContext) -> None:
    context.report_ready({})
    while True:
        time.sleep(1)


def environment(plan: Plan, context: ChildContext) -> None:
    command_line = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode()
    context.report_ready(
        {
            "variable": os.environ.get("PD_TEST_VARIABLE"),
            "secret": plan.control.cluster_secret,
            "command_line": command_line,
            "comm": Path("/proc/self/comm").read_text().strip(),
            "fds": sorted(os.listdir("/proc/self/fd")),
        }
    )


def raise_model_error(plan: Plan, context: ChildContext) -> None:
    raise ModelError("/models/x", "no config.json")


async def raise_in_a_group(plan: Plan, context: ChildContext) -> None:
    async def bad() -> None:
        raise ConfigError("--port", "taken")

    async with asyncio.TaskGroup() as group:
        group.create_task(bad())


def raise_bug(plan: Plan, context: ChildContext) -> None:
    raise KeyError("oops")


async def fail_later(plan: Plan, context: ChildContext) -> None:
    context.report_ready({})
    context.fail("the runner died")
    await context.stopping.wait()


def last_words(plan: Plan, context: ChildContext) -> None:
    print("first line", file=sys.stderr)
    os.write(2, b"driver says no\n\n")
    os._exit(3)


def crash(plan: Plan, context: ChildContext) -> None:
    ctypes.string_at(0)


def log_the_secret(plan: Plan, context: ChildContext) -> None:
    get_logger().info("starting", plan=plan)
    context.report_ready({})


def chatter(plan: Plan, context: ChildContext) -> None:
    for i in range(20_000):
        print(f"line {i} {plan.word}", flush=False)
    print("the end, without a newline", end="", flush=True)
    context.report_ready({})


def mourned(plan: Plan, context: ChildContext) -> None:
    """Prints `word` and then a line of its log, and is gone."""
    print(plan.word)
    print('{"event": "working", "level": "info"}', flush=True)
    os._exit(3)


def ready_twice(plan: Plan, context: ChildContext) -> None:
    context.report_ready({})
    context.report_ready({})


async def parent_of_two(plan: Plan, context: ChildContext) -> None:
    """Grandchildren: one that waits, one that ignores everything."""
    waiting = await Child.start(ChildSpec("waiting", "tests.process.child_targets:echo", Plan()))
    stuck = await Child.start(ChildSpec("stuck", "tests.process.child_targets:hold_the_interpreter", Plan()))
    await waiting.ready(20)
    await stuck.ready(20)
    context.report_ready({"pids": [waiting.pid, stuck.pid]})
    await context.stopping.wait()
    await waiting.terminate(5)
    await stuck.terminate(0.1)


def hold_the_interpreter(plan: Plan, context: ChildContext) -> None:
    """As a long call into a library that keeps the GIL: no Python code, not even the watching thread, can run."""
    context.report_ready({})
    ctypes.PyDLL(None).sleep(60)


def slow_thread_at_exit(plan: Plan, context: ChildContext) -> None:
    threading.Thread(target=time.sleep, args=(60,)).start()
    context.report_ready({})


async def stuck_loop(plan: Plan, context: ChildContext) -> None:
    """Its event loop runs for half a second, slow to start as it is, and never again."""
    time.sleep(1.0)  # noqa: ASYNC251
    context.report_ready({})
    await asyncio.sleep(0.5)
    time.sleep(60)  # noqa: ASYNC251


def ready_at_times(plan: Plan, context: ChildContext) -> int:
    """`word`: a file that counts its lives. It dies in the first one, is never ready in the second, then serves."""
    lives = Path(plan.word)
    lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
    if lives.read_text() == "xx":
        context.wait_stop(60)
        return 1
    context.report_ready({})
    if lives.read_text() != "x":
        context.wait_stop(60)
    return 1
