"""What the parsers of all formats share: text around calls, calls that turn out to be none, the end of the output."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection

from pd.api.tools.events import WHITESPACE, Arguments, CallBegin, Event, Marked, Text, joined
from pd.api.tools.scanner import CallScanner, Verdict

#: So many characters may stand between markup and call: more are text.
MAX_BEFORE = 256


class CallParser(abc.ABC):
    """Tells calls from text. `feed` pieces of the output, then `finish`; how it was cut changes nothing.

    With `eager`, for streams, a call is given out once its function and the beginning of its arguments are there; if
    it turns out malformed after that, the rest of it is arguments as well. Without, a call is one that is complete
    and well-formed, and everything else stays text. A call of a function that is not among `names` is text.
    With `single` the first call is the only one: others are left out.
    """

    #: The markup that announces a call.
    opening: str

    def __init__(self, names: Collection[str], *, eager: bool, single: bool = False) -> None:
        self._names = names
        self._eager, self._single = eager, single
        self._events: list[Event] = []
        self._calls = 0
        self._begun = False  # the call at hand has been given out
        self._before = ""  # markup and white space that are text if the call at hand is none
        self._scanner = CallScanner(names)
        self._marked = Marked(self.opening)
        self._state: Callable[[str, int], int] = self.first_state()

    @abc.abstractmethod
    def first_state(self) -> Callable[[str, int], int]:
        """The state at the beginning of an output. A state reads text[at:] and returns where it stopped."""

    @abc.abstractmethod
    def after_call(self, text: str, at: int) -> int:
        """The state after a complete call."""

    @abc.abstractmethod
    def malformed(self, text: str, at: int) -> int:
        """The state after a call that went wrong when it had been given out."""

    @abc.abstractmethod
    def shown_opening(self) -> str:
        """What of the markup is text when no call follows."""

    def feed(self, text: str) -> list[Event]:
        at = 0
        while at < len(text):
            at = self._state(text, at)
        return self._take()

    def finish(self) -> list[Event]:
        """The output is over: what was held back is text, or the rest of a call's arguments."""
        if self._state == self.in_call:
            if not self._begun:
                self.emit(Text(self._before + self._scanner.raw))
        elif self._state == self.content:
            held = self._marked.release()
            if held.strip(WHITESPACE) or not self._calls:
                self.emit(Text(held))
        elif self._state == self.before_call:
            self.emit(Text(self._before))
        else:
            self.finish_other()
        return self._take()

    @abc.abstractmethod
    def finish_other(self) -> None:
        """The output ends in a state of the format's own."""

    def emit(self, event: Event) -> None:
        if self._single and self._calls > 1 and isinstance(event, CallBegin | Arguments):
            return
        self._events.append(event)

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return joined(events) if len(events) > 1 else [e for e in events if isinstance(e, CallBegin) or e.text]

    # --- states ------------------------------------------------------------------------------------------------------

    def content(self, text: str, at: int) -> int:
        """Text, up to the markup of a call."""
        shown, at, found = self._marked.feed(text, at)
        if shown:
            self.emit(Text(shown))
        if found:
            self._before = self._marked.space + self.shown_opening()
            self._state = self.before_call
        return at

    def before_call(self, text: str, at: int) -> int:
        """After the markup: white space, and then the call or something else."""
        if text[at] in WHITESPACE and len(self._before) < MAX_BEFORE:
            self._before += text[at]
            return at + 1
        if text[at] != "{":
            self.emit(Text(self._before))
            self._state = self.content
            return at
        self._scanner, self._begun = CallScanner(self._names), False
        self._state = self.in_call
        return at

    def in_call(self, text: str, at: int) -> int:
        scanner = self._scanner
        at = scanner.feed(text, at)
        if self._eager and scanner.begun:
            self._give_out()
        if scanner.verdict is Verdict.DONE and (self._eager or scanner.valid()):
            if not self._eager:
                self._give_out()
            self._before = ""
            self._state = self.after_call
        elif scanner.verdict is not Verdict.OPEN:
            if self._begun:  # what follows complete arguments does not spoil them
                self._state = self.content if scanner.complete else self.malformed
            else:
                self.emit(Text(self._before + scanner.raw))
                self._state = self.content
        return at

    def _give_out(self) -> None:
        if not self._begun:
            self._begun = True
            self._calls += 1
            assert self._scanner.name is not None
            self.emit(CallBegin(self._scanner.name))
        self.emit(Arguments(self._scanner.take_arguments()))
