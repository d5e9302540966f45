"""A decode instance finds a prefill instance's control plane on whatever address of this host it listens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pd import messages as m
from pd.address import url_of
from pd.config import ControlConfig
from pd.ipc.zmq import Sockets
from pd.scheduler import events as ev
from pd.scheduler.links import Links, dial_addresses, split_endpoint
from pd.types import InstanceState

pytestmark = pytest.mark.process

HELLO = m.Hello(m.PROTOCOL_VERSION, "decode", 1, "model", 32, "layout", "digest", "direct", 1, [], [])


class End:
    """The control plane of one instance; its events arrive in order."""

    def __init__(self, host: str, tasks: asyncio.TaskGroup, **control: float) -> None:
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.sockets, self.tasks = Sockets("a secret"), set[asyncio.Task[None]]()

        def spawn(coroutine: Any, name: str) -> asyncio.Task[None]:
            task = tasks.create_task(coroutine, name=name)
            self.tasks.add(task)
            return task

        self.links = Links(self.sockets, self.events.put_nowait, spawn, ControlConfig(**control), host)  # type: ignore[arg-type]

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.links.close_all()
        self.sockets.close()


@pytest.mark.parametrize(
    ("listening", "named"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),  # an address of this host that is not loopback's own
        ("127.0.0.1", "127.0.0.2"),  # how a router knows the host, while the plane stays on loopback
        ("0.0.0.0", "127.0.0.2"),
        ("0.0.0.0", "0.0.0.0"),
    ],
)
def test_a_session_comes_up(run_async: Callable[..., Any], listening: str, named: str) -> None:
    async def main() -> ev.SessionUp:
        async with asyncio.TaskGroup() as tasks:
            # Of the timeout for the second leg of a request the attaching of a decode instance is independent.
            prefill, decode = End(listening, tasks, bootstrap_timeout=1e-9), End("127.0.0.1", tasks)
            _, port = split_endpoint(prefill.links.listen(0))
            endpoint = url_of("tcp", named, port)
            decode.links.open(endpoint, HELLO, 5.0)
            hello = await prefill.events.get()
            assert isinstance(hello, ev.HelloReceived) and hello.hello == HELLO
            prefill.links.welcome(hello.conn, m.Welcome(7, "", "prefill", 1, [], InstanceState.READY, 0))
            up = await decode.events.get()
            assert prefill.events.empty()
            decode.close()
            prefill.close()
        assert isinstance(up, ev.SessionUp), up
        assert (up.endpoint, up.welcome.session) == (endpoint, 7)
        return up

    run_async(main())


def test_nobody_there_is_said_at_once(run_async: Callable[..., Any]) -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            prefill, decode = End("127.0.0.1", tasks), End("127.0.0.1", tasks)
            _, port = split_endpoint(prefill.links.listen(0))
            prefill.close()
            decode.links.open(url_of("tcp", "127.0.0.2", port), HELLO, 5.0)
            refused = await decode.events.get()
            decode.close()
        assert isinstance(refused, ev.SessionRefused) and refused.reason == "the connection was refused"

    run_async(main(), 4.0)


def test_another_hosts_address_is_dialled_as_it_is() -> None:
    assert dial_addresses("tcp://203.0.113.1:8998") == ["tcp://203.0.113.1:8998"]
    assert dial_addresses("tcp://127.0.0.2:8998") == ["tcp://127.0.0.2:8998", "tcp://127.0.0.1:8998"]
    assert dial_addresses("tcp://0.0.0.0:8998") == dial_addresses("tcp://localhost:8998") == ["tcp://127.0.0.1:8998"]
