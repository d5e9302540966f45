"""A cluster of real processes, its victims, and what its clients saw."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from oracle import tiny_model
from up_kit import Running, running

#: What every request asks for by x-request-timeout, and how much later a client may know, seconds.
DEADLINE, MARGIN = 5.0, 1.5
#: From the death of a member until it serves again.
COMEBACK = 60.0


def eventually(
    check: Callable[[], object], bound: float, what: Callable[[], object] = lambda: "", *, every: float = 0.02
) -> None:
    """Poll until `check` is true; a failure shows `what()`."""
    end = time.monotonic() + bound
    while not check():
        assert time.monotonic() < end, f"not within {bound:g} s: {what()}"
        time.sleep(every)


def child_name(process: psutil.Process) -> str:
    """NAME of `python -m pd.child NAME FD`, "" of another process and of one that is gone."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return ""
    return command[command.index("pd.child") + 1] if "pd.child" in command else ""


def find(parent: psutil.Process, name: str) -> psutil.Process:
    """The living direct child of that name."""
    (found,) = (child for child in parent.children() if child_name(child) == name)
    return found


def gone(process: psutil.Process) -> bool:
    """Ended, whether or not its parent has noticed."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        if not gone(process):
            os.kill(process.pid, number)


class Faults:
    """The test's side of `pd.faults`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def arm(self, *points: str) -> None:
        self.clear()
        for point in points:
            (self.folder / point).touch()

    def wait(self, points: tuple[str, ...], bound: float = 4.0) -> str:
        """The first of `points` that a process stands at."""
        end = time.monotonic() + bound
        while time.monotonic() < end:
            for point in points:
                if (self.folder / f"{point}.reached").exists():
                    return point
            time.sleep(0.001)
        raise AssertionError(f"none of {points} was reached within {bound:g} s")

    def release(self, *points: str) -> None:
        """Those who stand there go on, and nobody will stand there again."""
        for point in points:
            (self.folder / f"{point}.go").touch()
            (self.folder / point).unlink(missing_ok=True)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)


@dataclass
class Ask:
    """One request in a thread of its own, and how it ended.

    `outcome`: "tokens" (all of them came: `text`), "error" (`problem` says so, in words of the server), "cut" (the
    connection ended before the answer did) or "timeout" (the client gave up).
    """

    url: str
    prompt: list[int]
    stream: bool
    prefills: tuple[str, ...] = ()
    max_tokens: int = 40
    deadline: float = DEADLINE
    outcome: str = ""
    text: str = ""
    problem: str = ""
    seconds: float = 0.0
    finish: str = ""
    used: str = ""  # the prefill instance that did it
    first: threading.Event = field(default_factory=threading.Event)  # something has come, or it is over
    _thread: threading.Thread | None = None

    def start(self) -> Ask:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def wait(self) -> Ask:
        assert self._thread is not None
        self._thread.join(self.deadline + 30.0)
        assert not self._thread.is_alive(), self
        return self

    def _run(self) -> None:
        began = time.monotonic()
        try:
            with httpx.Client(timeout=self.deadline + MARGIN, verify=False) as client:
                self._ask(client)
        except httpx.TimeoutException as error:
            self.outcome, self.problem = "timeout", repr(error)
        except httpx.TransportError as error:
            self.outcome, self.problem = "cut", repr(error)
        finally:
            self.seconds = time.monotonic() - began
            self.first.set()

    def _ask(self, client: httpx.Client) -> None:
        headers = {"x-request-timeout": f"{self.deadline:g}"}
        if self.prefills:
            headers["x-pd-prefill"] = ",".join(self.prefills)
        body = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.stream,
        }
        with client.stream("POST", f"{self.url}/v1/completions", json=body, headers=headers) as response:
            self.used = response.headers.get("x-pd-prefill-used", "")
            if response.status_code != 200 or not self.stream:
                response.read()
                self._whole(response.status_code, response.json())
                return
            for line in response.iter_lines():
                if line.startswith("data: ") and not self._event(line.removeprefix("data: ")):
                    return
        self.outcome, self.problem = "cut", "the stream ended without [DONE]"

    def _whole(self, status: int, answer: dict[str, Any]) -> None:
        if status == 200:
            self.outcome, self.text = "tokens", answer["choices"][0]["text"]
        else:
            self.outcome, self.problem = "error", f"{status} {answer['error']['message']}"

    def _event(self, data: str) -> bool:
        """False when it was the last one."""
        if data == "[DONE]":
            self.outcome = "tokens"
            return False
        event = json.loads(data)
        if "error" in event:
            self.outcome, self.problem = "error", event["error"]["message"]
            return False
        (choice,) = event["choices"]
        self.text += choice["text"]
        self.finish = choice["finish_reason"] or self.finish
        self.first.set()
        return True


