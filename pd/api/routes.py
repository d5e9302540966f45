"""A route: where it is, what it takes and answers. The table of them dispatches and describes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pd.api.http import Http

Endpoint = Callable[[Http], Awaitable[None]]

GET, POST, BOTH = ("GET",), ("POST",), ("GET", "POST")


@dataclass(frozen=True)
class Route:
    """`path` may end with one `{parameter}`, which takes slashes, too. `body`: the type of the JSON that is read;
    `answer`: of what status 200 brings, None for text. `streams`: server-sent events where the body says so.
    `query`: names and what they do.
    """

    path: str
    methods: tuple[str, ...]
    endpoint: Endpoint
    summary: str
    answer: Any = None
    body: Any = None
    streams: bool = False
    optional_body: bool = False
    query: tuple[tuple[str, str], ...] = ()


class Table:
    """Finds a path's route."""

    def __init__(self, routes: list[Route]) -> None:
        self.routes = routes
        self.exact = {route.path: route for route in routes if not route.path.endswith("}")}
        self._open = [(route.path.partition("{")[0], route) for route in routes if route.path.endswith("}")]

    def find(self, path: str) -> Route | None:
        found = self.exact.get(path.rstrip("/") or "/")
        if found is None:
            for prefix, route in self._open:
                if path.startswith(prefix) and len(path) > len(prefix):
                    return route
        return found
