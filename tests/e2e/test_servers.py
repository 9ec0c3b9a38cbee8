"""Both servers of a real cluster of child processes: answers, streams, errors, nobody harmed."""

import json
import socket

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

FRANCE = "<|begin|><|user|>What is the capital of France?<|end|><|assistant|>"


@pytest.fixture()
def stub(local):
    with grpc.insecure_channel(local.grpc) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


def sse(response):
    """Parse a stream; returns the JSON events and whether [DONE] came last."""
    lines = [
        line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")
    ]
    return [json.loads(line) for line in lines[:-1]], lines[-1] == "[DONE]"


def test_an_answer_crosses_two_processes_and_the_bytes_add_up(local):
    reply = local.complete(FRANCE, max_tokens=40).json()
    assert reply["choices"][0]["text"] == "The capital of France is Paris."
    assert reply["choices"][0]["finish_reason"] == "stop"
    timing = reply["timing"]
    assert timing["path"] == "pd" and timing["prefill_pid"] != timing["decode_pid"]
    assert timing["kv_bytes"] == timing["kv_blocks"] * 32768 > 0
    assert reply["usage"]["prompt_tokens"] == 34


def test_stream_and_whole_are_the_same_text_over_both_servers(local, stub):
    whole = local.complete("import os", max_tokens=30, n=2, temperature=0.8, seed=5).json()
    body = {
        "prompt": "import os",
        "max_tokens": 30,
        "n": 2,
        "temperature": 0.8,
        "seed": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{local.url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events, is_done = sse(response)
    assert is_done
    texts = {
        c: "".join(x["text"] for e in events for x in e["choices"] if x["index"] == c)
        for c in (0, 1)
    }
    assert texts == {c["index"]: c["text"] for c in whole["choices"]}
    assert (
        events[-1]["choices"] == []
        and events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    )

    request = pb.GenerateRequest(
        text="import os",
        sampling=pb.SamplingOptions(temperature=0.8, seed=5, n=2),
        stopping=pb.StoppingOptions(max_tokens=30),
    )
    assert {c.index: c.text for c in stub.Generate(request).choices} == texts
    messages = list(stub.GenerateStream(request))
    streamed = {
        c: "".join(
            m.delta.text
            for m in messages
            if m.WhichOneof("event") == "delta" and m.delta.choice == c
        )
        for c in (0, 1)
    }
    assert streamed == texts
    assert [m.WhichOneof("event") for m in messages].count("summary") == 1 and messages[
        -1
    ].HasField("summary")


def test_cached_tokens_and_logprobs_are_reported(local, stub):
    prompt = list(range(1, 70))
    first, second = (local.complete(prompt, logprobs=2).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    logprobs = first["choices"][0]["logprobs"]
    assert (
        len(logprobs["token_logprobs"])
        == 16
        == len(logprobs["top_logprobs"])
        == len(logprobs["text_offset"])
    )
    answer = stub.Generate(
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingOptions(temperature=0),
            response=pb.ResponseOptions(logprobs=2),
        )
    )
    assert [t.logprob for t in answer.choices[0].tokens] == logprobs["token_logprobs"]


def test_stop_strings_and_stop_reason(local):
    plain = local.complete("def main(", max_tokens=30).json()["choices"][0]["text"]
    reply = local.complete("def main(", max_tokens=30, stop=[plain[5:8]]).json()["choices"][0]
    assert reply["text"] == plain[: plain.index(plain[5:8])] and reply["stop_reason"] == plain[5:8]


BAD_BODIES = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -3}, "top_k"),
    ({"top_k": 10**9}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 1000000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"min_tokens": 99}, "min_tokens"),
    ({"seed": 2**70}, "seed"),
    ({"logprobs": 99}, "logprobs"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["x" * 300]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"stream": "yes"}, "stream"),
    ({"suffix": "end"}, "suffix"),
    ({"echo": 1}, "echo"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"logit_bias": {"x": 5}}, "logit_bias"),
    ({"logit_bias": {"1": 500}}, "logit_bias"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"best_of": 3}, "best_of"),
    ({"guided_json": {}}, "guided_json"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"cache_salt": "\n"}, "cache_salt"),
    ({"request_id": "x" * 200}, "request_id"),
    ({"request_id": "a\nb"}, "request_id"),
    ({"request_id": "日本"}, "request_id"),
    ({"stop": ["\ud800"]}, "stop"),
]


@pytest.mark.parametrize(
    ("fields", "name"), BAD_BODIES, ids=[json.dumps(b)[:40] for b, _ in BAD_BODIES]
)
def test_a_bad_field_is_named(local, fields, name):
    reply = local.complete(**{"prompt": "x", **fields})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"] == name and name in error["message"]
    assert reply.headers["x-should-retry"] == "false"


RAW = {
    "not json": b"{nonsense",
    "empty": b"",
    "a list": b"[1]",
    "truncated": b'{"prompt": "x", "max_tok',
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "top_p": Infinity}',
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "surrogate": b'{"prompt": "\\ud800"}',
    "not utf-8": b'{"prompt": "\xff\xfe"}',
    "huge number": b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", RAW)
