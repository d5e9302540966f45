"""Channels over real sockets: order, bounds, cancellation, and the edge-signalled descriptor."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import zmq

from pd.errors import ChannelClosed, ChannelFull, ProtocolError
from pd.ipc.channel import Channel, Router, SyncChannel
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkEventKind, LinkOptions, Sockets
from pd.messages import Abort, Answer, Ask, Drain

pytestmark = pytest.mark.process

Message: TypeAlias = Ask | Abort | Answer | Drain
CODEC: Codec[Message] = Codec(Message)
Run = Callable[..., Any]


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


def block_the_loop(seconds: float) -> None:
    time.sleep(seconds)


def pair(sockets: Sockets, options: LinkOptions | None = None) -> tuple[Channel[Any, Any], Channel[Any, Any]]:
    left = sockets.listen(zmq.PAIR, "ipc://*", options)
    right = sockets.dial(zmq.PAIR, left.endpoint, options)
    return Channel(left, CODEC, CODEC, "left"), Channel(right, CODEC, CODEC, "right")


def test_messages_arrive_in_order_both_ways(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        for i in range(1000):
            right.send_nowait(Ask(i, "info"))
        assert [(await left.recv()).token for _ in range(1000)] == list(range(1000))
        for i in range(1000):
            left.send_nowait(Abort(i))
        assert [(await right.recv()).key for _ in range(1000)] == list(range(1000))
        left.close()
        right.close()

    run_async(main())


def test_a_send_that_consumes_the_descriptors_signal_wakes_the_waiting_receiver(
    sockets: Sockets, run_async: Run
) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        right.send_nowait(Ask(-1, "info"))
        await left.recv()  # from here on the listening side has a peer
        for i in range(20):
            waiting = asyncio.create_task(left.recv())
            await asyncio.sleep(0)
            right.send_nowait(Ask(i, "info"))
            block_the_loop(0.005)  # the message arrives and signals; the loop has not looked yet
            left.send_nowait(Ask(i, "info"))
            assert (await asyncio.wait_for(waiting, 2)).token == i
        left.close()
        right.close()

    run_async(main())


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_sending_and_receiving_at_once_never_hangs(sockets: Sockets, run_async: Run, loop: str) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        right.send_nowait(Ask(-1, "info"))
        await left.recv()

        async def echo() -> None:
            while True:
                right.send_nowait(await right.recv())

        async def receive() -> list[int]:
            return [(await left.recv()).token for _ in range(3000)]

        async with asyncio.TaskGroup() as group:
            echoing = group.create_task(echo())
            received = group.create_task(receive())
            for i in range(3000):
                left.send_nowait(Ask(i, "info"))
                if i % 7 == 0:
                    await asyncio.sleep(0)
            assert await received == list(range(3000))
            echoing.cancel()
        left.close()
        right.close()

    if loop == "uvloop":
        run_async(main())
    else:
        asyncio.run(asyncio.wait_for(main(), 20))


def test_cancelling_a_receive_at_any_moment_loses_no_message(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        received: list[int] = []
        sent = 0
        while sent < 500:
            task = asyncio.create_task(left.recv())
            for _ in range(sent % 4):
                await asyncio.sleep(0)
            right.send_nowait(Ask(sent, "info"))
            sent += 1
            if sent % 3 == 0:
                await asyncio.sleep(0.0005)
            task.cancel()
            try:
                received.append((await task).token)
            except asyncio.CancelledError:
                pass
        while len(received) < sent:
            received.append((await left.recv()).token)
        assert received == list(range(500))
        left.close()
        right.close()

    run_async(main())


def test_a_full_pipe_raises_and_what_was_accepted_still_arrives(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        left, right = pair(sockets, LinkOptions(high_water=10))
        accepted = 0
        with pytest.raises(ChannelFull, match="right"):
            for i in range(100_000):
                right.send_nowait(Answer(i, {"pad": "x" * 10_000}))
                accepted += 1
        assert 10 <= accepted < 100_000
        assert [(await left.recv()).token for _ in range(accepted)] == list(range(accepted))
        while True:  # the news that there is room again travels too
            try:
                right.send_nowait(Ask(0, "info"))
                break
            except ChannelFull:
                await asyncio.sleep(0.001)
        assert await left.recv() == Ask(0, "info")
        left.close()
        right.close()

    run_async(main())


def test_a_listening_channel_without_a_peer_is_full_not_silent(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        channel: Channel[Any, Any] = Channel(sockets.listen(zmq.PAIR, "ipc://*"), CODEC, CODEC)
        with pytest.raises(ChannelFull):
            channel.send_nowait(Ask(0, "info"))
        channel.close()

    run_async(main())


def test_closing_ends_a_pending_receive_and_every_later_call(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        waiting = asyncio.create_task(left.recv())
        await asyncio.sleep(0.01)
        left.close()
        left.close()
        with pytest.raises(ChannelClosed):
            await waiting
        with pytest.raises(ChannelClosed):
            await left.recv()
        with pytest.raises(ChannelClosed):
            left.send_nowait(Ask(0, "info"))
        right.close()

    run_async(main())


def test_garbage_is_reported_once_and_the_channel_goes_on(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        right.link.socket.send(b"\xc1garbage")
        right.link.socket.send_multipart([b"two", b"frames"])
        right.send_nowait(Ask(7, "info"))
        with pytest.raises(ProtocolError):
            await left.recv()
        with pytest.raises(ProtocolError, match="2 on left"):
            await left.recv()
        assert await left.recv() == Ask(7, "info")
        left.close()
        right.close()

    run_async(main())


def test_a_fast_sender_does_not_starve_the_event_loop(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        for i in range(4000):
            right.send_nowait(Ask(i, "info"))
        await asyncio.sleep(0.1)
        turns = 0

        async def other_work() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other_work())
        for _ in range(4000):
            await left.recv()
        task.cancel()
        assert turns >= 30
        left.close()
        right.close()

    run_async(main())


def test_a_second_receiver_is_a_mistake_that_is_named(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        left, right = pair(sockets)
        first = asyncio.create_task(left.recv())
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="already being received"):
            await left.recv()
        right.send_nowait(Ask(1, "info"))
        assert await first == Ask(1, "info")
        left.close()
        right.close()

    run_async(main())


def test_a_router_knows_its_peers_by_identity(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        router: Router[Any, Any] = Router(sockets.listen(zmq.ROUTER, "ipc://*"), CODEC, CODEC, "scheduler")
        workers: list[Channel[Any, Any]] = []
        for name in (b"api-0", b"api-1"):
            link = sockets.dial(zmq.DEALER, router.link.endpoint, LinkOptions(identity=name))
            workers.append(Channel(link, CODEC, CODEC))
        for i, worker in enumerate(workers):
            worker.send_nowait(Ask(i, "info"))
        seen = dict([await router.recv(), await router.recv()])
        assert seen == {b"api-0": Ask(0, "info"), b"api-1": Ask(1, "info")}
        router.send_nowait(b"api-1", Answer(1, {}))
        assert await workers[1].recv() == Answer(1, {})
        assert workers[0].recv_nowait() is None
        with pytest.raises(ChannelClosed, match=b"nobody".hex()):
            router.send_nowait(b"nobody", Answer(1, {}))
        workers[0].link.socket.send(b"\xc1")
        with pytest.raises(ProtocolError, match=b"api-0".hex()):
            await router.recv()
        for worker in workers:
            worker.close()
        router.close()

    run_async(main())


def test_a_full_peer_of_a_router_does_not_stop_the_others(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        options = LinkOptions(high_water=5)
        router: Router[Any, Any] = Router(sockets.listen(zmq.ROUTER, "ipc://*", options), CODEC, CODEC)
        slow = Channel(
            sockets.dial(zmq.DEALER, router.link.endpoint, LinkOptions(high_water=5, identity=b"slow")), CODEC, CODEC
        )
        quick = Channel(
            sockets.dial(zmq.DEALER, router.link.endpoint, LinkOptions(high_water=5, identity=b"quick")), CODEC, CODEC
        )
        for channel in (slow, quick):
            channel.send_nowait(Ask(0, "info"))
            await router.recv()
        with pytest.raises(ChannelFull):
            for _ in range(100_000):
                router.send_nowait(b"slow", Answer(0, {"pad": "x" * 10_000}))
        router.send_nowait(b"quick", Answer(1, {}))
        assert await quick.recv() == Answer(1, {})
        for closing in (slow, quick, router):
            closing.close()

    run_async(main())


def test_a_thread_and_an_event_loop_talk(sockets: Sockets, run_async: Run) -> None:
    async def main() -> None:
        link = sockets.listen(zmq.PAIR, "ipc://*")
        channel: Channel[Any, Any] = Channel(link, CODEC, CODEC)

        def thread() -> None:
            peer: SyncChannel[Any, Any] = SyncChannel(sockets.dial(zmq.PAIR, link.endpoint), CODEC, CODEC)
            assert peer.recv(0) is None
            assert peer.recv(0.01) is None
            peer.send(Ask(-1, "info"))
            while True:
                message = peer.recv(10)
                assert message is not None
                peer.send(message)
                if isinstance(message, Drain):
                    break
            peer.link.socket.linger = 1000
            peer.close()
            with pytest.raises(ChannelClosed):
                peer.recv(0.1)

        worker = threading.Thread(target=thread)
        worker.start()
        assert await channel.recv() == Ask(-1, "info")
        for i in range(200):
            channel.send_nowait(Ask(i, "info"))
            assert await channel.recv() == Ask(i, "info")
        channel.send_nowait(Drain(1))
        assert await channel.recv() == Drain(1)
        await asyncio.to_thread(worker.join, 5)
        assert not worker.is_alive()
        channel.close()

    run_async(main())


def test_a_blocking_send_waits_for_room_only_as_long_as_it_was_told(sockets: Sockets) -> None:
    options = LinkOptions(high_water=2)
    left = sockets.listen(zmq.PAIR, "ipc://*", options)
    sender: SyncChannel[Any, Any] = SyncChannel(sockets.dial(zmq.PAIR, left.endpoint, options), CODEC, CODEC)
    receiver: SyncChannel[Any, Any] = SyncChannel(left, CODEC, CODEC)
    with pytest.raises(ChannelFull):
        for _ in range(10_000):
            sender.send(Answer(0, {"pad": "x" * 10_000}), timeout=0.02)
    consumer = threading.Timer(0.05, lambda: [None for _ in iter(lambda: receiver.recv(0.2), None)])
    consumer.start()
    sender.send(Answer(1, {}), timeout=5)
    consumer.join(10)
    sender.close()
    receiver.close()


_DOOMED = """
import sys, zmq
from pd.ipc.channel import SyncChannel
from pd.ipc.codec import Codec
from pd.ipc.zmq import Sockets, LinkOptions
from pd.messages import Ask
sockets = Sockets()
channel = SyncChannel(sockets.dial(zmq.PAIR, sys.argv[1], LinkOptions(heartbeat=0.05)), Codec(Ask), Codec(Ask))
channel.send(Ask(1, "info"))
channel.recv(60)
"""


def start_doomed(endpoint: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen([sys.executable, "-c", _DOOMED, endpoint], env={"PYTHONPATH": root})


@pytest.mark.parametrize("end", ["killed", "frozen"])
def test_the_monitor_reports_a_peer_that_is_killed_or_frozen(sockets: Sockets, run_async: Run, end: str) -> None:
    async def main() -> None:
        link = sockets.listen(zmq.PAIR, "ipc://*", LinkOptions(heartbeat=0.1), monitored=True)
        assert link.monitor is not None
        channel: Channel[Any, Any] = Channel(link, CODEC, CODEC)
        child = start_doomed(link.endpoint)
        try:
            assert (await link.monitor.next()).kind is LinkEventKind.CONNECTED
            assert await channel.recv() == Ask(1, "info")
            child.send_signal(9 if end == "killed" else 19)
            started = asyncio.get_running_loop().time()
            assert (await link.monitor.next()).kind is LinkEventKind.DISCONNECTED
            assert asyncio.get_running_loop().time() - started < 5
        finally:
            child.kill()
            child.wait()
        channel.close()

    run_async(main())
