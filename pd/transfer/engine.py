"""The core around a transfer backend, inside the runner process: commands of the scheduler in, events out.

Threads: one talks to the scheduler and never does anything slow; workers own the push queues, which are sharded by peer
(several workers where the backend allows concurrent posts, one otherwise); one worker receives (grants, revokes,
fences), with a backend that is not concurrent the same one; a checker computes digests. No thread waits behind a step.

What was written once, here, so that a backend can be small: slicing, coalescing, chunking, queues, deadlines, digests,
staging through host memory, and the rule that failed or cancelled never means quiet.
"""

from __future__ import annotations

import collections
import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pd.abc import DeviceMemory, TransferBackend
from pd.errors import ChannelClosed, PdError, ProtocolError, TransferError
from pd.messages import (
    Push,
    TransferCancel,
    TransferCommand,
    TransferConnect,
    TransferConnected,
    TransferEvent,
    TransferExpel,
    TransferExpelled,
    TransferGrant,
    TransferPeerLost,
    TransferPush,
    TransferReset,
    TransferResetPeer,
    TransferRevoke,
    TransferRevoked,
    TransferVerified,
    TransferVerify,
)
from pd.transfer.cadence import Cadence
from pd.transfer.landing import Receiving
from pd.transfer.port import CommandPort
from pd.transfer.queues import PushQueue
from pd.transfer.spans import Pool
from pd.transfer.staging import Staging
from pd.transfer.workers import Task, Worker

CHECKSUM = 8

#: Longest wait for the threads when the engine closes.
CLOSE_TIMEOUT = 5.0


@dataclass(frozen=True)
class EngineConfig:
    """`threads` and `queues` are the settings transfer_threads and transfer_queues; `timeout` is transfer_timeout."""

    threads: int = 4
    queues: int = 4
    timeout: float = 30.0
    rank: int = 0


def seal(descriptor: bytes) -> bytes:
    """A backend's descriptor with a checksum before it: a truncated one can confuse a vendor's library for good."""
    return hashlib.blake2b(descriptor, digest_size=CHECKSUM).digest() + descriptor


def unseal(sealed: bytes) -> bytes:
    """Raises TransferError for a damaged descriptor."""
    checksum, descriptor = sealed[:CHECKSUM], sealed[CHECKSUM:]
    if hashlib.blake2b(descriptor, digest_size=CHECKSUM).digest() != checksum:
        raise TransferError("the descriptor is damaged")
    return descriptor


def _nothing() -> None:
    pass


