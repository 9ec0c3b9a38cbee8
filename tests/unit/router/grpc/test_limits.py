"""gRPC messages counted on the wire: what is too much is refused before it is built."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest
from protos.baton.v1 import generation_pb2 as pb
from router.body_limits import MAX_TOKEN_IDS, MAX_VALUES
from router.grpc.limits import MAX_DEPTH, check_size


def check(message):
    check_size(message.SerializeToString(), message.DESCRIPTOR)


def with_ids(*numbers):
    message = pb.GenerateRequest()
    message.token_ids.ids.extend(numbers)
    return message


def test_packed_numbers_are_counted_whatever_their_length():
    check(with_ids(*[1, 300, 70_000, 2**31] * (MAX_TOKEN_IDS // 4)))
    with pytest.raises(InvalidRequest, match=f"ids has more than {MAX_TOKEN_IDS}"):
        check(with_ids(*[300] * (MAX_TOKEN_IDS + 1)))
    tokens = pb.DetokenizeRequest(token_ids=[1] * (MAX_TOKEN_IDS + 1))
    with pytest.raises(InvalidRequest, match="token_ids has more"):
        check(tokens)


def test_fields_are_counted_on_every_level():
    message = pb.GenerateRequest()
    message.stopping.stop.extend(["a"] * (MAX_VALUES - 1))
    check(message)
    message.stopping.stop.append("b")
    with pytest.raises(InvalidRequest, match=f"stop is one of more than {MAX_VALUES}"):
        check(message)
    biases = pb.GenerateRequest()
    for token_id in range(MAX_VALUES):
        biases.sampling.logit_bias[token_id] = 1.0
    with pytest.raises(InvalidRequest, match="more than"):
        check(biases)
    number = pb.ChatRequest.DESCRIPTOR.fields_by_name["messages"].number
    with pytest.raises(InvalidRequest, match="messages is one of more"):
        check_size(bytes([number << 3 | 2, 0]) * 2_000_000, pb.ChatRequest.DESCRIPTOR)
    with pytest.raises(InvalidRequest, match="unknown field is one of"):
        check_size(b"\xf8\x7f\x01" * MAX_VALUES * 2, pb.ChatRequest.DESCRIPTOR)


def test_long_texts_are_no_numbers():
    check(pb.GenerateRequest(text="a" * (4 << 20)))


def peak_bytes(data, kind):
    """Memory that the walk took beyond the message itself."""
    tracemalloc.start()
    try:
        check_size(data, kind.DESCRIPTOR)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_number_without_end_is_not_put_together():
    for begin in (b"", b"\x0a", b"\x08"):  # a tag, a length, a value
        assert peak_bytes(begin + b"\xff" * (1 << 17), pb.GenerateRequest) < 16 << 10


@pytest.mark.parametrize("begin", [b"\xfb\x3e\xfc\x3e", b"\xfb\x3e\x2a\x01\x07\xfc\x3e"])
def test_a_group_hides_nothing_behind_it(begin):
    message = pb.GenerateRequest.FromString(
        begin + pb.GenerateRequest(model="m").SerializeToString()
    )
    assert message.model == "m"  # the parser passes over it
    message.stopping.stop.extend(["a"] * MAX_VALUES)
    data = begin + message.SerializeToString()
    with pytest.raises(InvalidRequest, match="stop is one of more than"):
        check_size(data, pb.GenerateRequest.DESCRIPTOR)


def nested(depth, text):
    """Lists in lists, with a text at the bottom, for a chat template."""
    data = b"\x1a" + varint(len(text)) + text  # Value.string_value
    for _ in range(depth):
        data = b"\x0a" + varint(len(data)) + data  # ListValue.values
        data = b"\x32" + varint(len(data)) + data  # Value.list_value
    data = b"\x0a\x01a\x12" + varint(len(data)) + data  # an entry of Struct.fields
    for head in (b"\x0a", b"\x1a", b"\x22"):  # fields; template_kwargs; chat
        data = head + varint(len(data)) + data
    return data


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def test_depth_costs_neither_stack_nor_memory():
    data = nested(MAX_DEPTH // 2 - 4, b"a" * (1 << 20))
    kwargs = pb.ChatRequest.FromString(data).chat.template_kwargs
    assert kwargs.fields["a"].list_value.values
    assert peak_bytes(data, pb.ChatRequest) < 64 << 10
    with pytest.raises(InvalidRequest, match=f"nested too deeply, the limit is {MAX_DEPTH} levels"):
        check_size(nested(5_000, b"a"), pb.ChatRequest.DESCRIPTOR)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_ends(data):
    check_size(data, pb.GenerateRequest.DESCRIPTOR)
