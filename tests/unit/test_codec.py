"""Messages survive the way through bytes, and nothing else gets in."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd.errors import ProtocolError
from pd.ipc.codec import Codec
from pd.messages import Abort, ApiToScheduler, Ask, Drain, Envelope, StepOrder, Submit
from pd.types import SamplingParams

API: Codec[ApiToScheduler] = Codec(ApiToScheduler)


@pytest.mark.parametrize(
    "message",
    [
        Submit(key=1 << 41, rid="r", tokens_i32=b"\x01\x00\x00\x00", sampling=SamplingParams(logit_bias={5: -1.0})),
        Abort(key=3, reason="gone"),
        Ask(token=9, what="audit"),
        Drain(bound_ms=100),
    ],
)
def test_every_member_of_a_union_comes_back_equal(message: ApiToScheduler) -> None:
    assert API.decode(API.encode(message)) == message


def test_a_codec_of_one_message_class_works_like_a_union_of_one() -> None:
    orders: Codec[StepOrder] = Codec(StepOrder)
    order = StepOrder(step=1, rows_i64=b"", counts_i32=b"", sample_u8=b"")
    assert orders.decode(orders.encode(order)) == order


def test_a_struct_without_a_tag_travels_alone() -> None:
    envelopes: Codec[Envelope] = Codec(Envelope)
    assert envelopes.decode(envelopes.encode(Envelope(1, 2, b"x"))) == Envelope(1, 2, b"x")


def test_sending_a_message_that_does_not_belong_on_the_channel_is_a_mistake_found_at_the_sender() -> None:
    with pytest.raises(TypeError, match="StepOrder does not belong on this channel"):
        API.encode(StepOrder(step=1, rows_i64=b"", counts_i32=b"", sample_u8=b""))  # type: ignore[arg-type]


def test_a_member_of_another_union_is_refused_by_the_receiver() -> None:
    foreign = msgspec.msgpack.encode(StepOrder(step=1, rows_i64=b"", counts_i32=b"", sample_u8=b""))
    with pytest.raises(ProtocolError, match="StepOrder"):
        API.decode(foreign)


def test_a_field_added_at_the_end_with_a_default_is_filled_in_for_an_older_sender() -> None:
    class Abort(msgspec.Struct, array_like=True, tag=True):  # the same tag, without `reason`
        key: int

    assert API.decode(msgspec.msgpack.encode(Abort(key=4))).key == 4  # type: ignore[union-attr]


@given(st.binary(max_size=64))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    try:
        message = API.decode(data)
    except ProtocolError as error:
        assert error.field == "message"
    else:
        assert isinstance(message, Submit | Abort | Ask | Drain)


@given(st.data())
def test_a_damaged_message_never_raises_anything_but_a_protocol_error(data: st.DataObject) -> None:
    good = bytearray(API.encode(Abort(key=77, reason="a reason that is long enough")))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] = data.draw(st.integers(0, 255))
    try:
        API.decode(bytes(good))
    except ProtocolError as error:
        assert error.field == "message"
