"""Every field of both servers, 20,000 wrong and odd values: 4xx that names the field,
never 5xx, nobody harmed.

A fifth of them in `make test`, others every day.
"""

import http.client
import itertools
import json
import os
import threading
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support.process_cluster import is_long
from support.samples import SEED
from support.up import idle

from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc
from router.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    TokenizeChatBody,
)
from router.http.other_fields import FREE, OFF, RENAMED

SHARE = float(os.environ.get("FUZZ_SHARE", "1" if is_long() else "0.2"))
HTTP_CASES, GRPC_CASES, PER_EXAMPLE = int(16_000 * SHARE), int(4_800 * SHARE), 8
count = {"http": 0, "grpc": 0, "refused": 0, "answered": 0}

# In-range numbers are small, so that a valid case costs a step or two and not a thousand.
NUMBERS = st.sampled_from(
    [
        -(2**70),
        -(2**63),
        -(2**31),
        -101,
        -3,
        -2,
        -1,
        0,
        1,
        2,
        3,
        5,
        8,
        9,
        17,
        21,
        96,
        97,
        255,
        256,
        270,
        300,
        4097,
        2**31,
        2**32,
        2**53 + 1,
        2**63,
        2**64,
        10**30,
        0.0,
        -0.0,
        0.1,
        0.5,
        0.999,
        1.0,
        1.5,
        2.0,
        2.5,
        1e-9,
        -1e-9,
        1e9,
        1e300,
        -1e300,
        5e-324,
        float("nan"),
        float("inf"),
        float("-inf"),
    ]
)
HOSTILE = st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "\ud800",
        "a\ud800b",
        "\n",
        "\r\nx-evil: 1",
        "\u202e",
        "日本",
        "{{ 7*7 }}",
        "{% for x in range(9**9) %}{% endfor %}",
        "{{ ''.__class__ }}",
        "<|begin|>",
        "<|end|>",
        "'; DROP TABLE",
        "../../etc/passwd",
        "%s%n",
        "a" * 300,
        "é" * 200,
        "token_id:3",
        "9" * 40,
        "-1",
        "NaN",
        "true",
        "null",
    ]
)
TEXTS = st.one_of(HOSTILE, st.text(max_size=12), st.text(alphabet=st.characters(), max_size=4))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.one_of(
        JUNK,
        st.fixed_dictionaries(
            {
                "role": st.one_of(st.sampled_from(["user", "system", "tool"]), SCALARS),
                "content": JUNK,
            }
        ),
    ),
    max_size=3,
)
KNOWN = [*OFF, *FREE, *RENAMED]
TALK = [{"role": "user", "content": "ab"}]
PLACES = {
    "/v1/completions": ({"prompt": "ab", "max_tokens": 1}, [*CompletionBody.model_fields, *KNOWN]),
    "/v1/chat/completions": ({"messages": TALK, "max_tokens": 1}, [*ChatBody.model_fields, *KNOWN]),
    "/tokenize": ({"prompt": "ab"}, [*TokenizeBody.model_fields]),
    "/detokenize": ({"tokens": [97]}, [*DetokenizeBody.model_fields]),
}
TOKENIZE_CHAT = ({"messages": TALK}, [*TokenizeChatBody.model_fields])


@st.composite
def requests(draw):
    """A valid body with one or two fields made odd."""
    path = draw(
        st.sampled_from(
            ["/v1/completions"] * 4
            + ["/v1/chat/completions"] * 4
            + ["/tokenize", "/tokenize", "/detokenize"]
        )
    )
    base, fields = PLACES[path]
    if path == "/tokenize" and draw(st.booleans()):
        base, fields = TOKENIZE_CHAT
    body, changed = dict(base), []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(fields))
        body[name] = draw(MESSAGES if name == "messages" else JUNK)
        changed.append(name)
    return path, body, changed


