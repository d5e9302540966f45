"""One end of a transfer for the conformance suite: here in this process (`Side`), or in one of its own (`RemoteSide`).

Run as `python -m pd.testing.transfer_peer`, it answers one JSON line per JSON line and drives its backend in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psutil

from pd.abc import BackendContext, DeviceMemory, Peer, Region, TransferBackend, host_region
from pd.errors import PeerLost, TransferError
from pd.transfer.cadence import Cadence

CALL_TIMEOUT = 30.0

#: [local region, local offset, remote region, remote offset, length]
Rows = Sequence[Sequence[int]]


class HostMemory:
    """`DeviceMemory` for backends that are tested on host memory."""

    device = "cpu"

    def digest(self, regions: Any, spans: Any, keys: Any) -> Any:
        raise TransferError("a backend needs no digests of host memory")

    def copy(self, region: Region, offset: int, buffer: memoryview, *, to_device: bool) -> None:
        raise TransferError("a backend needs no staging of host memory")

    def enter(self) -> None:
        """Nothing to do."""

    def fence(self) -> None:
        """Nothing to do."""


def make_backend(
    factory: str, host: str, secret: bytes | None, options: Mapping[str, str], memory: DeviceMemory
) -> TransferBackend:
    """A backend from the dotted name "module:function" of its factory."""
    module, _, name = factory.partition(":")
    make = getattr(importlib.import_module(module), name)
    backend = make(BackendContext(host=host, device=memory.device, memory=memory, secret=secret, options=options))
    assert isinstance(backend, TransferBackend)
    return backend


class Side:
    """A backend with regions of host memory. Methods take and return what JSON can carry.

    The memory is there as long as the side, also after `close`. A subclass for device memory overrides `device_memory`,
    `allocate`, `contents` and `write`.

    It drives a backend that needs it as the core does: often while a hand-off is granted here or a post is under way.
    """

    def __init__(self, factory: str, host: str, secret: str, options: Mapping[str, str]) -> None:
        self.device = self.device_memory()
        self.backend = make_backend(factory, host, secret.encode() if secret else None, options, self.device)
        self.capabilities = self.backend.capabilities
        self._peers: dict[str, Peer] = {}
        self._tickets: list[Any] = []
        self._granted: set[tuple[int, str]] = set()
        self._posted: dict[int, str] = {}  # posts that are not over, and their peers
        self._cadence = Cadence(self.backend.progress, self._active) if self.capabilities.needs_progress else None
        self.regions: list[Region] = []
        self._views: list[np.ndarray] = []

    def device_memory(self) -> DeviceMemory:
        return HostMemory()

    def allocate(self, nbytes: int) -> Region:
        """Zeroed memory that the backend does not supply."""
        return host_region(np.zeros(nbytes, dtype=np.uint8).data)

    def open(self, identity: str, nbytes: int, block_bytes: int = 0, regions: int = 1) -> None:
        """Register so many regions of `nbytes`. Of all but the first only `contents`, `checksum` and `write` know."""
        self.backend.open(identity)
        made = [self.backend.allocate(nbytes, self.device.device) or self.allocate(nbytes) for _ in range(regions)]
        self.regions = [replace(region, index=i, block_bytes=block_bytes) for i, region in enumerate(made)]
        self._views = [np.frombuffer(one.buffer, dtype=np.uint8) for one in made if one.buffer is not None]
        self.backend.register(self.regions)

    @property
    def region(self) -> Region:
        """The first one."""
        return self.regions[0]

    @property
    def memory(self) -> np.ndarray:
        """What `contents` says of the first region."""
        return self.contents(0)

    def contents(self, region: int) -> np.ndarray:
        """A region as uint8[nbytes], or a copy of it: it is changed by `write`."""
        return self._views[region]

    def descriptor(self) -> str:
        return self.backend.descriptor().hex()

    def _active(self) -> bool:
        return bool(self._granted or self._posted)

    def drive(self) -> float | None:
        """Call the backend's `progress` if it is due. Seconds until it will be; None if it never will."""
        return None if self._cadence is None else self._cadence.turn(time.monotonic())

    def progress(self) -> None:
        """Call it, due or not."""
        if self.capabilities.needs_progress:
            self.backend.progress()

    # --- memory ---

    def write(self, offset: int, data: np.ndarray, region: int = 0) -> None:
        self.contents(region)[offset : offset + data.size] = data

    def fill(self, value: int, offset: int = 0, length: int | None = None) -> None:
        count = self.region.nbytes - offset if length is None else length
        self.write(offset, np.full(count, value, dtype=np.uint8))

    def pattern(self, seed: int) -> None:
        """Random bytes all over, the same for the same seed and size."""
        self.write(0, pattern(seed, self.region.nbytes))

    def checksum(self, region: int = 0) -> str:
        return checksum(self.contents(region))

    def checksums(self, spans: Sequence[Sequence[int]]) -> list[str]:
        """Of [offset, length] each."""
        memory = self.memory
        return [checksum(memory[offset : offset + length]) for offset, length in spans]

    def count(self, value: int) -> int:
        """How many bytes have this value."""
        return int(np.count_nonzero(self.memory == value))

    # --- sender ---

    def connect(self, descriptor: str) -> str:
        peer = self.backend.connect(bytes.fromhex(descriptor))
        self._peers[peer.identity] = peer
        return peer.identity

    def post(self, peer: str, rows: Rows, tag: int) -> int:
        """The number of a ticket."""
        spans = np.array(rows, dtype=np.uint64).reshape(-1, 5)
        self._tickets.append(self.backend.post(self._peers[peer], spans, tag))
        ticket = len(self._tickets) - 1
        self._posted[ticket] = peer
        return ticket

    def poll(self, ticket: int) -> bool:
        self.drive()
        try:
            done = self.backend.poll(self._tickets[ticket])
        except TransferError:
            self._posted.pop(ticket, None)
            raise
        if done:
            self._posted.pop(ticket, None)
        return done

    def reset_peer(self, peer: str) -> None:
        self.backend.reset_peer(self._peers.pop(peer))
        self._posted = {ticket: other for ticket, other in self._posted.items() if other != peer}

    # --- receiver ---

    def grant(self, tag: int, ranges: Sequence[Sequence[int]], sender: str, region: int = 0) -> None:
        """`ranges` [offset, length]; a backend that does not revoke single hand-offs is not told."""
        self._granted.add((tag, sender))
        if self.capabilities.revocable:
            spans = np.full((len(ranges), 5), region, dtype=np.uint64)
            spans[:, 1] = spans[:, 3] = [offset for offset, _ in ranges]
            spans[:, 4] = [length for _, length in ranges]
            self.backend.grant(tag, spans, sender)

    def revoke(self, tag: int, sender: str) -> bool:
        quiet = self.backend.revoke(tag, sender)
        if quiet:
            self._granted.discard((tag, sender))
        return quiet

    def expel(self, sender: str) -> bool:
        quiet = self.backend.expel(sender)
        if quiet:
            self._granted = {one for one in self._granted if one[1] != sender}
        return quiet

    def over(self, sender: str) -> None:
        """Every hand-off that was granted to this sender has landed, or the sender says that it is over."""
        for tag, _ in [one for one in self._granted if one[1] == sender]:
            if self.capabilities.revocable:
                assert self.backend.revoke(tag, sender)
            self._granted.discard((tag, sender))

    def fence(self, sender: str) -> None:
        self.backend.fence(sender)

    def take_digests(self, tag: int, sender: str) -> list[list[int]]:
        """[region, offset, length, digest], sorted."""
        return sorted(self.backend.take_digests(tag, sender).tolist())

    # --- the process ---

    def cpu_seconds(self) -> float:
        return time.process_time()

    def listeners(self) -> list[str]:
        """Addresses on which this process listens for TCP."""
        connections = psutil.Process().net_connections(kind="tcp")
        return sorted({one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN})

    def close(self) -> None:
        self.backend.close()


