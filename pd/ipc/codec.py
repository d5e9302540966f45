"""Messages to bytes and back: msgpack, by union type."""

from __future__ import annotations

import types
import typing
from typing import Any, Generic, TypeVar

import msgspec

from pd.errors import ProtocolError

T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes the messages of one direction of one link.

    `message_types` is a message class or a union of them, such as `pd.messages.ApiToScheduler`. Annotate the result
    for the type checker: `codec: Codec[ApiToScheduler] = Codec(ApiToScheduler)`.
    """

    def __init__(self, message_types: Any) -> None:
        union = isinstance(message_types, types.UnionType) or typing.get_origin(message_types) is typing.Union
        self.members: tuple[type, ...] = typing.get_args(message_types) if union else (message_types,)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(message_types)

    def encode(self, message: T) -> bytes:
        """Raises TypeError for a message that the other end could not decode: a mistake in this program."""
        if not isinstance(message, self.members):
            names = ", ".join(member.__name__ for member in self.members)
            raise TypeError(f"{type(message).__name__} does not belong on this channel ({names})")
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> T:
        """Raises ProtocolError when `data` is not one of the messages of this union."""
        try:
            return typing.cast(T, self._decoder.decode(data))
        except (msgspec.DecodeError, ValueError) as error:  # ValueError: invalid UTF-8 in a str field
            raise ProtocolError("message", str(error)) from error