# A value may be wrong only beside another field: then either of the two is named.
PARTNERS = {
    "max_tokens": {"min_tokens"},
    "max_completion_tokens": {"min_tokens", "max_tokens"},
    "logprobs": {"top_logprobs", "prompt_logprobs"},
    "echo": {"max_tokens", "prompt_logprobs"},
    "stream": {"stream_options"},
    "add_generation_prompt": {"continue_final_message"},
    "messages": {"continue_final_message", "prompt"},
    "prompt": {"truncate_prompt_tokens"},
    "chat_template_kwargs": {"messages"},
    "reasoning_effort": {"messages", "prompt"},
    "allowed_token_ids": {"prompt"},
    "add_special_tokens": {"prompt"},
}


def check_http(connection, path, body, changed):
    data = json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text = reply.read()
    count["http"] += 1
    assert reply.status < 500, (path, body, text)
    if reply.status == 200:
        count["answered"] += 1
        assert b'"error"' not in text or not body.get("stream"), (path, body, text)
        return
    count["refused"] += 1
    error = json.loads(text)["error"]
    assert (
        error["message"]
        and error["type"] == "invalid_request_error"
        and reply.headers["x-should-retry"] == "false"
    )
    if error["code"] == "invalid_value":
        root = error["param"].partition("[")[0].partition(".")[0]
        allowed = set(changed) | {p for name in changed for p in PARTNERS.get(name, ())}
        assert root in allowed, (path, body, error)
    else:
        assert error["code"] in (
            "model_not_found",
            "context_length_exceeded",
            "duplicate_request",
        ), (path, body, error)


