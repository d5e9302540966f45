"""What an output consists of, in the order in which it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

WHITESPACE = " \t\r\n"

#: So much white space may be held back in front of markup, to be dropped with it; what is more is text.
MAX_HELD_SPACE = 64


@dataclass(frozen=True, slots=True)
class Text:
    """Part of the message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Part of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of an offered function; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Part of the arguments of the call that began last, as the model wrote them."""

    text: str


Event: TypeAlias = Text | Reasoning | CallBegin | Arguments


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind as one; none is empty."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, CallBegin):
            found.append(event)
        elif event.text:
            last = found[-1] if found else None
            if isinstance(last, CallBegin) or type(last) is not type(event):
                found.append(event)
            else:
                assert last is not None
                found[-1] = type(event)(last.text + event.text)
    return found


def held_from(text: str, markup: str) -> int:
    """Where the end of `text` begins that may turn out to be white space and markup."""
    keep = len(text)
    for size in range(min(len(text), len(markup) - 1), 0, -1):
        if text.endswith(markup[:size]):
            keep -= size
            break
    return stripped(text, keep)


def stripped(text: str, end: int) -> int:
    """The end of text[:end] without its last white space, of which at most MAX_HELD_SPACE characters count."""
    least = max(0, end - MAX_HELD_SPACE)
    while end > least and text[end - 1] in WHITESPACE:
        end -= 1
    return end


class Marked:
    """Looks for markup in text that comes in pieces, with what may be its beginning held back.

    White space before the markup goes with it, and neither is text, except with `verbatim`: then both are.
    """

    __slots__ = ("_held", "_markup", "_verbatim", "space")

    def __init__(self, markup: str, *, verbatim: bool = False) -> None:
        self._markup, self._verbatim = markup, verbatim
        self._held = ""
        self.space = ""  # what stood before the markup that came last, without `verbatim`

    def feed(self, text: str, at: int) -> tuple[str, int, bool]:
        """Look at text[at:]. Returns (what is certainly text, where to go on in `text`, whether the markup came)."""
        whole = self._held + text[at:]
        found = whole.find(self._markup)
        if found >= 0:
            self._held = ""
            after = found + len(self._markup)
            shown = after if self._verbatim else stripped(whole, found)
            self.space = whole[shown:found]
            return whole[:shown], len(text) - (len(whole) - after), True
        keep = held_from(whole, self._markup)
        self._held = whole[keep:]
        return whole[:keep], len(text), False

    def hold(self, text: str) -> None:
        """Text that came before, and may be white space or the markup's beginning."""
        self._held += text

    def release(self) -> str:
        """What is held back, at the end of the output."""
        held, self._held = self._held, ""
        return held