class Cluster:
    """`pd up` with two prefill and two decode instances."""

    def __init__(self, command: Running, faults: Faults) -> None:
        self.command, self.faults, self.router = command, faults, command.url
        self._http = httpx.Client(timeout=2.0, verify=False, headers={"connection": "close"})
        self.parent = psutil.Process(command.process.pid)
        self.names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
        ready = {line["instance"]: line for line in command.logged("ready") if line.get("instance") in self.names}
        self.urls: dict[str, str] = {name: ready[name]["url"] for name in self.names}
        self.control: dict[str, str] = {name: ready[name]["control_endpoint"] for name in self.names[:2]}

    def ask(self, prompt: list[int], *, stream: bool, decode: int = 0, first: int = 0) -> Ask:
        """A request to `decode-<decode>`, to be prefilled by `prefill-<first>` or else the other one."""
        prefills = (self.control[f"prefill-{first}"], self.control[f"prefill-{1 - first}"])
        return Ask(self.urls[f"decode-{decode}"], prompt, stream, prefills)

    def tree(self, name: str) -> list[psutil.Process]:
        """A member and its children."""
        top = find(self.parent, name)
        return [top, *top.children(recursive=True)]

    def victim(self, name: str) -> list[psutil.Process]:
        """ "prefill-0", "router": the whole tree; "prefill-0's runner": that process."""
        member, _, process = name.partition("'s ")
        return [find(find(self.parent, member), process)] if process else self.tree(member)

    def info(self, name: str, query: str = "") -> dict[str, Any]:
        response = self._http.get(f"{self.urls[name]}/server_info{query}")
        response.raise_for_status()
        return dict(response.json())

    def books(self, name: str) -> dict[str, Any]:
        """The audit of an instance; `problem` when it does not answer."""
        try:
            return dict(self.info(name, "?audit=1")["audit"])
        except httpx.HTTPError as error:
            return {"balanced": False, "problem": repr(error)}

    def clean(self, name: str, *, quarantined: bool = False) -> bool:
        """Nothing is held for a request any more. `quarantined` blocks of a peer that is frozen may be."""
        books = self.books(name)
        held = ("owned", "incoming") if quarantined else ("owned", "incoming", "quarantined")
        return books["balanced"] is True and not any(books[state] for state in held)

    def all_healthy(self) -> bool:
        """In the eyes of the router, which checks often."""
        try:
            info = self._http.get(f"{self.router}/server_info").json()
            healthy = [worker for worker in info["workers"] if worker["health"] == "healthy"]
            return len(healthy) == 4 and all(self.clean(name) for name in self.names)
        except httpx.HTTPError:
            return False

    def wait_until_healthy(self) -> None:
        """Every member serves, knows of it, and holds nothing."""
        eventually(self.all_healthy, COMEBACK, lambda: [(name, self.books(name)) for name in self.names], every=0.2)

    def close(self) -> None:
        self._http.close()


@contextmanager
def fault_cluster(folder: Path, *more: str, environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster with a tiny model and fault points, quick to notice and to restart. `more` settings come last."""
    model = tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=1024)
    faults = Faults(folder / "points")
    settings = {
        "--prefill": 2,
        "--decode": 2,
        "--port": 0,
        "--dtype": "float32",
        "--max-total-tokens": 20000,
        "--chunked-prefill-size": 64,
        "--local-prefill": "fallback",
        "--heartbeat-interval": 0.5,
        "--health-interval": 0.3,
        "--health-timeout": 1,
        "--drain-timeout": 5,
        "--log-format": "json",
    }
    command = [sys.executable, "-m", "pd", "up", model, *(str(part) for pair in settings.items() for part in pair)]
    variables = {"PYTHONPATH": str(Path(__file__).parents[1]), "PD_FAULT": str(faults.folder), **(environment or {})}
    with running([*command, *more], folder / "up", **variables) as up:
        made = Cluster(up, faults)
        yield made
        made.close()
