"""The generated gRPC client, unchanged, on Ray and on child processes."""

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from support.golden import ASK, PARIS

from core.types import PHASES
from protos.baton.v1 import generation_pb2 as pb


def test_grpc_chat_tokenize_detokenize(stub):
    messages = [pb.ChatMessage(role="user", content=ASK[0]["content"])]
    greedy = pb.SamplingOptions(temperature=0)
    events = list(
        stub.Chat(
            pb.ChatRequest(
                messages=messages, sampling=greedy, response=pb.ResponseOptions(timing=True)
            )
        )
    )
    assert "".join(e.delta.text for e in events) == PARIS
    assert events[-1].summary.usage.prompt_tokens == 34
    t = events[-1].summary.timing
    assert abs(sum(getattr(t, f"{p}_s") for p in PHASES) - t.e2e_s) < 1e-9 and t.path == "pd"
    made = stub.Tokenize(pb.TokenizeRequest(conversation=pb.Conversation(messages=messages)))
    assert len(made.token_ids) == 34 and made.max_model_len == 2048
    plain = stub.Tokenize(pb.TokenizeRequest(text="héllo"))
    assert bytes(plain.token_ids).decode() == "héllo" and len(plain.tokens) == 6
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=plain.token_ids)).text == "héllo"
    variables = Struct()
    variables.update({"evil": 1})
    for bad, field in (
        (pb.ChatRequest(), "messages"),
        (
            pb.ChatRequest(messages=messages, chat=pb.ChatOptions(template_kwargs=variables)),
            "template_kwargs",
        ),
    ):
        with pytest.raises(grpc.RpcError, match=field) as caught:
            list(stub.Chat(bad))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError, match="tokens has id 999"):
        stub.Detokenize(pb.DetokenizeRequest(token_ids=[999]))


def test_grpc_presence_zero_is_zero_and_absent_is_the_default(stub):
    def ask(**sampling):
        request = pb.GenerateRequest(
            text="import os",
            sampling=pb.SamplingOptions(seed=4, **sampling),
            stopping=pb.StoppingOptions(max_tokens=20),
        )
        return stub.Generate(request).choices[0].text

    assert ask() == ask(temperature=1.0) != ask(temperature=0.0)
    assert ask(temperature=0, logit_bias={97: 100.0}) == "a" * 20
    scored = stub.Generate(
        pb.GenerateRequest(text="abc", response=pb.ResponseOptions(prompt_logprobs=0))
    )
    assert [t.token_id for t in scored.prompt.tokens] == list(b"bc") and scored.prompt.tokens[
        0
    ].logprob < 0
    with pytest.raises(grpc.RpcError, match="min_p"):
        ask(min_p=1.5)


def test_grpc_trailers_carry_the_id_and_on_failure_the_usage(stub, up):
    call = stub.GenerateStream(
        pb.GenerateRequest(
            request_id=f"trail-{up.kind}",
            text="x",
            stopping=pb.StoppingOptions(max_tokens=1500, ignore_eos=True),
        )
    )
    for _ in range(5):
        next(call)
    stub.Abort(pb.AbortRequest(request_id=f"trail-{up.kind}"))
    with pytest.raises(grpc.RpcError):
        list(call)
    trailers = dict(call.trailing_metadata())
    usage = pb.Usage.FromString(trailers["baton-usage-bin"])
    assert (
        trailers["x-request-id"] == f"trail-{up.kind}"
        and usage.completion_tokens >= 5
        and usage.prompt_tokens == 1
    )
    assert "grpc-status-details-bin" in trailers
    _, good = stub.Generate.with_call(
        pb.GenerateRequest(text="x"), metadata=(("x-request-id", f"meta-{up.kind}"),)
    )
    assert dict(good.trailing_metadata())["x-request-id"] == f"meta-{up.kind}"
