"""With a cluster secret only those who know it get in; links end and events say so."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from pd.errors import ChannelClosed
from pd.ipc.channel import Channel, Router
from pd.ipc.codec import Codec
from pd.ipc.keys import derive_keys
from pd.ipc.zmq import Link, LinkEventKind, LinkOptions, Sockets
from pd.messages import Answer, Ask

pytestmark = pytest.mark.process

CODEC: Codec[Any] = Codec(Ask | Answer)
Run = Callable[..., Any]
SECRET = "correct horse battery staple"


async def first_event(link: Link) -> LinkEventKind:
    assert link.monitor is not None
    return (await link.monitor.next()).kind


def test_keys_depend_on_the_secret_and_on_their_purpose_only() -> None:
    keys, again, other = derive_keys(SECRET), derive_keys(SECRET), derive_keys(SECRET + "!")
    assert keys == again
    distinct = {k.public for pairs in (keys, other) for k in (pairs.server, pairs.client)}
    assert len(distinct) == 4
    assert len(keys.data) == 32 and keys.data != other.data
    for pair in (keys.server, keys.client):
        assert zmq.curve_public(pair.secret) == pair.public
    assert keys.server.secret.decode() not in repr(keys) and repr(keys.data) not in repr(keys)


def test_two_processes_with_the_secret_talk(run_async: Run) -> None:
    async def main() -> None:
        ours, theirs = Sockets(SECRET), Sockets(SECRET)
        router: Router[Any, Any] = Router(ours.listen(zmq.ROUTER, "tcp://127.0.0.1:0"), CODEC, CODEC)
        link = theirs.dial(zmq.DEALER, router.link.endpoint, monitored=True)
        channel: Channel[Any, Any] = Channel(link, CODEC, CODEC)
        assert await first_event(link) is LinkEventKind.CONNECTED
        channel.send_nowait(Ask(1, "info"))
        identity, message = await router.recv()
        assert message == Ask(1, "info")
        router.send_nowait(identity, Answer(1, {}))
        assert await channel.recv() == Answer(1, {})
        channel.close()
        router.close()
        theirs.close()
        ours.close()

    run_async(main())


def _with_another_secret(context: Sockets, endpoint: str) -> Link:
    return Sockets("another secret").dial(zmq.DEALER, endpoint, monitored=True)


def _without_a_secret(context: Sockets, endpoint: str) -> Link:
    return Sockets().dial(zmq.DEALER, endpoint, monitored=True)


def _with_the_public_server_key_alone(context: Sockets, endpoint: str) -> Link:
    """What CURVE without an authenticator admits: a stranger who has learnt the server's public key."""
    assert context.keys is not None
    stranger = Sockets()
    public, secret = zmq.curve_keypair()
    keys = derive_keys("stranger")
    stranger.keys = type(keys)(
        server=context.keys.server, client=type(keys.client)(public=public, secret=secret), data=b""
    )
    return stranger.dial(zmq.DEALER, endpoint, monitored=True)


@pytest.mark.parametrize(
    "dial", [_with_another_secret, _without_a_secret, _with_the_public_server_key_alone], ids=lambda f: f.__name__
)
def test_a_stranger_is_kept_out_and_nothing_of_his_is_heard(
    run_async: Run, dial: Callable[[Sockets, str], Link]
) -> None:
    async def main() -> None:
        sockets = Sockets(SECRET)
        listening = sockets.listen(zmq.ROUTER, "tcp://127.0.0.1:0", monitored=True)
        router: Router[Any, Any] = Router(listening, CODEC, CODEC)
        link = dial(sockets, listening.endpoint)
        channel: Channel[Any, Any] = Channel(link, CODEC, CODEC)
        channel.send_nowait(Ask(666, "info"))
        assert await first_event(listening) in (LinkEventKind.HANDSHAKE_FAILED, LinkEventKind.DISCONNECTED)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(router.recv(), 0.3)
        context = link.socket.context
        channel.close()
        context.destroy(linger=0)
        # The door is still open for a member.
        member = Channel(sockets.dial(zmq.DEALER, listening.endpoint), CODEC, CODEC)
        member.send_nowait(Ask(1, "info"))
        assert (await router.recv())[1] == Ask(1, "info")
        member.close()
        router.close()
        sockets.close()

    run_async(main())


