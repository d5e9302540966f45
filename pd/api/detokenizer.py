"""Token ids to text, piece by piece: exactly the text that decoding everything at once would give.

Two ways, chosen by the tokenizer's decoder. Byte-level decoders map each token to bytes, so an incremental UTF-8
decoder over a table of bytes is exact and takes a fraction of a microsecond per token. Every other decoder (Metaspace,
byte fallback, WordPiece) depends on neighbouring tokens; there a window of the last tokens is decoded with and without
the new ones (the prefix/read offsets of Hugging Face's text-generation-inference) and only the difference is given out.

A character that is not complete yet is held back, so U+FFFD appears only where the whole text has it too.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

#: How many prompt tokens give the window its context, so that the first output token keeps its leading space.
CONTEXT_TOKENS = 5

#: Tokens that a window holds back at most, waiting for a character to become complete.
MAX_HELD_TOKENS = 32

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """One per choice of a request."""

    def feed(self, ids: Sequence[int]) -> str:
        """Text that these tokens complete; may be empty."""

    def flush(self) -> str:
        """What is still held back, at the end of the output."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one with characters outside the alphabet stands for its own UTF-8 bytes."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


class TokenPieces(dict[int, str | bytes]):
    """Token id -> its text, or its bytes where they are no whole characters. Filled as tokens are first seen.

    Ids without a token, and `skipped` ones, are empty.
    """

    def __init__(self, id_to_token: Callable[[int], str | None], skipped: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._id_to_token = id_to_token
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | bytes:
        token = None if token_id in self._skipped else self._id_to_token(token_id)
        raw = b"" if token is None else byte_level_bytes(token)
        piece: str | bytes = raw
        with contextlib.suppress(UnicodeDecodeError):
            piece = raw.decode()
        self[token_id] = piece
        return piece


class ByteLevelDetokenizer:
    """For byte-level decoders: a table lookup, and an incremental UTF-8 decoder where a character is cut."""

    __slots__ = ("_decoder", "_in_character", "_table")

    def __init__(self, table: TokenPieces) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._in_character = False

    def feed(self, ids: Sequence[int]) -> str:
        if len(ids) == 1 and not self._in_character:
            piece = self._table[ids[0]]
            if type(piece) is str:
                return piece
        pieces = [self._table[token_id] for token_id in ids]
        text = self._decoder.decode(b"".join([p.encode() if isinstance(p, str) else p for p in pieces]))
        self._in_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        self._in_character = False
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any decoder. `decode` turns ids into text; `context` is the end of the prompt, without skipped tokens.

    Text inside an invalid run of byte-fallback tokens can differ from decoding all at once, where one bad byte
    turns its whole run into replacement characters after some of it has been given out.
    """

    __slots__ = ("_decode", "_ids", "_read", "_read_text", "_skipped")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        context: Sequence[int] = (),
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._ids = list(context)
        self._read = len(self._ids)  # the text of these has been given out
        self._read_text = decode(self._ids) if self._ids else ""

    def feed(self, ids: Sequence[int]) -> str:
        given = [self._feed_one(token_id) for token_id in ids]
        return given[0] if len(given) == 1 else "".join(given)

    def _feed_one(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # A window that only grows would make each token dearer than the last: no character needs so many tokens.
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_HELD_TOKENS:
            return ""
        return self._give(text)

    def _give(self, text: str) -> str:
        if len(text) <= len(self._read_text):
            return ""
        given = text[len(self._read_text) :]
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._read_text = self._decode(self._ids)
        return given

    def flush(self) -> str:
        return self._give(self._decode(self._ids))


class StopStrings:
    """Cuts text at the first stop string to be completed, wherever the token boundaries are; nothing of it leaks.

    Among strings completed by the same character the longest wins, so the result does not depend on how the text
    was cut into pieces. With `include` the matched string stays in the text.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that may be given out, the matched stop string or None)."""
        if not text:
            return "", None
        text = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            end, start, stop = best
            self._held = ""
            return text[: end if self._include else start], stop
        keep = self._may_begin(text)
        self._held = text[keep:]
        return text[:keep], None

    def _may_begin(self, text: str) -> int:
        """Where the longest suffix starts that may be the beginning of a stop string."""
        earliest = len(text)
        for stop in self._stops:
            first = stop[0]
            at = text.find(first, max(0, len(text) - len(stop) + 1), earliest)
            while at >= 0:
                if text.endswith(stop[: len(text) - at]):
                    earliest = at
                    break
                at = text.find(first, at + 1, earliest)
        return earliest

    def release(self) -> str:
        """What is held back, when no stop string can follow any more."""
        held, self._held = self._held, ""
        return held