class TransferEngine:
    """Owns a backend from `register` on.

        backend.open(identity); pools from backend.allocate(…) or elsewhere
        engine = TransferEngine(backend, pools, memory, config, failed)
        engine.register(); engine.descriptor(); engine.start(port); …; engine.close()

    `pools[g]` is KV group g and becomes region g. `failed` is called once, from any thread, with an exception that
    nobody expected; the engine has then stopped and the process should end.
    """

    def __init__(
        self,
        backend: TransferBackend,
        pools: Sequence[Pool],
        memory: DeviceMemory,
        config: EngineConfig,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._backend, self._config, self._failed = backend, config, failed
        self._pools = list(pools)
        self._staging = Staging(backend, self._pools, memory)
        self._receiving = Receiving(backend, self._pools, self._staging, memory, config.rank)
        self._events: collections.deque[TransferEvent] = collections.deque()
        self._port: CommandPort | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._failure: BaseException | None = None
        self._queues = [self._queue() for _ in range(max(1, config.queues))]
        self._senders, self._receiver = self._make_workers(memory.enter)
        self._checker = Worker("check", self._fail, begin=memory.enter)
        self._thread = threading.Thread(target=self._run, name="pd-transfer", daemon=True)

    def _queue(self) -> PushQueue:
        config = self._config
        return PushQueue(self._backend, self._pools, self._staging, self._emit, config.timeout, config.rank)

    def _make_workers(self, begin: Callable[[], None]) -> tuple[list[Worker], Worker]:
        capabilities, queues = self._backend.capabilities, self._queues
        cadence = Cadence(self._backend.progress, self._active) if capabilities.needs_progress else None
        if not capabilities.concurrent_posts:
            only = Worker("all", self._fail, queues, cadence, begin)
            return [only], only
        count = max(1, min(self._config.threads, len(queues)))
        senders = [Worker(f"send-{i}", self._fail, queues[i::count], begin=begin) for i in range(count)]
        return senders, Worker("receive", self._fail, (), cadence, begin)

    def _active(self) -> bool:
        """Whether a hand-off may be written here, or a push is under way or waits."""
        return self._receiving.busy or any(queue.busy for queue in self._queues)

    # --- life ---------------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Hand the pools, or their host mirrors, to the backend."""
        self._backend.register(self._staging.regions())

    def descriptor(self) -> bytes:
        """What peers connect with, checksum included."""
        return seal(self._backend.descriptor())

    def start(self, port: CommandPort) -> None:
        """Serve `port`, which belongs to the engine from now on."""
        self._port = port
        for worker in {*self._senders, self._receiver, self._checker}:
            worker.start()
        self._thread.start()

    def close(self) -> None:
        """Stop the threads, then the backend. Pushes under way are abandoned; their memory is not read afterwards."""
        self._stop()
        for worker in {*self._senders, self._receiver, self._checker}:
            worker.join(CLOSE_TIMEOUT)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT)
        self._backend.close()
        with self._lock:
            port, self._port = self._port, None
        if port is not None:
            port.close()

    def _stop(self) -> None:
        self._stopping = True
        for worker in {*self._senders, self._receiver, self._checker}:
            worker.stop()
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            if self._port is not None:
                self._port.wake()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            first, self._failure = self._failure is None, self._failure or error
        self._stop()
        if first:
            self._failed(error)

    # --- in and out ---------------------------------------------------------------------------------------------

    def push(self, push: Push) -> None:
        """From any thread: start this push now."""
        queue, worker = self._shard(push.peer)

        def add() -> None:
            queue.add(push, time.monotonic())
            if worker is not self._receiver and self._backend.capabilities.needs_progress:
                self._receiver.submit(_nothing)  # it drives the backend, often from now on

        worker.submit(add)

    def _emit(self, event: TransferEvent) -> None:
        """From any thread."""
        self._events.append(event)
        self._wake()

    def _run(self) -> None:
        port = self._port
        assert port is not None
        try:
            while not self._stopping:
                self._flush(port)
                command = port.recv()
                if command is not None:
                    self._dispatch(command)
                elif not self._events:
                    port.wait(None)
            self._flush(port)
        except ChannelClosed as error:
            if not self._stopping:
                self._fail(error)
        except BaseException as error:
            self._fail(error)

    def _flush(self, port: CommandPort) -> None:
        while self._events:
            port.send(self._events.popleft())

    def _shard(self, peer: str) -> tuple[PushQueue, Worker]:
        index = zlib.crc32(peer.encode()) % len(self._queues)
        return self._queues[index], self._senders[index % len(self._senders)]

    def _dispatch(self, command: TransferCommand) -> None:
        """Give a command to the thread that owns what it is about."""
        match command:
            case TransferPush():
                self.push(command.push)
            case TransferConnect() | TransferCancel() | TransferResetPeer():
                queue, worker = self._shard(command.peer)
                worker.submit(self._sender_task(queue, command))
            case TransferGrant() | TransferRevoke() | TransferExpel() | TransferVerify():
                self._receiver.submit(self._receiver_task(command))
            case _:
                raise ProtocolError("command", type(command).__name__)

    def _sender_task(self, queue: PushQueue, command: TransferConnect | TransferCancel | TransferResetPeer) -> Task:
        def connect(command: TransferConnect) -> None:
            try:
                queue.connect(command.peer, unseal(command.descriptor), command.kv_heads)
            except TransferError as error:
                self._emit(TransferPeerLost(command.peer, error.reason, self._config.rank))
            else:
                self._emit(TransferConnected(command.peer, self._config.rank))

        def run() -> None:
            match command:
                case TransferConnect():
                    connect(command)
                case TransferCancel():
                    queue.cancel(command.peer, command.tag)
                case TransferResetPeer():
                    queue.reset(command.peer)
                    self._emit(TransferReset(command.peer, self._config.rank))

        return run

    def _receiver_task(self, command: TransferGrant | TransferRevoke | TransferExpel | TransferVerify) -> Task:
        receiving, rank = self._receiving, self._config.rank

        def run() -> None:
            match command:
                case TransferGrant():
                    receiving.grant(command)
                case TransferRevoke():
                    try:
                        self._emit(receiving.revoke(command))
                    except TransferError:
                        self._emit(TransferRevoked(command.tag, False, command.sender, rank))
                case TransferExpel():
                    try:
                        self._emit(receiving.expel(command))
                    except TransferError:
                        self._emit(TransferExpelled(command.sender, False, rank))
                case TransferVerify():
                    self._verify(command)

        return run

    def _verify(self, command: TransferVerify) -> None:
        try:
            answer = self._receiving.begin_verify(command)
        except PdError as error:
            self._emit(self._receiving.failed(command, str(error)))
            return
        if isinstance(answer, TransferVerified):
            self._emit(answer)
            return
        check = answer

        def run() -> None:
            try:
                self._emit(self._receiving.check(check))
            except PdError as error:
                self._emit(self._receiving.failed(command, str(error)))

        self._checker.submit(run)
