"""The HTTP server: uvicorn with httptools on a socket of our own, without its signals and logs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator

import uvicorn

from pd.api.app import App
from pd.config import HttpConfig

BACKLOG = 2048
#: Longer than the pools of common clients and routers keep idle connections, so that they close first.
KEEP_ALIVE_S = 75
#: After the requests have ended: for clients to take the last bytes.
CLOSE_S = 2


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. With `shared` others may listen there, too: the kernel spreads

    connections over them. Raises OSError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG, reuse_port=shared)
    # Accepted connections inherit it: a token must not wait for the acknowledgement of the one before.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class HttpServer(uvicorn.Server):
    """`started` is called once connections are taken.

    `tls` names the files of an HTTPS server. `should_exit = True` ends `serve`."""

    def __init__(self, app: App, started: Callable[[], None], tls: HttpConfig | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_S,
                ssl_certfile=tls.ssl_certfile or None if tls is not None else None,
                ssl_keyfile=tls.ssl_keyfile or None if tls is not None else None,
                ssl_keyfile_password=tls.ssl_keyfile_password or None if tls is not None else None,
            )
        )
        self._on_started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # signals are the parent's business

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def run_until_exit(self, sock: socket.socket) -> None:
        """As `serve`; a cancelled one closes its connections too."""
        try:
            await self.serve([sock])
        except asyncio.CancelledError:
            self.force_exit = True
            for listener in self.servers:
                listener.close()
            raise
