"""The real `openai` client and the generated gRPC client, unchanged, on Ray and on child processes.

Owns the answers in bytes that are on file (`golden/`), and what these clients make of them.
"""

import asyncio
import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from google.protobuf.struct_pb2 import Struct
from support.up import Up

from core.types import PHASES, TTFT_PHASES
from protos.baton.v1 import generation_pb2 as pb
from protos.baton.v1 import generation_pb2_grpc

GOLDEN = Path(__file__).parent / "golden"
ASK = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
MODEL = "baton-tiny"


@pytest.fixture(scope="module", params=["local", "ray"])
def up(request):
    if request.param == "local":
        yield request.getfixturevalue("local")
        return
    cluster = Up(BATON_PLACEMENT__PATH="pd")
    yield cluster
    code, left = cluster.end()
    assert code == 0
    assert not left


@pytest.fixture()
def client(up):
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture()
def stub(up):
    with grpc.insecure_channel(up.grpc) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


# --- the openai client ----------------------------------------------------------------------------


def test_chat_whole_and_streamed(client):
    whole = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == PARIS
    assert choice.finish_reason == "stop"
    assert whole.object == "chat.completion"
    assert whole.id.startswith("chatcmpl-")
    assert whole.system_fingerprint
    assert whole.usage.prompt_tokens == 34
    assert whole.usage.total_tokens == 34 + whole.usage.completion_tokens

    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *deltas, last = chunks
    assert [c.choices[0].delta.role for c in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(c.choices[0].delta.content or "" for c in deltas) == PARIS
    assert deltas[-1].choices[0].finish_reason == "stop"
    assert all(c.usage is None for c in deltas)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


def test_chat_forms_of_content_and_system_messages(client):
    parts = [
        {"type": "text", "text": "What is the capital"},
        {"type": "text", "text": "of France?"},
    ]
    as_parts = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=1
    )
    assert as_parts.usage.prompt_tokens == 34
    longer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "system", "content": "Brief."}, *ASK], max_tokens=1
    )
    assert longer.usage.prompt_tokens == 34 + 2 + len("Brief.")
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(openai.BadRequestError, match="only text is served"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": image}])
    going_on = client.chat.completions.create(
        model=MODEL,
        messages=[*ASK, {"role": "assistant", "content": "The capital of"}],
        temperature=0,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert going_on.choices[0].message.content == " France is Paris."


def test_completion_prompts_in_all_forms(client):
    text = "def main("
    ids = list(text.encode())
    forms = {
        "text": text,
        "ids": ids,
        "texts": [text, "import os"],
        "id lists": [ids, list(b"import os")],
    }
    out = {
        name: client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
        for name, prompt in forms.items()
    }
    first = out["text"].choices[0].text
    assert out["ids"].choices[0].text == first
    for name in ("texts", "id lists"):
        assert [c.index for c in out[name].choices] == [0, 1]
        assert out[name].choices[0].text == first
        assert out[name].usage.prompt_tokens == 18
        assert out[name].usage.completion_tokens == 24
    chunks = client.completions.create(
        model=MODEL, prompt=[text, "import os"], n=2, max_tokens=12, temperature=0, stream=True
    )
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    second = out["texts"].choices[1].text
    assert texts == {0: first, 1: first, 2: second, 3: second}


def test_echo_and_prompt_log_probabilities(client):
    asked = {"model": MODEL, "prompt": "def main(", "temperature": 0, "logprobs": 2}
    plain = client.completions.create(**asked, max_tokens=4).choices[0]
    echoed = client.completions.create(**asked, max_tokens=4, echo=True).choices[0]
    assert echoed.text == "def main(" + plain.text
    assert echoed.logprobs.tokens == [*"def main(", *plain.logprobs.tokens]
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[9:] == plain.logprobs.token_logprobs
    assert echoed.logprobs.text_offset == list(range(13))
    assert plain.logprobs.text_offset == list(range(4))
    only = client.completions.create(**asked, max_tokens=0, echo=True)
    assert only.choices[0].text == "def main("
    assert only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs == echoed.logprobs.token_logprobs[:9]
    streamed = list(client.completions.create(**asked, max_tokens=4, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == echoed.text
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [p for piece in pieces for p in piece.token_logprobs] == echoed.logprobs.token_logprobs
    assert [p for piece in pieces for p in piece.text_offset] == echoed.logprobs.text_offset


def test_chat_log_probabilities_whole_and_streamed(client):
    asked = {
        "model": MODEL,
        "messages": ASK,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 8,
    }
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(content) == 8
    assert bytes(b for t in content for b in t.bytes).decode() == PARIS[:8]
    best = [(t.top_logprobs[0].token, t.top_logprobs[0].logprob) for t in content]
    assert best == [(t.token, t.logprob) for t in content]
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == content


def test_parameters_in_vllms_spelling(client):
    def complete(**extra):
        return client.completions.create(
            model=MODEL, prompt="import os", max_tokens=16, temperature=0, extra_body=extra
        )

    plain = complete().choices[0]
    assert complete(top_k=1, temperature=2.0).choices[0].text == plain.text
    assert complete(min_p=1.0, temperature=2.0).choices[0].text == plain.text
    assert complete(repetition_penalty=3.0).choices[0].text != plain.text
    stopped = complete(stop=[plain.text[3:6]], include_stop_str_in_output=True).choices[0]
    assert stopped.text == plain.text[:6]
    with_ids = complete(return_token_ids=True).choices[0]
    assert bytes(with_ids.token_ids).decode() == plain.text
    assert bytes(with_ids.prompt_token_ids) == b"import os"
    stop_at = with_ids.token_ids[4]
    until = complete(stop_token_ids=[stop_at], return_token_ids=True).choices[0]
    assert until.text == plain.text[: with_ids.token_ids.index(stop_at)]
    assert until.stop_reason == stop_at
    assert until.token_ids[-1] == stop_at
    assert complete(truncate_prompt_tokens=2).usage.prompt_tokens == 2
    assert len(complete(prompt_logprobs=1).choices[0].prompt_logprobs) == len("import os")
    assert set(complete(allowed_token_ids=[97, 98]).choices[0].text) <= set("ab")
    assert plain.text[:3] not in complete(bad_words=[plain.text[:3]]).choices[0].text
    salted = [complete(cache_salt=salt, prompt="x" * 64) for salt in ("mine", "mine", "yours")]
    assert [r.usage.prompt_tokens_details.cached_tokens for r in salted] == [0, 48, 0]


def test_models_and_headers(client, up):
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-17")
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=ASK,
        extra_headers={"x-request-id": "a-click", "idempotency-key": f"mine-{up.kind}"},
        extra_body={"flavour": 1},
        user="me",
    )
    assert raw.headers["x-request-id"] == "a-click"
    assert raw.headers["x-baton-ignored-params"] == "flavour"
    assert raw.parse().id == f"chatcmpl-mine-{up.kind}"
    assert [part.split(";")[0] for part in raw.headers["server-timing"].split(", ")] == list(PHASES)


def test_errors_are_the_clients_own_classes_and_are_not_repeated(up):
    sent = []
    http = httpx.Client(event_hooks={"request": [sent.append]})
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=3, http_client=http)
    cases = [
        (openai.BadRequestError, {"temperature": 3000}, "temperature", "invalid_value"),
        (openai.BadRequestError, {"max_tokens": 5000}, None, "context_length_exceeded"),
        (
            openai.BadRequestError,
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
            "invalid_value",
        ),
        (
            openai.BadRequestError,
            {"response_format": {"type": "json_object"}},
            "response_format",
            "invalid_value",
        ),
        (openai.NotFoundError, {"model": "gpt-17"}, None, "model_not_found"),
    ]
    for kind, fields, param, code in cases:
        sent.clear()
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": ASK, **fields})
        assert (caught.value.param, caught.value.code, len(sent)) == (param, code, 1)


def test_a_stream_that_fails_ends_with_an_error_the_client_raises(client, stub, up):
    chunks = client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True, "request_id": f"cut-{up.kind}"},
    )
    next(chunks)
    reply = stub.Abort(pb.AbortRequest(request_id=f"cut-{up.kind}"))
    assert reply.outcome == pb.ABORT_OUTCOME_ABORTED
    with pytest.raises(openai.APIError, match="aborted"):
        list(chunks)


