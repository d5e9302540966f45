"""Asks /generate, in as many threads as there are requests under way."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pd.bench.serve.sse import SseParser
from pd.errors import PdError
from pd.verify.compare import Output
from pd.verify.workload import Case


class AskFailed(PdError):
    """A request that got no answer to compare. `unsupported`: the server says that it lacks the feature."""

    def __init__(self, message: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


@dataclass(frozen=True)
class Answer:
    """`prefill` names the prefill instances that computed the prompt, as the response header does."""

    outputs: list[Output]
    prefill: str = ""


class Server:
    """One deployment. Every call is bounded by `timeout_s`."""

    def __init__(self, url: str, timeout_s: float, api_key: str = "") -> None:
        self.url, self._timeout_s = url, timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object. Raises AskFailed."""
        found = _decoded(self._call(path, None)[0], f"{self.url}{path}")
        if not isinstance(found, dict):
            raise AskFailed(f"{self.url}{path} answers in an unknown form")
        return found

    def ask(self, case: Case) -> Answer:
        """Raises AskFailed."""
        body, prefill = self._call("/generate", json.dumps(case.body()).encode())
        answers = _last_events(body) if case.stream else _decoded(body, self.url)
        answers = answers if isinstance(answers, list) else [answers]
        try:
            return Answer([Output.of(answer) for answer in answers], prefill)
        except (KeyError, TypeError) as error:
            raise AskFailed(f"{self.url} answers in an unknown form: {error!r}") from error

    def ask_all(self, cases: list[Case], at_once: int) -> list[Answer | AskFailed]:
        """So many requests at once; the answers in the order of the cases."""

        def one(case: Case) -> Answer | AskFailed:
            try:
                return self.ask(case)
            except AskFailed as error:
                return error

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, cases))

    def _call(self, path: str, body: bytes | None) -> tuple[bytes, str]:
        request = urllib.request.Request(self.url + path, body, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return response.read(), response.headers.get("x-pd-prefill-used", "")
        except urllib.error.HTTPError as error:
            with error:
                message, code = _error(error.read())
            text = f"{self.url}{path}: HTTP {error.code}: {message}"
            raise AskFailed(text, unsupported=code == "unsupported_parameter") from error
        except (OSError, ValueError) as error:
            raise AskFailed(f"{self.url}{path}: {error}") from error


def _decoded(body: bytes, where: str) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise AskFailed(f"{where} does not answer in JSON: {error}") from error


def _error(body: bytes) -> tuple[str, str]:
    """(message, code) of an OpenAI error body, or of what else came."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"]), str(error.get("code"))
    except (ValueError, KeyError, TypeError):
        return body[:300].decode("utf-8", "replace"), ""


def _last_events(body: bytes) -> list[dict[str, Any]]:
    """The last event of each output, which is cumulative, in order. Raises AskFailed for a stream without its end."""
    last: dict[int, dict[str, Any]] = {}
    done = False
    for data in SseParser().feed(body):
        if data == b"[DONE]":
            done = True
            continue
        event = _decoded(data, "an event")
        if "error" in event:
            raise AskFailed(f"the stream ended with an error: {event['error'].get('message')}")
        last[event.get("index", 0)] = event
    if not done:
        raise AskFailed("the stream was cut before [DONE]")
    return [last[index] for index in sorted(last)]
