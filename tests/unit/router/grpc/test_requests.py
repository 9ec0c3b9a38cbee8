"""Requests over gRPC: what they must have, and what names them."""

import math
from types import SimpleNamespace

import pytest

from core.errors import (
    InvalidRequest,
)
from protos.baton.v1 import generation_pb2 as pb
from router.grpc.requests import chat_prompt, generate_params

ALLOWED = ("enable_thinking",)


def test_grpc_requests_without_what_they_need():
    with pytest.raises(InvalidRequest, match="input is missing"):
        generate_params(pb.GenerateRequest(), None)
    talk = [pb.ChatMessage(role="user", content="x", name="me")]
    with pytest.raises(InvalidRequest, match="messages is empty"):
        chat_prompt([], pb.ChatOptions(), ALLOWED, False)
    both = pb.ChatOptions(continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InvalidRequest, match="exclude each other"):
        chat_prompt(talk, both, ALLOWED, False)
    assert chat_prompt(talk, pb.ChatOptions(), ALLOWED, False).messages == [
        {"role": "user", "content": "x", "name": "me"}
    ]
    odd = pb.ChatOptions()
    for number in (math.nan, math.inf):
        odd.template_kwargs.fields[ALLOWED[0]].number_value = number
        with pytest.raises(InvalidRequest, match="template_kwargs is no JSON"):
            chat_prompt(talk, odd, ALLOWED, False)
    odd.template_kwargs.Clear()
    odd.template_kwargs.update({"evil": 1})
    with pytest.raises(InvalidRequest, match="evil"):
        chat_prompt(talk, odd, ALLOWED, False)


@pytest.mark.parametrize(("own", "request_id"), [("", "k-1"), ("own", "own")])
def test_over_grpc_too_a_key_names_a_request_and_a_trace_does_not(own, request_id):
    metadata = [("idempotency-key", "k-1"), ("x-request-id", "a-click")]
    context = SimpleNamespace(invocation_metadata=lambda: metadata, time_remaining=lambda: None)
    wish = generate_params(pb.GenerateRequest(text="x", request_id=own), context)
    assert (wish.request_id, wish.correlation_id) == (request_id, "a-click")
    metadata[:] = [("x-request-id", "k" * 129)]
    odd = generate_params(pb.GenerateRequest(text="x"), context)
    assert (odd.request_id, odd.correlation_id) == ("", "")


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (pb.CACHE_RETENTION_UNSPECIFIED, ""),
        (pb.CACHE_RETENTION_IN_MEMORY, "in_memory"),
        (pb.CACHE_RETENTION_24H, "24h"),
        (7, "7"),
    ],
)
def test_hints_of_the_cache_are_read(retention, expected):
    context = SimpleNamespace(invocation_metadata=tuple, time_remaining=lambda: None)
    options = pb.PromptOptions(
        prompt_cache_key="k", session_id="s", prompt_cache_retention=retention
    )
    params = generate_params(pb.GenerateRequest(text="x", prompt=options), context)
    assert (params.prompt_cache_key, params.session_id) == ("k", "s")
    assert params.prompt_cache_retention == expected
