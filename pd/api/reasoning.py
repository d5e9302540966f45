"""What a model thinks before it answers, `<think>…</think>`, told from the answer."""

from __future__ import annotations

import enum
from collections.abc import Callable

from pd.api.tools.events import MAX_HELD_SPACE, WHITESPACE, Event, Marked, Reasoning, Text, joined

OPENING, CLOSING = "<think>", "</think>"

#: What `--reasoning-parser` may say; "" is what a template without these marks comes to.
PARSERS = ("deepseek-r1", "qwen3")


class Begins(enum.Enum):
    """How an output begins."""

    INSIDE = enum.auto()  # thinking: the prompt opened it, or the model always does
    PERHAPS = enum.auto()  # thinking, if the model writes the opening mark first
    OUTSIDE = enum.auto()  # with the answer


def parser_for(template: str) -> str:
    """The parser for a model with this chat template; "" where the template knows no such marks."""
    return "qwen3" if OPENING in template or CLOSING in template else ""


def begins(parser: str, prompt: str, continued: str | None = None) -> Begins:
    """How the output after this rendered prompt begins. `continued` is the message that the output continues."""
    if not parser:
        return Begins.OUTSIDE
    if continued is not None:
        opened = continued.rfind(OPENING)
        return Begins.INSIDE if opened > continued.rfind(CLOSING) else Begins.OUTSIDE
    end = prompt.rstrip(WHITESPACE)
    if end.endswith(OPENING):
        return Begins.INSIDE
    if end.endswith(CLOSING):  # the template closed it: the model is not to think
        return Begins.OUTSIDE
    return Begins.INSIDE if parser == "deepseek-r1" else Begins.PERHAPS


class ReasoningSplitter:
    """`feed` pieces of the output, then `finish`; how it was cut changes nothing.

    The marks and white space around the thoughts are left out. With `verbatim` nothing is: thoughts, marks and space
    come as they were, as `Reasoning`, up to the closing mark.
    """

    def __init__(self, begins: Begins, *, verbatim: bool = False) -> None:
        self._verbatim = verbatim
        self._inside_anyway = begins is Begins.INSIDE
        self._marked = Marked(CLOSING, verbatim=verbatim)
        self._held = ""
        self._events: list[Event] = []
        self._state: Callable[[str, int], int] = self._outside if begins is Begins.OUTSIDE else self._beginning
        self.thought = begins is Begins.INSIDE  # there are thoughts, closed or not

    def feed(self, text: str) -> list[Event]:
        if self._state == self._outside:
            return [Text(text)] if text else []
        at = 0
        while at < len(text):
            at = self._state(text, at)
        return self._take()

    def finish(self) -> list[Event]:
        if self._state == self._beginning:
            self._events.append(Reasoning(self._held) if self._inside_anyway else Text(self._held))
        elif self._state == self._thinking:
            self._events.append(Reasoning(self._marked.release()))
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return joined(events)

    # --- states: each reads text[at:] and returns where it stopped ---------------------------------------------------

    def _beginning(self, text: str, at: int) -> int:
        """White space and the opening mark; or the first of the thoughts or of the answer."""
        found = self._held + text[at]
        mark = found.lstrip(WHITESPACE)
        if OPENING.startswith(mark) and len(found) <= len(OPENING) + MAX_HELD_SPACE:
            self._held = found
            if mark == OPENING:
                if self._verbatim:
                    self._events.append(Reasoning(found))
                self.thought = True
                self._state = self._opened
            return at + 1
        if self._inside_anyway:
            self._marked.hold(self._held if self._verbatim else self._held.lstrip(WHITESPACE))
            self._state = self._thinking
        else:
            self._events.append(Text(self._held))
            self._state = self._outside
        return at

    def _opened(self, text: str, at: int) -> int:
        if self._verbatim or text[at] not in WHITESPACE:
            self._state = self._thinking
            return at
        return at + 1

    def _thinking(self, text: str, at: int) -> int:
        shown, at, found = self._marked.feed(text, at)
        if shown:
            self._events.append(Reasoning(shown))
        if found:
            self._state = self._outside if self._verbatim else self._after
        return at

    def _after(self, text: str, at: int) -> int:
        """White space between the thoughts and the answer."""
        if text[at] not in WHITESPACE:
            self._state = self._outside
            return at
        return at + 1

    def _outside(self, text: str, at: int) -> int:
        self._events.append(Text(text[at:]))
        return len(text)
