"""`<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>`, as Hermes, Qwen2.5 and Qwen3 write calls."""

from __future__ import annotations

from collections.abc import Callable

from pd.api.tools.base import MAX_BEFORE, CallParser
from pd.api.tools.events import WHITESPACE, Arguments, Marked, Text

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class HermesParser(CallParser):
    """A call may stand anywhere in the text; a block without its end, or with several calls, is taken as well."""

    opening = OPENING

    def first_state(self) -> Callable[[str, int], int]:
        self._closing = Marked(CLOSING)
        return self.content

    def shown_opening(self) -> str:
        return OPENING

    def after_call(self, text: str, at: int) -> int:
        """White space and the end of the block; or one more call; or text."""
        character = text[at]
        found = self._before + character
        mark = found.lstrip(WHITESPACE)
        if CLOSING.startswith(mark) and len(found) <= MAX_BEFORE:
            self._before = found
            if mark == CLOSING:
                self._state = self.content
            return at + 1
        if mark == "{":
            self._state = self.before_call
            return at
        self.emit(Text(self._before))
        self._state = self.content
        return at

    def malformed(self, text: str, at: int) -> int:
        shown, at, found = self._closing.feed(text, at)
        self.emit(Arguments(shown))
        if found:
            self._state = self.content
        return at

    def finish_other(self) -> None:
        if self._state == self.malformed:
            self.emit(Arguments(self._closing.release()))
