"""Child processes: started by dotted name, watched, ended within a bound; they die with their parent.

Parent: `child = await Child.start(ChildSpec(…))`, `await child.ready(timeout)`, `await child.terminate(bound)`.
Child: `def main(config, context)` or `async def main(config, context)`, which calls `context.report_ready({…})` and
returns when `context.stopping` is set. A child starts as `python -m pd.child`; nothing is ever forked.

Parent and child share a socket pair. The settings travel over it, not in argv, since they may hold the cluster
secret; the child reports over it; its end tells the child that the parent is gone where the kernel's parent-death
signal does not. An async child may be watched: when its event loop gives no sign of life it is aborted, which prints
where each of its threads stood. A child's stdout and stderr pass through the parent line by line, so that the last
line can explain its death.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from pd.child import Alive, Boot, ChildContext, Failure, Progress, Ready, Report, pack_frame, take_frame
from pd.config import LogConfig
from pd.errors import ProcessError
from pd.screen import write_lines

__all__ = ["Child", "ChildContext", "ChildSpec"]

_KILL_BOUND = 10.0  # seconds between SIGKILL and giving up: the kernel may have to tear down device memory
_LOOKS = 4  # at a watched child within its `silence`. Looks are counted, not seconds: this process may be stopped, too
_ABORT_BOUND = 1.0  # seconds between SIGABRT and SIGKILL for a child that hangs: a stopped process does not abort


@dataclass(frozen=True)
class ChildSpec:
    """What to start. `target` is "module:function"; `config` any dataclass or msgspec struct of a module that the
    child can import. `env` is added to this process's environment, before the child imports anything. `log.log_format`
    "auto" means JSON in a child: resolve it first where the parent has a terminal.

    `silence`: once it is ready, an async child whose event loop has not run for about so many seconds counts as hung
    and is ended; 0 watches nothing.
    """

    name: str
    target: str
    config: Any
    instance: str = ""
    log: LogConfig = field(default_factory=LogConfig)
    env: Mapping[str, str] = field(default_factory=dict)
    silence: float = 0.0


class Child:
    """A running child process. Belongs to the event loop on which it was started.

    `exited` resolves to its exit code (negative: the number of the signal that killed it); it never fails. Whoever
    starts a child ends it: `await child.terminate(bound)`. The kernel's parent-death signal follows the thread that
    started the child, so start children from a thread that lives as long as the process.
    """

    def __init__(
        self,
        spec: ChildSpec,
        process: subprocess.Popen[bytes],
        channel: socket.socket,
        output: int,
        show: Callable[[bytes], None],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.name = spec.name
        self.pid = process.pid
        self.failure: str | None = None  # what the child gave as its reason, if it did
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process = process
        self._channel = channel
        self._output = _LineForwarder(output, show)
        self._progress = progress
        self._ready: dict[str, Any] | None = None
        self._ready_or_exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = bytearray()
        self._reports = msgspec.msgpack.Decoder(Report)
        self._loop = asyncio.get_running_loop()
        self._silence, self._silent_looks = spec.silence, 0
        self._next_look: asyncio.TimerHandle | None = None
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._loop.add_reader(channel.fileno(), self._on_report)
        self._loop.add_reader(output, self._on_output)

    @classmethod
    async def start(
        cls,
        spec: ChildSpec,
        show: Callable[[bytes], None] = write_lines,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> Child:
        """Returns when the process exists and has its settings; `ready` says when it is up. Raises ProcessError.

        `show` gets its output, in whole lines; `progress` what it reports of its start-up: stage, done, total.
        """
        boot = _boot_frame(spec)
        try:
            process, channel, output = _spawn(spec)
        except OSError as error:
            raise ProcessError(spec.name, f"cannot start: {error}") from error
        child = cls(spec, process, channel, output, show, progress)
        try:
            await child._send(boot)
        except BaseException:
            child.kill()
            raise
        return child

    async def ready(self, timeout: float) -> dict[str, Any]:
        """What the child reported. Raises ProcessError when it exits first, with its own reason or last line, or is
        not ready in time; in the latter case it still runs.
        """
        await asyncio.wait({self._ready_or_exited}, timeout=timeout)
        if self._ready is not None:
            return self._ready
        if not self.exited.done():
            raise ProcessError(self.name, f"not ready within {timeout:g} s{self._explanation()}")
        problem = f"exited before it was ready{self._explanation()}"
        raise ProcessError(self.name, problem, self.exited.result(), self.failure or "")

    async def wait(self) -> int:
        """The exit code. Cancelling the wait does not touch the child."""
        return await asyncio.shield(self.exited)

    async def terminate(self, bound: float) -> int:
        """SIGTERM, and SIGKILL after `bound` seconds (or on cancellation); returns the exit code."""
        try:
            if not self.exited.done():
                self._process.send_signal(signal.SIGTERM)
                await asyncio.wait({self.exited}, timeout=bound)
        finally:
            self.kill()
        await asyncio.wait({self.exited}, timeout=_KILL_BOUND)
        if not self.exited.done():
            raise ProcessError(self.name, f"still there {_KILL_BOUND:g} s after SIGKILL")
        return self.exited.result()

    def kill(self) -> None:
        """SIGKILL, if it still runs. `exited` follows."""
        if not self.exited.done():
            self._process.kill()

    def describe_exit(self) -> str:
        """One line for a log, once exited: "exit code 1: no such model"."""
        code = self.exited.result()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return how + self._explanation()

    def _explanation(self) -> str:
        reason = self.failure or self._output.last_line
        return f": {reason}" if reason else ""

    async def _send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._channel, data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is dead already: `exited` and `ready` say so

    def _on_report(self) -> None:
        while True:
            try:
                data = self._channel.recv(65536)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self._loop.remove_reader(self._channel.fileno())
                return
            self._received += data
            while (frame := take_frame(self._received)) is not None:
                self._handle(self._reports.decode(frame))

    def _handle(self, report: Report) -> None:
        match report:
            case Ready(data):
                self._ready = data
                if not self._ready_or_exited.done():
                    self._ready_or_exited.set_result(None)
                if self._silence:
                    self._look_again()
            case Failure(reason):
                self.failure = reason
            case Progress(stage, done, total):
                self._progress(stage, done, total)
            case Alive():
                self._silent_looks = 0

    def _look_again(self) -> None:
        self._next_look = self._loop.call_later(self._silence / _LOOKS, self._look)

    def _look(self) -> None:
        self._silent_looks += 1
        if self._silent_looks <= _LOOKS:
            return self._look_again()
        self.failure = self.failure or f"its event loop gave no sign of life for {self._silence:g} s"
        self._process.send_signal(signal.SIGABRT)
        self._next_look = self._loop.call_later(_ABORT_BOUND, self.kill)

    def _on_output(self) -> None:
        if not self._output.forward():
            self._loop.remove_reader(self._output.fd)

    def _on_exit(self) -> None:
        code = self._process.poll()
        if code is None:
            return
        # What it said last is in the pipes; its own children may hold their other ends, so there is no waiting for EOF.
        self._on_report()
        self._output.forward()
        if self._next_look is not None:
            self._next_look.cancel()
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_reader(self._output.fd)
        os.close(self._pidfd)
        self._channel.close()
        self._output.close()
        if not self._ready_or_exited.done():
            self._ready_or_exited.set_result(None)
        self.exited.set_result(code)


class _LineForwarder:
    """Shows a child's output in whole lines and remembers the last one, unless it is a log line: that tells what the
    child was doing, not why it ended.
    """

    _LONGEST = 1 << 16

    def __init__(self, fd: int, show: Callable[[bytes], None]) -> None:
        self.fd, self._show = fd, show
        self.last_line = ""
        self._partial = b""

    def forward(self) -> bool:
        """Everything that is there; False at the end of the stream."""
        while True:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return True
            lines, newline, self._partial = (self._partial + data).rpartition(b"\n")
            if len(self._partial) > self._LONGEST:
                lines, newline, self._partial = lines + newline + self._partial, b"\n", b""
            self._write(lines + newline)
            if not data:
                return False

    def close(self) -> None:
        if self._partial:
            self._write(self._partial + b"\n")
        os.close(self.fd)

    def _write(self, text: bytes) -> None:
        for line in reversed(text.splitlines()):
            if line.strip():
                self.last_line = "" if line.startswith(b'{"') else line.strip().decode(errors="replace")
                break
        self._show(text)


def _spawn(spec: ChildSpec) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    ours, theirs = socket.socketpair()
    output, their_output = os.pipe()
    argv = [sys.executable, "-P", "-m", "pd.child", spec.name, str(theirs.fileno())]
    # The terminal's Ctrl-C goes to the whole group. Blocked here, SIGINT stays blocked in the child until it ignores
    # it: there is no moment at which it could kill a starting child.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=their_output,
            stderr=their_output,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **_import_path(), **spec.env},
        )
    except BaseException:
        ours.close()
        os.close(output)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        os.close(their_output)
    ours.setblocking(False)
    os.set_blocking(output, False)
    return process, ours, output


def _import_path() -> dict[str, str]:
    """Lets a child find pd when it runs from a checkout. The rest of sys.path follows in the boot frame."""
    root = str(Path(__file__).resolve().parent.parent)
    if Path(root).name in ("site-packages", "dist-packages"):
        return {}
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": root + (os.pathsep + inherited if inherited else "")}


def _boot_frame(spec: ChildSpec) -> bytes:
    config_type = type(spec.config)
    if not (is_dataclass(config_type) or issubclass(config_type, msgspec.Struct)):
        raise TypeError(f"{config_type.__name__} is neither a dataclass nor a msgspec struct")
    boot = Boot(
        name=spec.name,
        instance=spec.instance,
        target=spec.target,
        config_type=f"{config_type.__module__}:{config_type.__qualname__}",
        config=msgspec.msgpack.encode(spec.config),
        log=spec.log,
        parent=os.getpid(),
        pulse=spec.silence / (2 * _LOOKS),
        # Some entries are names of import hooks rather than paths.
        path=[os.path.abspath(entry) if os.path.exists(entry or ".") else entry for entry in sys.path],
    )
    return pack_frame(msgspec.msgpack.encode(boot))
