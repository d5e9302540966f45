"""Instances and a router as a user starts them, one process each; every one is ended by its id, within a bound."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd.bench.pair.options import Options
from pd.bench.pair.plan import Instance, Setup, fraction
from pd.errors import PdError

#: Seconds for an instance to be healthy, for the router, and for any process to end.
START, ROUTER_START, END = 240.0, 30.0, 40.0

_PR_SET_PDEATHSIG, _LIBC = 1, ctypes.CDLL(None)


@dataclass
class Process:
    """`ports`: HTTP, and the control plane of a prefill instance; a restart keeps them."""

    name: str
    line: list[str]
    environment: dict[str, str]
    ports: tuple[int, ...]
    log: Path
    popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def command(self) -> str:
        return as_typed(self.line, self.environment)

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "pd", *self.line],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )

    def wait_healthy(self, bound: float) -> None:
        """Raises PdError, with the end of the log, when it is not in time."""
        deadline = time.monotonic() + bound
        while not healthy(self.url):
            if not self.alive or time.monotonic() > deadline:
                code = self.popen.poll() if self.popen is not None else None
                end = "has ended with code " + str(code) if code is not None else f"is not healthy after {bound:g} s"
                raise PdError(f"{self.command} {end}: {tail(self.log)}")
            time.sleep(0.1)

    def flush(self) -> None:
        """Empty its prefix cache; on a router those of all instances."""
        request = urllib.request.Request(f"{self.url}/flush_cache", method="POST")
        with urllib.request.urlopen(request, timeout=30):
            pass

    def kill(self) -> None:
        """The whole instance: its own processes die with it."""
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait(END)

    def stop(self) -> None:
        if self.popen is None:
            return
        if self.alive:
            self.popen.send_signal(signal.SIGTERM)
        try:
            self.popen.wait(END)
        except subprocess.TimeoutExpired:
            self.kill()
        self.popen = None


class Launcher:
    """Use as a context manager. What a setup shares with the one before it goes on running."""

    def __init__(self, options: Options, model: str) -> None:
        self._options, self._model = options, model
        self._running: dict[str, tuple[Any, Process]] = {}
        self._logs = options.out / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.ensure(None)

    def __getitem__(self, name: str) -> Process:
        return self._running[name][1]

    @property
    def commands(self) -> list[str]:
        return [process.command for _, process in self._running.values()]

    def same(self, setup: Setup | None) -> bool:
        """Whether nothing has to be started for this one."""
        return setup is None or all(self._kept(one.name, _spec(setup, one)) for one in setup.instances)

    def _kept(self, name: str, spec: Any) -> bool:
        return name in self._running and self._running[name][0] == spec and self._running[name][1].alive

    def ensure(self, setup: Setup | None) -> None:
        """Exactly this setup runs when it returns. Raises PdError."""
        specs = {one.name: _spec(setup, one) for one in setup.instances} if setup is not None else {}
        kept = {name for name, spec in specs.items() if self._kept(name, spec)}
        router = (setup.routed, setup.policy) if setup is not None else None
        if setup is not None and kept >= set(setup.routed) and self._kept("router", router):
            kept.add("router")
        for name in sorted(self._running.keys() - kept, key=lambda n: n != "router"):
            self._running.pop(name)[1].stop()
        if setup is None:
            return
        fresh = [one for one in setup.instances if one.name not in kept]
        for one in fresh:
            for before in fresh[: fresh.index(one)]:
                if one.share and before.gpu == one.gpu:  # it must have its share before this one looks at what is free
                    self[before.name].wait_healthy(START)
            process = self._instance(setup, one)
            self._running[one.name] = (specs[one.name], process)
            process.start()
        for one in fresh:
            self[one.name].wait_healthy(START)
        if "router" not in kept:
            process = self._router(setup)
            self._running["router"] = (router, process)
            process.start()
            process.wait_healthy(ROUTER_START)

    def _log(self, name: str) -> Path:
        return self._logs / f"{time.strftime('%H%M%S')}-{name}.log"

    def _instance(self, setup: Setup, one: Instance) -> Process:
        ports = free_ports(2 if one.role == "prefill" else 1)
        line = serve_line(self._options, self._model, setup, one, ports)
        return Process(one.name, line, environment_of(one), ports, self._log(one.name))

    def _router(self, setup: Setup) -> Process:
        roles = {one.name: one.role for one in setup.instances}
        line = ["route"]
        for flag in ("--prefill", "--decode"):
            for name in setup.routed:
                if (roles[name] == "prefill") == (flag == "--prefill"):
                    line += [flag, self[name].url]
        line += ["--decode-policy", setup.policy] if setup.policy else []
        (port,) = free_ports(1)
        line += ["--port", str(port), "--log-format", "json", "--request-timeout", "60"]
        return Process("router", line, {}, (port,), self._log("router"))


def serve_line(options: Options, model: str, setup: Setup, one: Instance, ports: tuple[int, ...]) -> list[str]:
    """The arguments of `pd`. A setting that is the default is not there, as in a user's line."""
    line = ["serve", model, "--role", one.role, "--port", str(ports[0])]
    line += ["--control-port", str(ports[1])] if one.role == "prefill" else []
    line += ["--transfer", one.transfer] if one.transfer else []
    line += ["--load-format", "dummy"] if options.model is None else []
    line += ["--device", "cpu"] if options.device == "cpu" else []
    line += ["--base-gpu-id", str(one.gpu)] if one.gpu and not one.visible else []
    line += ["--mem-fraction-static", str(fraction(setup, one.name))] if one.share else []
    line += ["--chunked-prefill-size", str(one.chunk), "--max-prefill-tokens", str(one.chunk)] if one.chunk else []
    return [*line, "--name", one.name, "--log-format", "json", *options.serve_flags]


def environment_of(one: Instance) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": str(one.gpu)} if one.visible else {}


def as_typed(line: list[str], environment: dict[str, str]) -> str:
    """The command as a user writes it."""
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), "pd", *line])


def _spec(setup: Setup | None, one: Instance) -> Any:
    assert setup is not None
    return one, fraction(setup, one.name)


def _die_with_parent() -> None:
    """In the child, before it becomes `pd`: should this benchmark be killed, what it started ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


#: Below those that the kernel gives to connections, so that a port is still free when its instance starts again.
_PORTS = itertools.cycle(random.sample(range(21_000, 32_000), 11_000))


def free_ports(count: int) -> tuple[int, ...]:
    return tuple(itertools.islice(filter(_is_free, _PORTS), count))


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return True
    return False


def healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def tail(path: Path, size: int = 800) -> str:
    """The end of a log, on one line."""
    return " | ".join(path.read_text(errors="replace")[-size:].split("\n")).strip(" |") if path.exists() else ""
