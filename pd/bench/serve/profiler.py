"""Starts and stops the instances' profilers around the load."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from pd.bench.serve.client import Client
from pd.bench.serve.options import Options
from pd.bench.serve.profile import ProfileOptions
from pd.bench.serve.requests import SmallAnswer
from pd.errors import ConfigError

#: Seconds for one answer: an instance that stops writes its trace first.
_TIMEOUT = 620.0


class Recording:
    """`note` prints a line."""

    def __init__(self, profile: ProfileOptions, options: Options, note: Callable[[str], None]) -> None:
        self._body, self._note = profile.body, note
        self._clients = [(f"{name} {url}", Client(url, options.headers)) for name, url in profile.urls]
        self._started: list[tuple[str, Client]] = []

    async def start(self) -> None:
        """All of them or, with a ConfigError, none."""
        for name, client in self._clients:
            problem, _ = await _ask(client, "/start_profile", self._body)
            if problem:
                await self.stop()
                raise ConfigError("--profile", f"{name}: {problem}")
            self._started.append((name, client))
            self._note(f"profiling {name}")

    async def stop(self) -> bool:
        """Whether every one that was started has written its trace."""
        complete = True
        for name, client in self._started:
            problem, files = await _ask(client, "/stop_profile", {})
            self._note(f"profile of {name}: {problem or ', '.join(files) or 'no step came'}")
            complete = complete and not problem
        self._started.clear()
        return complete

    def close(self) -> None:
        for _, client in self._clients:
            client.close()


async def _ask(client: Client, path: str, body: dict[str, Any]) -> tuple[str, list[str]]:
    """(what is wrong or "", files). SGLang answers with text."""
    answer = SmallAnswer()
    try:
        async with asyncio.timeout(_TIMEOUT):
            await client.post(path, msgspec.json.encode(body), answer, uuid.uuid4().hex)
    except OSError as error:
        return str(error) or f"no answer within {_TIMEOUT:g} s", []
    try:
        said = msgspec.json.decode(answer.data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = {}
    if answer.status != 200:
        return f"HTTP {answer.status}: {answer.data.decode(errors='replace')[:500]}", []
    return "", [str(name) for name in said.get("files", [])] if isinstance(said, dict) else []
