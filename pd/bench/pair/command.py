"""One invocation: the steps that are left, one after the other, each kept as soon as it is measured."""

from __future__ import annotations

import contextlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pd.bench.engine.shapes import make_model
from pd.bench.pair import curves, loads, single
from pd.bench.pair.launch import Launcher
from pd.bench.pair.options import Options
from pd.bench.pair.parts import Part, Parts, merge, of_phase
from pd.bench.pair.plan import START, Step, deployment_of, key_of, left_out, plan, setup_of
from pd.bench.pair.report import print_report, write_curves
from pd.bench.serve.report import write_json
from pd.bench.transfer_ends import installed
from pd.errors import ConfigError, PdError

#: Exit code when the time limit left steps unmeasured.
NOT_ALL = 3


def run_bench(options: Options) -> int:
    unusable = unusable_backends(options)
    if set(unusable) == set(options.transfers):
        raise ConfigError("--transfer", "; ".join(unusable.values()), "see `pd plugins`")
    options.out.mkdir(parents=True, exist_ok=True)
    bench = _Bench(options, unusable)
    if options.plan:
        bench.show_plan()
        return 0
    with ending_on_sigterm():
        left = bench.measure()
    failed = bench.report()
    for name in left:
        bench.say(f"not measured within the time limit: {name}; the same command goes on")
    return 1 if failed else NOT_ALL if left else 0


def unusable_backends(options: Options) -> dict[str, str]:
    """Of those that were asked for: the ones that no plugin brings, or that do not work on this machine, and why."""
    found = {}
    for name in options.transfers:
        try:
            installed(name)
        except ConfigError as error:
            found[name] = f"{error.problem}; {error.remedy}"
    return found


class _Bench:
    def __init__(self, options: Options, unusable: dict[str, str]) -> None:
        self._options, self._unusable = options, unusable
        self._parts, self._deployment = Parts(options.out / "parts"), deployment_of(options)
        self._began = time.monotonic()
        self._device = device_name(options)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _steps(self) -> list[Step]:
        """With each system's best chunk size, as far as tuning has come."""
        usable = [name for name in self._options.transfers if name not in self._unusable]
        return plan(self._options, usable, curves.best_chunk(of_phase(self._measured(), "tune")))

    def _measured(self) -> list[dict[str, Any]]:
        return self._parts.all(self._deployment)

    def _known(self, step: Step) -> bool:
        return self._parts.get(step.name, key_of(step, self._options)) is not None

    def show_plan(self) -> None:
        steps = self._steps()
        for step in steps:
            state = "measured" if self._known(step) else f"{step.seconds:.0f} s"
            self.say(f"{step.name}: {state}")
        left = [step for step in steps if not self._known(step)]
        setups = {setup_of(step, self._options) for step in left} - {None}
        total = sum(step.seconds for step in left) + START * len(setups)
        self.say(f"{len(left)} steps left, about {total:.0f} s with {len(setups)} starts")

    def measure(self) -> list[str]:
        """Every step that is left; the names of those that the time limit did not allow."""
        done: set[str] = set()
        with tempfile.TemporaryDirectory() as folder, Launcher(self._options, self._model()) as launcher:
            while (step := self._next(done)) is not None:
                if (lower := self._hopeless(step)) is not None:
                    self._keep(step, [], {"problem": f"left out: far beyond its limit at {lower:g}/s already"})
                elif time.monotonic() - self._began + self._need(step, launcher) > self._options.time_limit:
                    return [one.name for one in self._steps() if one.name not in done and not self._known(one)]
                else:
                    self._measure(step, launcher, Path(folder))
                done.add(step.name)
        return []

    def _model(self) -> str:
        if self._options.model is not None:
            return self._options.model
        folder = self._options.out / self._options.shape
        folder.mkdir(exist_ok=True)
        return str(make_model(folder, self._options.shape))

    def _need(self, step: Step, launcher: Launcher) -> float:
        return step.seconds + (0 if launcher.same(setup_of(step, self._options)) else START)

    def _next(self, done: set[str]) -> Step | None:
        return next(
            (s for s in self._steps() if s.name not in done and (self._options.again or not self._known(s))), None
        )

    def _measure(self, step: Step, launcher: Launcher, folder: Path) -> None:
        """One step, whose failure is its part: what can be measured besides is."""
        began = time.monotonic()
        commands: list[str] = []
        try:
            launcher.ensure(setup_of(step, self._options))
            commands = launcher.commands
            result = self._result(step, launcher, folder)
        except (PdError, OSError, subprocess.SubprocessError) as error:
            result = {"problem": str(error)}
        self._keep(step, commands, result)
        outcome = f"FAILED: {result['problem']}" if "problem" in result else "done"
        self.say(f"{step.name}: {outcome}, {time.monotonic() - began:.0f} s")

    def _keep(self, step: Step, commands: list[str], result: dict[str, Any]) -> None:
        key, today = key_of(step, self._options), time.strftime("%Y-%m-%d")
        about = (step.name, step.phase, key, self._deployment, today, self._device, step.transfer, step.visible)
        self._parts.put(Part(*about, commands, result))

    def _hopeless(self, step: Step) -> float | None:
        if step.phase != "load":
            return None
        keys = {key_of(s, self._options) for s in self._steps() if s.phase == "load"}
        points = [part for part in of_phase(self._measured(), "load") if part["key"] in keys]
        return curves.hopeless(points, step.system, step.rate)

    def _result(self, step: Step, launcher: Launcher, folder: Path) -> dict[str, Any]:
        options = self._options
        match step.phase:
            case "copy":
                return single.copy(options, folder)
            case "verify":
                return single.verify(step, options, launcher, folder)
            case "push":
                return single.push(step, options, launcher)
            case "kill":
                return loads.kill(step, options, launcher)
            case _:
                return loads.load(step, options, launcher)

    def report(self) -> bool:
        """Write and show what the folder has. Whether a step failed."""
        options, parts = self._options, self._measured()
        command = shlex.join(["pd", *sys.argv[1:]])
        document = merge(parts, command, left_out(options, self._unusable))
        write_json(options.json_path, document)
        for name, points in (("load", document["curves"]), ("trace", document["trace"])):
            if points:
                write_curves(options.out / f"{name}.png", f"{document['device']}, {document['date']}: {name}", points)
        print_report(document, Console(width=140))
        wrong = [name for name, found in document["verify"].items() if not found["right"]]
        return bool(wrong) or any(not why.startswith("left out") for why in document["failed"].values())


def device_name(options: Options) -> str:
    """The GPUs that are used, as NVIDIA's tool names them; without one the machine."""
    if options.device == "cpu" or shutil.which("nvidia-smi") is None:
        return f"CPU, {platform.machine()}"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.split("\n")
    used = [name.strip() for name in names if name.strip()][: len(set(options.gpus))]
    return f"{len(used)} x {used[0]}" if used else "GPU"


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does: what was started is stopped."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