def pattern(seed: int, nbytes: int) -> np.ndarray:
    """Random uint8[nbytes] without the values 0 and 255, which tests use as marks."""
    return np.random.default_rng(seed).integers(1, 255, nbytes, dtype=np.uint8)


def checksum(data: np.ndarray) -> str:
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()


class RemoteSide:
    """A `Side` in a process of its own: `call` a method of it by name."""

    def __init__(
        self,
        factory: str,
        host: str,
        secret: str,
        options: Mapping[str, str],
        prefix: Sequence[str] = (),
        module: str = "pd.testing.transfer_peer",
    ) -> None:
        """`prefix` goes before the command line (`ip netns exec …`); `module` calls `main` with its own `Side`."""
        self.identity = ""
        setup = json.dumps([factory, host, secret, dict(options)])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._buffer = b""

    def call(
        self, method: str, *args: Any, timeout: float = CALL_TIMEOUT, meanwhile: Callable[[], None] | None = None
    ) -> Any:
        """Raises what the method raised: PeerLost, TransferError; RuntimeError for anything else, or no answer.

        `meanwhile` is called every millisecond until the answer comes.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, args]).encode() + b"\n")
        self.process.stdin.flush()
        kind, value = json.loads(self._line(time.monotonic() + timeout, meanwhile))
        if kind == "ok":
            return value
        if kind == "PeerLost":
            raise PeerLost(*value)
        if kind == "TransferError":
            raise TransferError(*value)
        raise RuntimeError(f"{method} in the peer process: {kind}: {value}")

    def _line(self, deadline: float, meanwhile: Callable[[], None] | None) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([stdout], [], [], left if meanwhile is None else min(left, 0.001))
            if not ready and left and meanwhile is not None:
                meanwhile()
                continue
            data = os.read(stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                raise RuntimeError("the peer process died" if ready else "the peer process does not answer")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + CALL_TIMEOUT
        while psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED:
            if time.monotonic() > deadline:
                raise RuntimeError("the peer process does not stop")
            time.sleep(0.001)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(CALL_TIMEOUT)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def serve(side: Side) -> None:
    """Answer calls until stdin ends."""
    pending = b""
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], side.drive())
        if not ready:
            continue
        data = os.read(sys.stdin.fileno(), 1 << 20)
        if not data:
            return
        pending += data
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            method, args = json.loads(line)
            try:
                answer = ["ok", getattr(side, method)(*args)]
            except PeerLost as error:
                answer = ["PeerLost", [error.identity, error.reason]]
            except TransferError as error:
                answer = ["TransferError", [error.reason]]
            except Exception as error:  # reported to the caller, which raises it
                answer = [type(error).__name__, [str(error)]]
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


def main(kind: type[Side] = Side) -> None:
    factory, host, secret, options = json.loads(sys.argv[1])
    side = kind(factory, host, secret, options)
    serve(side)
    side.close()


if __name__ == "__main__":
    main()