@pytest.fixture(scope="module")
def neighbour(local):
    """Somebody else's requests go on all the while, and get the same answer every time."""
    expected = local.complete("def main(", max_tokens=12).json()["choices"][0]["text"]
    is_over, seen = threading.Event(), []

    def ask():
        while not is_over.wait(0.25):
            seen.append(local.complete("def main(", max_tokens=12).json()["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    pids = sorted(r["pid"] for r in local.status())
    yield
    is_over.set()
    thread.join()
    assert len(seen) > 50 * SHARE and set(seen) == {expected}
    assert sorted(r["pid"] for r in local.status()) == pids, "a worker died"
    assert idle(local) is True


QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.sampled(2)
@pytest.mark.timeout(600)
def test_http_bodies(local, neighbour):
    # It connects with the first case: one that waited silently for the first cases to be drawn was
    # cut by the server, beside load.
    connection = http.client.HTTPConnection(local.url.removeprefix("http://"), timeout=20)

    @settings(max_examples=HTTP_CASES // PER_EXAMPLE, **QUIET)
    @given(st.lists(requests(), min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
    def all_of(cases):
        for path, body, changed in cases:
            check_http(connection, path, body, changed)

    for number in itertools.count():
        seed(SEED + number)(all_of)()
        if count["http"] >= HTTP_CASES:
            break
    assert min(count["refused"], count["answered"]) > 1000 * SHARE, count


INTS = st.sampled_from([0, 1, 2, 3, 8, 9, 21, 97, 256, 270, 300, 5000, 2**31 - 1, 2**32 - 1])
DOUBLES = st.sampled_from(
    [
        -1e300,
        -101.0,
        -2.5,
        -1.0,
        -0.0,
        0.0,
        1e-9,
        0.5,
        1.0,
        1.5,
        3.0,
        101.0,
        1e300,
        float("nan"),
        float("inf"),
    ]
)
STRINGS = TEXTS.filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t))
FIELDS = [
    *(
        ("sampling", field.name, DOUBLES)
        for field in pb.SamplingOptions.DESCRIPTOR.fields
        if field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT)
    ),
    ("sampling", "top_k", INTS),
    ("sampling", "n", INTS),
    ("sampling", "seed", st.sampled_from([0, 1, 2**63, 2**64 - 1])),
    ("stopping", "max_tokens", st.sampled_from([0, 1, 2, 5000, 2**32 - 1])),
    ("stopping", "min_tokens", INTS),
    ("stopping", "ignore_eos", st.booleans()),
    ("stopping", "include_stop", st.booleans()),
    ("response", "logprobs", INTS),
    ("response", "prompt_logprobs", INTS),
    ("prompt", "truncate_tokens", st.sampled_from([-2, -1, 0, 1, 2, 3000])),
    ("prompt", "cache_salt", STRINGS),
    ("prompt", "prompt_cache_key", STRINGS),
    ("prompt", "session_id", STRINGS),
    ("prompt", "prompt_cache_retention", st.sampled_from([0, 1, 2, 7])),
    (None, "request_id", STRINGS),
    (None, "model", STRINGS),
]
FINE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS"}


@st.composite
def calls(draw):
    """One call of each kind, with a few fields made odd."""
    kind = draw(st.sampled_from(["Generate", "GenerateStream", "Chat", "Tokenize", "Detokenize"]))
    if kind == "Detokenize":
        return kind, pb.DetokenizeRequest(
            model=draw(st.sampled_from(["", "x"])), token_ids=draw(st.lists(INTS, max_size=4))
        )
    messages = [
        pb.ChatMessage(role=draw(STRINGS), content=draw(STRINGS))
        for _ in range(draw(st.integers(0, 2)))
    ]
    if kind == "Tokenize":
        if draw(st.booleans()):
            return kind, pb.TokenizeRequest(
                text=draw(STRINGS), add_special_tokens=draw(st.booleans())
            )
        return kind, pb.TokenizeRequest(conversation=pb.Conversation(messages=messages))
    if kind == "Chat":
        request: Any = pb.ChatRequest(messages=messages)
        if draw(st.booleans()):
            variables = Struct()
            variables.update(
                {
                    draw(st.sampled_from(["enable_thinking", "evil", ""])): draw(
                        st.sampled_from([1, None, "x", [1]])
                    )
                }
            )
            request.chat.template_kwargs.CopyFrom(variables)
        if draw(st.booleans()):
            request.chat.continue_final_message = draw(st.booleans())
    else:
        request = pb.GenerateRequest()
        if draw(st.booleans()):
            request.text = draw(STRINGS)
        else:
            request.token_ids.ids.extend(draw(st.lists(INTS, max_size=4)))
        request.stopping.stop.extend(draw(st.lists(STRINGS, max_size=2)))
        request.stopping.stop_token_ids.extend(draw(st.lists(INTS, max_size=2)))
        request.sampling.bad_words.extend(draw(st.lists(STRINGS, max_size=1)))
        request.sampling.allowed_token_ids.extend(draw(st.lists(INTS, max_size=1)))
        if draw(st.booleans()):
            request.sampling.logit_bias[draw(INTS)] = draw(DOUBLES)
    request.stopping.max_tokens = 1
    for _ in range(draw(st.integers(0, 2))):
        group, name, values = draw(st.sampled_from(FIELDS))
        setattr(getattr(request, group) if group else request, name, draw(values))
    return kind, request


@pytest.mark.timeout(600)
def test_grpc_messages(local, neighbour):
    with grpc.insecure_channel(local.grpc) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)

        @settings(max_examples=GRPC_CASES // PER_EXAMPLE, **QUIET)
        @given(st.lists(calls(), min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
        def all_of(cases):
            for kind, request in cases:
                count["grpc"] += 1
                code, details = "OK", ""
                try:
                    answer = getattr(stub, kind)(request, timeout=20)
                    if kind in ("GenerateStream", "Chat"):
                        list(answer)
                except grpc.RpcError as error:
                    code, details = error.code().name, error.details()
                assert code in FINE, (kind, request, code, details)
                assert code == "OK" or details, (kind, request, code)

        for number in itertools.count():
            seed(SEED + number)(all_of)()
            if count["grpc"] >= GRPC_CASES:
                break