def test_a_broken_body_is_a_400(local, kind):
    reply = httpx.post(f"{local.url}/v1/completions", content=RAW[kind], timeout=20)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_sizes_have_limits(local, stub):
    too_large = httpx.post(
        f"{local.url}/v1/completions",
        content=b'{"prompt": "' + b"a" * (5 << 20) + b'"}',
        timeout=20,
    )
    assert too_large.status_code == 413
    too_long = local.complete("a" * 1_000_000)
    assert (
        too_long.status_code == 400
        and too_long.json()["error"]["code"] == "context_length_exceeded"
    )
    assert "maximum context length is 2048 tokens" in too_long.json()["error"]["message"]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(text="a" * (5 << 20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unknown_model_route_and_method(local, stub):
    reply = local.complete(model="gpt-17")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{local.url}/v1/nothing").json()["error"]["code"] == "unsupported_endpoint"
    assert httpx.get(f"{local.url}/v1/completions").status_code == 405
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(text="x", model="gpt-17"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_unknown_fields_are_reported(local):
    reply = local.complete(user="me", flavour="sweet", metadata={"a": 1})
    assert reply.status_code == 200 and reply.headers["x-baton-ignored-params"] == "flavour"


def test_hostile_names_cannot_break_a_header_or_an_error(local):
    reply = local.complete(**{"a\r\nx-evil: 1": 1, "日本": 2})
    assert reply.status_code == 200 and "x-evil" not in reply.headers
    assert reply.headers["x-baton-ignored-params"] == "a??x-evil: 1,??"
    assert local.complete(**{"\ud800": 3}).status_code == 400
    assert local.complete(model="\ud800日本\n").status_code == 404


def test_a_choice_that_ends_early_does_not_hold_back_the_others(local):
    """More positions than the credit, while another choice has long ended."""
    reply = local.complete(
        "import os", n=8, temperature=1.0, seed=3, max_tokens=700, stop=["import", "self"]
    )
    choices = reply.json()["choices"]
    lengths = [len(c["text"]) for c in choices]
    assert reply.status_code == 200 and min(lengths) < 200 and max(lengths) > 300, lengths


def test_grpc_errors_carry_details(local, stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(
            pb.GenerateRequest(text="x", sampling=pb.SamplingOptions(temperature=float("nan")))
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    details = rpc_status.from_call(caught.value).details
    assert any(d.Unpack(bad) for d in details if d.Is(bad.DESCRIPTOR))
    assert bad.field_violations[0].field == "temperature"
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest())
    assert "input is missing" in caught.value.details()


def test_garbage_on_the_grpc_port_harms_nobody(local, stub):
    with grpc.insecure_channel(local.grpc) as channel:
        call = channel.unary_unary("/baton.v1.Generation/Generate")
        with pytest.raises(grpc.RpcError):
            call(b"\x0a\xff\xff\xff\xff\x0f truncated", timeout=5)
    host, port = local.grpc.split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"\x00" * 1000)
    assert stub.ListModels(pb.ListModelsRequest()).models[0].id == "baton-tiny"


def test_deadline_duplicate_id_and_abort(local, stub):
    long = pb.GenerateRequest(
        request_id="twin", text="x", stopping=pb.StoppingOptions(max_tokens=1500, ignore_eos=True)
    )
    running = stub.GenerateStream(long)
    next(running)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(long)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert stub.Abort(pb.AbortRequest(request_id="twin")).outcome == pb.ABORT_OUTCOME_ABORTED
    with pytest.raises(grpc.RpcError) as caught:
        list(running)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert stub.Abort(pb.AbortRequest(request_id="twin")).outcome == pb.ABORT_OUTCOME_NOT_RUNNING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(long, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_request_id_may_be_used_again_once_it_has_ended(local):
    replies = [local.complete("import os", request_id="again", max_tokens=4) for _ in range(3)]
    assert [r.status_code for r in replies] == [200] * 3 and len(
        {r.json()["choices"][0]["text"] for r in replies}
    ) == 1


ODD_TYPES = [
    "text/plain",
    "application/xml",
    "multipart/form-data; boundary=x",
    "application/json; charset=utf-16",
    "",
    "\x80",
]


@pytest.mark.parametrize("kind", ODD_TYPES)
def test_content_types_that_lie(local, kind):
    for data in (
        b'{"prompt": "ab", "max_tokens": 1}',
        b"<a/>",
        b"\xff\xfe{\x00}\x00",
        b"--x\r\n\r\n--x--",
        b"prompt=ab",
    ):
        reply = httpx.post(
            f"{local.url}/v1/completions",
            content=data,
            headers={"content-type": kind.encode("latin1")},
        )
        assert reply.status_code in ((200,) if data.startswith(b"{") else (400,)), (
            kind,
            data,
            reply.text,
        )
