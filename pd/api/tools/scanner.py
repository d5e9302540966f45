"""One call in JSON, `{"name": "f", "arguments": {…}}`, read as its characters come.

Every character is looked at once, and the outcome depends on the characters alone, not on how they were cut into
pieces: whether the object can still be a call is known at each of them.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Collection

from pd.api.tools.events import WHITESPACE

NAME_KEY = "name"
ARGUMENTS_KEYS = ("arguments", "parameters")
#: What models write beside these; it says nothing that the client does not know.
OTHER_KEYS = ("type", "id")
MAX_DEPTH = 128

#: All that stands outside of strings and brackets in JSON.
_PLAIN = re.compile(r"[ \t\r\n,:0-9+\-.eEtruefalsn]*")
_IN_STRING = re.compile(r'[^"\\]*')


class Verdict(enum.Enum):
    OPEN = enum.auto()  # may be a call
    DONE = enum.auto()  # a call, complete
    REJECTED = enum.auto()  # no call, or one that is malformed


class CallScanner:
    """`names` are the functions on offer: an object that names another one is no call.

    `name` is known from some point on; `begun` says that arguments have begun besides, so that this is a call unless
    what follows is malformed.
    """

    __slots__ = (
        "_arguments",
        "_depth",
        "_escaped",
        "_in_string",
        "_key",
        "_literal",
        "_names",
        "_raw",
        "_seen",
        "_state",
        "_string",
        "_string_end",
        "_taken",
        "name",
        "verdict",
    )

    def __init__(self, names: Collection[str]) -> None:
        self.verdict = Verdict.OPEN
        self.name: str | None = None
        self._names = names
        self._raw: list[str] = []
        self._arguments: list[str] = []
        self._taken = 0  # pieces of the arguments that were taken
        self._state: Callable[[str, int], int] = self._open
        self._string: list[str] = []
        self._string_end: Callable[[str], None] = self._key_read
        self._escaped = self._in_string = False
        self._depth = 0
        self._literal = ""
        self._key = ""
        self._seen: set[str] = set()

    @property
    def begun(self) -> bool:
        return self.name is not None and bool(self._arguments)

    @property
    def complete(self) -> bool:
        """Whether the arguments have come to their end."""
        return bool(self._arguments) and self._depth == 0

    @property
    def raw(self) -> str:
        """All characters that were read."""
        return "".join(self._raw)

    @property
    def arguments(self) -> str:
        return "".join(self._arguments)

    def take_arguments(self) -> str:
        """Those since the last call."""
        taken, self._taken = self._taken, len(self._arguments)
        return "".join(self._arguments[taken:])

    def valid(self) -> bool:
        """Whether the arguments of a complete call are JSON in every detail."""
        try:
            json.loads(self.arguments)
        except ValueError:
            return False
        return True

    def feed(self, text: str, at: int) -> int:
        """Read text[at:]. Returns where it stopped: at the end, after the object, or at what makes it no call."""
        start = at
        while at < len(text) and self.verdict is Verdict.OPEN:
            at = self._state(text, at)
        self._raw.append(text[start:at])
        return at

    # --- states: each reads at least one character, or rejects -------------------------------------------------------

    def _reject(self, at: int) -> int:
        self.verdict = Verdict.REJECTED
        return at

    def _open(self, text: str, at: int) -> int:
        if text[at] != "{":
            return self._reject(at)
        self._state = self._before_key
        return at + 1

    def _before_key(self, text: str, at: int) -> int:
        if text[at] in WHITESPACE:
            return at + 1
        return self._begin_string(at, self._key_read) if text[at] == '"' else self._reject(at)

    def _begin_string(self, at: int, end: Callable[[str], None]) -> int:
        self._string, self._string_end = ['"'], end
        self._state = self._read_string
        return at + 1

    def _read_string(self, text: str, at: int) -> int:
        at, ended = self._string_to(text, at, self._string)
        if ended:
            try:
                value = json.loads("".join(self._string))
            except ValueError:
                return self._reject(at)
            self._string_end(value)
        return at

    def _string_to(self, text: str, at: int, into: list[str]) -> tuple[int, bool]:
        """Inside a string: read up to its end or an escape. Returns (where it stopped, whether the string ended)."""
        if self._escaped:
            self._escaped = False
            into.append(text[at])
            return at + 1, False
        match = _IN_STRING.match(text, at)
        assert match is not None
        end = match.end()
        if end < len(text):
            self._escaped = text[end] == "\\"
            end += 1
        into.append(text[at:end])
        return end, text[end - 1] == '"' and not self._escaped

    def _key_read(self, key: str) -> None:
        kind = "arguments" if key in ARGUMENTS_KEYS else key
        if kind in self._seen or kind not in (NAME_KEY, "arguments", *OTHER_KEYS):
            self.verdict = Verdict.REJECTED
            return
        self._seen.add(kind)
        self._key = kind
        self._state = self._before_colon

    def _before_colon(self, text: str, at: int) -> int:
        if text[at] in WHITESPACE:
            return at + 1
        if text[at] != ":":
            return self._reject(at)
        self._state = self._before_value
        return at + 1

    def _before_value(self, text: str, at: int) -> int:
        character = text[at]
        if character in WHITESPACE:
            return at + 1
        if self._key == "arguments":
            if character == "{":
                self._state = self._read_arguments
                return self._read_arguments(text, at)
            self._state = self._read_null
            return self._read_null(text, at)
        return self._begin_string(at, self._value_read) if character == '"' else self._reject(at)

    def _value_read(self, value: str) -> None:
        if self._key == NAME_KEY:
            if value not in self._names:
                self.verdict = Verdict.REJECTED
                return
            self.name = value
        self._state = self._after_value

    def _read_null(self, text: str, at: int) -> int:
        """`null` are no arguments."""
        self._literal += text[at]
        if not "null".startswith(self._literal):
            return self._reject(at)
        if self._literal == "null":
            self._arguments.append("{}")
            self._state = self._after_value
        return at + 1

    def _read_arguments(self, text: str, at: int) -> int:
        if self._in_string:
            at, ended = self._string_to(text, at, self._arguments)
            self._in_string = not ended
            return at
        match = _PLAIN.match(text, at)
        assert match is not None
        end = match.end()
        if end < len(text):
            character = text[end]
            if character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            if character not in '"{}[]' or self._depth > MAX_DEPTH:
                self._arguments.append(text[at:end])
                return self._reject(end)
            end += 1
        self._arguments.append(text[at:end])
        if self._depth == 0:
            self._state = self._after_value
        return end

    def _after_value(self, text: str, at: int) -> int:
        character = text[at]
        if character == ",":
            self._state = self._before_key
        elif character == "}":
            if not self.begun:
                return self._reject(at)
            self.verdict = Verdict.DONE
        elif character not in WHITESPACE:
            return self._reject(at)
        return at + 1
