"""gRPC messages counted on the wire: what is too much is refused before it is built."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest
from protos.baton.v1 import generation_pb2 as pb
from router.body_limits import MAX_TOKEN_IDS, MAX_VALUES
from router.grpc_limits import check_size


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


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_noise_ends(data):
    check_size(data, pb.GenerateRequest.DESCRIPTOR)
