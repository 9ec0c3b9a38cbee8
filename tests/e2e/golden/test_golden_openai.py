"""The real `openai` client, unchanged, on Ray and on child processes."""

import asyncio

import httpx
import openai
import pytest
from support.golden import ASK, MODEL, PARIS

from core.types import PHASES
from protos.baton.v1 import generation_pb2 as pb


def test_chat_whole_and_streamed(client):
    whole = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        PARIS,
        "stop",
    )
    assert (
        whole.object == "chat.completion"
        and whole.id.startswith("chatcmpl-")
        and whole.system_fingerprint
    )
    assert (
        whole.usage.prompt_tokens == 34
        and whole.usage.total_tokens == 34 + whole.usage.completion_tokens
    )

    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.role for c in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == PARIS
    assert chunks[-2].choices[0].finish_reason == "stop" and all(
        c.usage is None for c in chunks[:-1]
    )
    assert (
        chunks[-1].choices == []
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    assert {c.id for c in chunks} == {chunks[0].id} and {c.object for c in chunks} == {
        "chat.completion.chunk"
    }


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
        assert [c.index for c in out[name].choices] == [0, 1] and out[name].choices[0].text == first
        assert out[name].usage.prompt_tokens == 18 and out[name].usage.completion_tokens == 24
    streamed = list(client.completions.create(
        model=MODEL, prompt=[text, "import os"], n=2, max_tokens=12, temperature=0, stream=True
    ))  # fmt: skip
    texts = {
        i: "".join(c.choices[0].text for c in streamed if c.choices[0].index == i) for i in range(4)
    }
    assert texts[0] == texts[1] == first and texts[2] == texts[3] == out["texts"].choices[1].text


def test_echo_and_prompt_log_probabilities(client):
    wish = {"model": MODEL, "prompt": "def main(", "temperature": 0, "logprobs": 2}
    plain = client.completions.create(**wish, max_tokens=4).choices[0]
    echoed = client.completions.create(**wish, max_tokens=4, echo=True).choices[0]
    assert echoed.text == "def main(" + plain.text
    assert echoed.logprobs.tokens == [*"def main(", *plain.logprobs.tokens]
    assert (
        echoed.logprobs.token_logprobs[0] is None
        and echoed.logprobs.token_logprobs[9:] == plain.logprobs.token_logprobs
    )
    assert echoed.logprobs.text_offset == list(range(13)) and plain.logprobs.text_offset == list(
        range(4)
    )
    only = client.completions.create(**wish, max_tokens=0, echo=True)
    assert only.choices[0].text == "def main(" and only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs == echoed.logprobs.token_logprobs[:9]
    streamed = list(client.completions.create(**wish, max_tokens=4, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == echoed.text
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [p for piece in pieces for p in piece.token_logprobs] == echoed.logprobs.token_logprobs
    assert [p for piece in pieces for p in piece.text_offset] == echoed.logprobs.text_offset


def test_chat_log_probabilities_whole_and_streamed(client):
    wish = {
        "model": MODEL,
        "messages": ASK,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 8,
    }
    content = client.chat.completions.create(**wish).choices[0].logprobs.content
    assert bytes(b for t in content for b in t.bytes).decode() == PARIS[:8] and len(content) == 8
    assert all(
        t.top_logprobs[0].token == t.token and t.top_logprobs[0].logprob == t.logprob
        for t in content
    )
    chunks = client.chat.completions.create(**wish, stream=True)
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
    assert (
        complete(stop=[plain.text[3:6]], include_stop_str_in_output=True).choices[0].text
        == plain.text[:6]
    )
    with_ids = complete(return_token_ids=True).choices[0]
    assert (
        bytes(with_ids.token_ids).decode() == plain.text
        and bytes(with_ids.prompt_token_ids) == b"import os"
    )
    stop_at = with_ids.token_ids[4]
    until = complete(stop_token_ids=[stop_at], return_token_ids=True).choices[0]
    first = with_ids.token_ids.index(stop_at)
    assert (
        until.text == plain.text[:first]
        and until.stop_reason == stop_at
        and until.token_ids[-1] == stop_at
    )
    assert complete(truncate_prompt_tokens=2).usage.prompt_tokens == 2
    assert len(complete(prompt_logprobs=1).choices[0].prompt_logprobs) == len("import os")
    assert set(complete(allowed_token_ids=[97, 98]).choices[0].text) <= set("ab")
    assert plain.text[:3] not in complete(bad_words=[plain.text[:3]]).choices[0].text
    cached = complete(cache_salt="mine", prompt="x" * 64)
    again, other = (
        complete(cache_salt="mine", prompt="x" * 64),
        complete(cache_salt="yours", prompt="x" * 64),
    )
    assert [r.usage.prompt_tokens_details.cached_tokens for r in (cached, again, other)] == [
        0,
        48,
        0,
    ]


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
    assert (
        raw.headers["x-request-id"] == "a-click"
        and raw.headers["x-baton-ignored-params"] == "flavour"
    )
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
    assert (
        stub.Abort(pb.AbortRequest(request_id=f"cut-{up.kind}")).outcome == pb.ABORT_OUTCOME_ABORTED
    )
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
    assert [a if isinstance(a, str) else a.choices[0].message.content for a in answers] == [
        PARIS
    ] * 16