async def test_the_async_client_many_at_once(up):
    async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="none") as client:

        async def stream():
            chunks = await client.chat.completions.create(
                model=MODEL, messages=ASK, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in chunks])

        whole = [
            client.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
            for _ in range(8)
        ]
        answers = await asyncio.gather(*whole, *(stream() for _ in range(8)))
    texts = [a if isinstance(a, str) else a.choices[0].message.content for a in answers]
    assert texts == [PARIS] * 16


GOLDEN_REQUESTS = {
    "chat": ("/v1/chat/completions", {"messages": ASK, "temperature": 0, "max_tokens": 3}),
    "chat_stream": (
        "/v1/chat/completions",
        {
            "messages": ASK,
            "temperature": 0,
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "chat_logprobs": (
        "/v1/chat/completions",
        {"messages": ASK, "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 1},
    ),
    "completion": (
        "/v1/completions",
        {"prompt": "import os", "temperature": 0, "max_tokens": 2, "logprobs": 1, "echo": True},
    ),
    "completion_stream": (
        "/v1/completions",
        {"prompt": "import os", "temperature": 0, "max_tokens": 2, "stream": True},
    ),
    "error": ("/v1/completions", {"prompt": "import os", "top_p": 7}),
}


@pytest.mark.parametrize("name", GOLDEN_REQUESTS)
def test_the_bytes_are_those_on_file(up, name):
    """What differs between runs is masked: ids, instants, fingerprints, log probabilities."""
    path, body = GOLDEN_REQUESTS[name]
    text = httpx.post(up.url + path, json=body).text
    text = re.sub(r'("id":"\w+-)[^"]*', r"\1ID", text)
    text = re.sub(r'("created":)\d+', r"\g<1>0", text)
    text = re.sub(r"fp_[0-9a-f]+", "fp_0", text)
    text = re.sub(r"-\d+\.\d+(e-\d+)?", "-1.5", text)
    # How many tokens share a chunk depends on the moment: neighbours of one choice are joined.
    pattern = r'("content":|"text":)"([^"]+)"([^\n]*)\n\ndata: \{[^\n]*?\1"([^"]+)"[^\n]*(?=\n)'
    while (joined := re.sub(pattern, r'\1"\2\4"\3', text)) != text:
        text = joined
    text = re.sub(r'("cached_tokens":)\d+', r"\g<1>0", text)
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), (
        f"{name} changed; if that is meant, run with WRITE_GOLDEN=1 and read the difference"
    )


# --- timing ---------------------------------------------------------------------------------------


def sums_of(histogram, exposition):
    """The sum of each series of a histogram."""
    pattern = rf"^{histogram}_sum(?:\{{.*\}})? (\S+)$"
    return [float(x) for x in re.findall(pattern, exposition, re.M)]


def test_the_phases_add_up_everywhere(up, client):
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=ASK,
        temperature=0,
        extra_headers={"x-baton-timing": "1", "idempotency-key": f"sum-{up.kind}"},
    )
    timing = json.loads(raw.text if isinstance(raw.text, str) else raw.text())["timing"]
    assert abs(sum(timing[f"{p}_ms"] for p in TTFT_PHASES) - timing["ttft_ms"]) < 0.01
    assert abs(sum(timing[f"{p}_ms"] for p in PHASES) - timing["e2e_ms"]) < 0.01
    assert timing["path"] == "pd"
    assert timing["attempts"] == ["0:pd:ok"]
    assert timing["prefill_pid"] != timing["decode_pid"]
    metrics = httpx.get(f"{up.url}/metrics").text
    phases_s = sums_of("baton_request_phase_seconds", metrics)
    (e2e_s,) = sums_of("baton_e2e_seconds", metrics)
    assert len(phases_s) == len(PHASES)
    assert abs(sum(phases_s) - e2e_s) < 1e-6 * max(1, e2e_s)
    if up.kind == "local":  # on Ray the routers' standard error is in Ray's log files
        line = up.logged(f"sum-{up.kind}")
        assert line["path"] == "pd"
        assert line["outcome"] == "finished"
        assert line["attempts"] == ["0:pd:ok"]
        assert abs(sum(line["phases_ms"].values()) - line["e2e_ms"]) < 0.02
        assert "France" not in json.dumps(line)


# --- vLLM's endpoints -----------------------------------------------------------------------------


def test_tokenize_detokenize_load_and_offline_docs(up):
    text = "naïve 日本"
    asked = {"prompt": text, "return_token_strs": True}
    reply = httpx.post(f"{up.url}/tokenize", json=asked).json()
    assert reply["tokens"] == list(text.encode())
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    back = httpx.post(f"{up.url}/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back == {"prompt": text}
    chat = httpx.post(f"{up.url}/tokenize", json={"messages": ASK}).json()
    assert chat["count"] == 34
    assert chat["max_model_len"] == 2048
    load = httpx.get(f"{up.url}/load").json()
    assert load["server_load"] == 0
    assert load["pools"]["prefill"]["replicas"] == 1
    page = httpx.get(f"{up.url}/docs").text
    urls = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert urls
    assert all(url.startswith("/") for url in urls)
    assert all(httpx.get(up.url + url).status_code == 200 for url in urls)
    paths = httpx.get(f"{up.url}/openapi.json").json()["paths"]
    content = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    assert "min_p" in schema["properties"]
    assert "messages" in schema["required"]


# --- the generated gRPC client --------------------------------------------------------------------


def test_grpc_chat_tokenize_detokenize(stub):
    messages = [pb.ChatMessage(role="user", content=ASK[0]["content"])]
    greedy = pb.SamplingOptions(temperature=0)
    timed = pb.ResponseOptions(timing=True)
    asked = pb.ChatRequest(messages=messages, sampling=greedy, response=timed)
    events = list(stub.Chat(asked))
    assert "".join(e.delta.text for e in events) == PARIS
    summary = events[-1].summary
    assert summary.usage.prompt_tokens == 34
    assert summary.timing.path == "pd"
    phases_s = [getattr(summary.timing, f"{name}_s") for name in PHASES]
    assert abs(sum(phases_s) - summary.timing.e2e_s) < 1e-9
    made = stub.Tokenize(pb.TokenizeRequest(conversation=pb.Conversation(messages=messages)))
    assert len(made.token_ids) == 34
    assert made.max_model_len == 2048
    plain = stub.Tokenize(pb.TokenizeRequest(text="héllo"))
    assert bytes(plain.token_ids).decode() == "héllo"
    assert len(plain.tokens) == 6
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=plain.token_ids)).text == "héllo"
    variables = Struct()
    variables.update({"evil": 1})
    forbidden = pb.ChatOptions(template_kwargs=variables)
    for bad, field in (
        (pb.ChatRequest(), "messages"),
        (pb.ChatRequest(messages=messages, chat=forbidden), "template_kwargs"),
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
    scores = pb.ResponseOptions(prompt_logprobs=0)
    scored = stub.Generate(pb.GenerateRequest(text="abc", response=scores)).prompt.tokens
    assert [t.token_id for t in scored] == list(b"bc")
    assert scored[0].logprob < 0
    with pytest.raises(grpc.RpcError, match="min_p"):
        ask(min_p=1.5)


def test_grpc_trailers_carry_the_id_and_on_failure_the_usage(stub, up):
    request_id = f"trail-{up.kind}"
    long = pb.StoppingOptions(max_tokens=1500, ignore_eos=True)
    call = stub.GenerateStream(pb.GenerateRequest(request_id=request_id, text="x", stopping=long))
    for _ in range(5):
        next(call)
    stub.Abort(pb.AbortRequest(request_id=request_id))
    with pytest.raises(grpc.RpcError):
        list(call)
    trailers = dict(call.trailing_metadata())
    usage = pb.Usage.FromString(trailers["baton-usage-bin"])
    assert trailers["x-request-id"] == request_id
    assert usage.completion_tokens >= 5
    assert usage.prompt_tokens == 1
    assert "grpc-status-details-bin" in trailers
    _, good = stub.Generate.with_call(
        pb.GenerateRequest(text="x"), metadata=(("x-request-id", f"meta-{up.kind}"),)
    )
    assert dict(good.trailing_metadata())["x-request-id"] == f"meta-{up.kind}"


# --- a cluster with one permit --------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy():
    cluster = Up(
        "--local",
        BATON_ROUTER__MAX_RUNNING="1",
        BATON_ROUTER__MAX_QUEUED="1",
        BATON_ROUTER__KEEP_ALIVE_S="0.05",
        BATON_ROUTER__BODY_TIMEOUT_S="0.5",
        BATON_ROUTER__CANARY_INTERVAL_S="600",
        BATON_ROUTER__IS_STRICT="true",
    )
    yield cluster
    cluster.end()


def test_the_client_repeats_what_may_help_and_waits_as_told(busy):
    body = {"prompt": "x", "max_tokens": 1200, "ignore_eos": True, "stream": True}
    sent = []
    http = httpx.Client(event_hooks={"request": [sent.append]}, timeout=60)
    client = openai.OpenAI(
        base_url=f"{busy.url}/v1", api_key="none", max_retries=20, http_client=http
    )
    with httpx.stream("POST", f"{busy.url}/v1/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        with ThreadPoolExecutor() as threads:
            # No header comes while it waits, and so no call of this thread may wait for it.
            queued = threads.submit(
                httpx.post, f"{busy.url}/v1/completions", json={**body, "max_tokens": 2}, timeout=60
            )
            while not httpx.get(f"{busy.url}/load").json()["queued"]:
                assert not queued.done()
            refused = httpx.post(f"{busy.url}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.headers["x-should-retry"] == "true"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000
            assert refused.json()["error"]["code"] == "queue_full"
            # Nobody's answer goes on while it is not read.
            reader = threads.submit(list, lines)
            reply = client.completions.create(model=MODEL, prompt="x", max_tokens=2)
            assert reply.usage.completion_tokens == 2
            assert len(sent) >= 2
            reader.result(60)
            assert queued.result(60).text.endswith("data: [DONE]\n\n")


def test_a_slow_body_is_given_up_and_strict_refuses_unknown_fields(busy):
    host, port = busy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        answer = raw.recv(4096).decode()
    assert "408" in answer.splitlines()[0]
    assert "x-should-retry: false" in answer.lower()
    reply = httpx.post(f"{busy.url}/v1/completions", json={"prompt": "x", "flavour": 1})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "flavour"