def test_a_member_does_not_talk_to_a_listener_that_lacks_the_secret(run_async: Run) -> None:
    async def main() -> None:
        impostor, member = Sockets(), Sockets(SECRET)
        router: Router[Any, Any] = Router(impostor.listen(zmq.ROUTER, "tcp://127.0.0.1:0"), CODEC, CODEC)
        link = member.dial(zmq.DEALER, router.link.endpoint, LinkOptions(reconnect=False), monitored=True)
        channel: Channel[Any, Any] = Channel(link, CODEC, CODEC)
        channel.send_nowait(Ask(1, "info"))
        assert await first_event(link) in (LinkEventKind.HANDSHAKE_FAILED, LinkEventKind.DISCONNECTED)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(router.recv(), 0.2)
        channel.close()
        router.close()
        member.close()
        impostor.close()

    run_async(main())


def test_the_secret_and_messages_do_not_appear_on_the_wire(run_async: Run) -> None:
    async def main() -> None:
        sockets = Sockets(SECRET)
        router: Router[Any, Any] = Router(sockets.listen(zmq.ROUTER, "tcp://127.0.0.1:0"), CODEC, CODEC)
        port = int(router.link.endpoint.rsplit(":", 1)[1])
        seen = bytearray()

        async def tap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    seen.extend(data)
                    sink.write(data)
                sink.close()

            await asyncio.gather(pump(reader, upstream_writer), pump(upstream_reader, writer))

        server = await asyncio.start_server(tap, "127.0.0.1", 0)
        tapped = server.sockets[0].getsockname()[1]
        channel: Channel[Any, Any] = Channel(sockets.dial(zmq.DEALER, f"tcp://127.0.0.1:{tapped}"), CODEC, CODEC)
        channel.send_nowait(Ask(1, "plain text that must not be seen"))
        assert (await router.recv())[1] == Ask(1, "plain text that must not be seen")
        assert b"CURVE" in seen
        assert b"plain text" not in seen and SECRET.encode() not in seen
        channel.close()
        router.close()
        server.close()
        await asyncio.sleep(0.05)
        sockets.close()

    run_async(main())


def test_a_refused_connection_is_an_event_and_a_dialler_that_may_reconnects(run_async: Run) -> None:
    async def main() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        sockets = Sockets()
        link = sockets.dial(zmq.DEALER, endpoint, monitored=True)
        assert await first_event(link) is LinkEventKind.UNREACHABLE
        listening = sockets.listen(zmq.ROUTER, endpoint)
        while await first_event(link) is not LinkEventKind.CONNECTED:
            pass
        link.close()
        listening.close()
        sockets.close()

    run_async(main())


def test_a_link_without_reconnect_stays_ended(run_async: Run) -> None:
    async def main() -> None:
        sockets = Sockets()
        listening = sockets.listen(zmq.PAIR, "tcp://127.0.0.1:0")
        link = sockets.dial(zmq.PAIR, listening.endpoint, LinkOptions(reconnect=False), monitored=True)
        assert await first_event(link) is LinkEventKind.CONNECTED
        endpoint = listening.endpoint
        listening.close()
        assert await first_event(link) is LinkEventKind.DISCONNECTED
        await asyncio.sleep(0.1)
        again = sockets.listen(zmq.PAIR, endpoint)
        assert link.monitor is not None
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.monitor.next(), 0.5)
        link.close()
        again.close()
        sockets.close()

    run_async(main())


def test_closing_a_link_ends_whoever_waits_for_its_events(run_async: Run) -> None:
    async def main() -> None:
        sockets = Sockets()
        link = sockets.listen(zmq.PAIR, "tcp://127.0.0.1:0", monitored=True)
        assert link.monitor is not None
        waiting = asyncio.create_task(link.monitor.next())
        await asyncio.sleep(0.01)
        link.close()
        with pytest.raises(ChannelClosed):
            await waiting
        assert [event async for event in link.monitor] == []
        sockets.close()

    run_async(main())
