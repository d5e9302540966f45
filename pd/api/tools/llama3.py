"""`{"name": …, "parameters": …}`, after `<|python_tag|>` or as the whole answer, as Llama 3 writes calls."""

from __future__ import annotations

from collections.abc import Callable

from pd.api.tools.base import MAX_BEFORE, CallParser
from pd.api.tools.events import WHITESPACE, Arguments, Text

OPENING = "<|python_tag|>"
SEPARATOR = ";"


class Llama3Parser(CallParser):
    """Without the tag a call begins the answer. Several are separated by `;` or white space. The tag is no text."""

    opening = OPENING

    def first_state(self) -> Callable[[str, int], int]:
        return self.beginning

    def shown_opening(self) -> str:
        return ""

    def beginning(self, text: str, at: int) -> int:
        return self._perhaps_call(text, at, WHITESPACE)

    def after_call(self, text: str, at: int) -> int:
        return self._perhaps_call(text, at, WHITESPACE + SEPARATOR)

    def _perhaps_call(self, text: str, at: int, skipped: str) -> int:
        """A call without tag, after characters that only count as text if none comes."""
        if text[at] in skipped and len(self._before) < MAX_BEFORE:
            self._before += text[at]
            return at + 1
        if text[at] == "{":
            self._state = self.before_call
            return at
        self._marked.hold(self._before)
        self._state = self.content
        return at

    def malformed(self, text: str, at: int) -> int:
        self.emit(Arguments(text[at:]))
        return len(text)

    def finish_other(self) -> None:
        if self._state == self.beginning:
            self.emit(Text(self._before))
