"""A chat output taken apart: reasoning, content and calls, as events for a stream or as a whole message."""

from __future__ import annotations

from dataclasses import dataclass

from pd.api.reasoning import Begins, ReasoningSplitter
from pd.api.tools.base import CallParser
from pd.api.tools.events import Arguments, CallBegin, Event, Reasoning, Text, joined


@dataclass
class Call:
    name: str
    arguments: str = ""


@dataclass
class Message:
    """A whole output."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] | None = None

    def add(self, event: Event) -> None:
        match event:
            case Text(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallBegin(name):
                self.calls = [*(self.calls or ()), Call(name)]
            case Arguments(text):
                assert self.calls is not None
                self.calls[-1].arguments += text


class OutputParser:
    """`feed` pieces of an output's text, then `finish`: calls are looked for after the thoughts only.

    `separate` false leaves thoughts and their marks in the content; `stream_reasoning` false gives thoughts out once,
    when they are over.
    """

    def __init__(
        self, begins: Begins, calls: CallParser | None, *, separate: bool = True, stream_reasoning: bool = True
    ) -> None:
        self._splitter = ReasoningSplitter(begins, verbatim=not separate)
        self._calls = calls
        self._separate, self._stream_reasoning = separate, stream_reasoning
        self._thoughts: list[str] = []

    @property
    def thought(self) -> bool:
        return self._splitter.thought

    def feed(self, text: str) -> list[Event]:
        return self._pass_on(self._splitter.feed(text))

    def finish(self) -> list[Event]:
        events = self._pass_on(self._splitter.finish())
        if self._thoughts:
            events.insert(0, self._all_thoughts())
        if self._calls is not None:
            events += self._calls.finish()
        return joined(events)

    def _pass_on(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning):
                if not self._separate:
                    found.append(Text(event.text))
                elif self._stream_reasoning:
                    found.append(event)
                else:
                    self._thoughts.append(event.text)
                continue
            if self._thoughts:
                found.append(self._all_thoughts())
            assert isinstance(event, Text)
            found += [event] if self._calls is None else self._calls.feed(event.text)
        return found

    def _all_thoughts(self) -> Reasoning:
        thoughts = Reasoning("".join(self._thoughts))
        self._thoughts.clear()
        return thoughts


def parse_whole(parser: OutputParser, text: str) -> Message:
    message = Message()
    for event in [*parser.feed(text), *parser.finish()]:
        message.add(event)
    return message
