"""The child's side of `pd.process`: what the two ends say to each other, and `python -m pd.child`."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import importlib
import inspect
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeAlias

import msgspec

from pd import logs
from pd.config import LogConfig, secret_values
from pd.errors import ConfigError, PdError

_FRAME = struct.Struct("<I")
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class Boot(msgspec.Struct):
    """The one frame from parent to child: what to become."""

    name: str
    instance: str
    target: str
    config_type: str
    config: bytes
    log: LogConfig
    parent: int
    path: list[str]
    pulse: float  # seconds between two signs of life, 0 for none


class Ready(msgspec.Struct, tag=True):
    data: dict[str, Any]


class Failure(msgspec.Struct, tag=True):
    reason: str


class Progress(msgspec.Struct, tag=True):
    """How far a stage of start-up is; of `total` 0 nobody knows how much there is."""

    stage: str
    done: int
    total: int


class Alive(msgspec.Struct, tag=True):
    """The event loop has run."""


Report: TypeAlias = Ready | Failure | Progress | Alive


class ChildContext:
    """What a child's main is given: how to report and how to learn that it shall stop.

    An `async def` main waits for `stopping`. A plain one asks `stop_requested()`, waits with `wait_stop`, or polls
    `stop_fd`, which is readable from the request on.
    """

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.name = name
        self.stopping = asyncio.Event()
        self.failure: str | None = None
        self._channel = channel
        self._stop = False
        self._callbacks: list[Callable[[], None]] = []
        self._reported_ready = False
        # Not a threading.Event: `set` in a signal handler deadlocks when it interrupts `wait` at the wrong moment.
        self.stop_fd, self._stop_writer = os.pipe()

    def report_ready(self, data: Mapping[str, Any]) -> None:
        """Once: `data` (plain values) is what the parent's `ready` returns, such as addresses."""
        if self._reported_ready:
            raise RuntimeError(f"{self.name} has already reported ready")
        self._reported_ready = True
        self._report(Ready(dict(data)))

    def report_progress(self, stage: str, done: int, total: int) -> None:
        """For people who wait until this process is ready."""
        self._report(Progress(stage, done, total))

    def fail(self, reason: str) -> None:
        """Tell the parent why this process ends and ask it to stop; the main returns, the exit code will be 1.

        An exception that leaves the main is reported in the same way.
        """
        if self.failure is None:
            self.failure = reason
            self._report(Failure(reason))
        self.request_stop()

    def stop_requested(self) -> bool:
        return self._stop

    def wait_stop(self, timeout: float | None = None) -> bool:
        """Blocks until a stop is requested; False after `timeout` seconds. For threads, not for an event loop."""
        return bool(select.select([self.stop_fd], [], [], timeout)[0])

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when a stop is requested: on the event loop, or, in a plain main, between two bytecodes
        of the main thread, so it must not take locks. At once if it already was.
        """
        if self._stop:
            callback()
        else:
            self._callbacks.append(callback)

    def request_stop(self) -> None:
        """What SIGTERM does. Idempotent."""
        if self._stop:
            return
        self._stop = True
        os.write(self._stop_writer, b"x")
        self.stopping.set()
        for callback in self._callbacks:
            callback()

    async def pulse(self, interval: float) -> None:
        """Tell the parent for ever that this event loop runs. A parent that does not read is no reason to wait."""
        alive = pack_frame(msgspec.msgpack.encode(Alive()))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone, and so are we in a moment
            while True:
                with contextlib.suppress(BlockingIOError):
                    self._channel.send(alive, socket.MSG_DONTWAIT)
                await asyncio.sleep(interval)

    def _report(self, report: Report) -> None:
        self._channel.sendall(pack_frame(msgspec.msgpack.encode(report)))


def child_main(argv: list[str]) -> int:
    """`python -m pd.child NAME FD`: become the child that the boot frame on FD describes; returns its exit code."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    name, channel = argv[0], socket.socket(fileno=int(argv[1]))
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(f"pd-{name}".encode()[:15]))
    frame = _read_frame(channel)
    if frame is None:
        return 1
    boot = msgspec.msgpack.decode(frame, type=Boot)
    if os.getppid() != boot.parent:
        return 1  # it died before the kernel knew that we want to die with it
    threading.Thread(target=_die_at_end_of, args=(channel,), name="parent-watch", daemon=True).start()
    faulthandler.enable()
    sys.path[:] = boot.path
    context = ChildContext(name, channel)
    logs.configure(boot.name, boot.instance, boot.log)
    try:
        config = msgspec.msgpack.decode(boot.config, type=_resolve(boot.config_type))
        if is_dataclass(config):
            logs.configure(boot.name, boot.instance, boot.log, secrets=secret_values(config))
        result = _run(_resolve(boot.target), config, context, boot.pulse)
    except Exception as error:
        cause = _first_leaf(error)
        if not isinstance(cause, PdError):
            logs.get_logger().exception("process_crashed")
        context.fail(str(cause) if isinstance(cause, PdError) else f"{type(cause).__name__}: {cause}")
        return 2 if isinstance(cause, ConfigError) else 1
    return result or (1 if context.failure is not None else 0)


def _run(target: Callable[[Any, ChildContext], Any], config: Any, context: ChildContext, pulse: float) -> int | None:
    if not inspect.iscoroutinefunction(target):
        signal.signal(signal.SIGTERM, lambda *_: context.request_stop())
        return target(config, context)

    async def main() -> int | None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, context.request_stop)
        beating = loop.create_task(context.pulse(pulse)) if pulse else None
        try:
            return await target(config, context)
        finally:
            if beating is not None:
                beating.cancel()

    import uvloop  # not needed by plain mains

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def _resolve(dotted: str) -> Any:
    module, _, path = dotted.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _die_at_end_of(channel: socket.socket) -> None:
    """The parent never sends anything after the boot frame: the end of the stream means that it is gone."""
    try:
        channel.recv(1)
    except ConnectionError:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, value: Any) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def pack_frame(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload)) + payload


def take_frame(buffer: bytearray) -> bytes | None:
    """Remove and return the first whole frame's payload."""
    if len(buffer) < _FRAME.size:
        return None
    (length,) = _FRAME.unpack_from(buffer)
    if len(buffer) < _FRAME.size + length:
        return None
    payload = bytes(buffer[_FRAME.size : _FRAME.size + length])
    del buffer[: _FRAME.size + length]
    return payload


def _read_frame(channel: socket.socket) -> bytes | None:
    """One frame from a blocking socket, reading nothing beyond it; None at the end of the stream."""
    header = channel.recv(_FRAME.size, socket.MSG_WAITALL)
    if len(header) < _FRAME.size:
        return None
    (length,) = _FRAME.unpack(header)
    payload = channel.recv(length, socket.MSG_WAITALL)
    return payload if len(payload) == length else None


if __name__ == "__main__":
    # Not this module's own copy under the name __main__: targets import pd.child too and must see the same classes.
    sys.exit(importlib.import_module("pd.child").child_main(sys.argv[1:]))
