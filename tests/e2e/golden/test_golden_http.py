"""HTTP as it is on the wire: bytes on file, phases that add up, vLLM's endpoints, refusals."""

import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from support.golden import ASK, MODEL
from support.up import Up

from core.types import PHASES, TTFT_PHASES

FILES = Path(__file__).parent
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
    file = FILES / f"{name}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), (
        f"{name} changed; if that is meant, run with WRITE_GOLDEN=1 and read the difference"
    )


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
    assert (
        timing["path"] == "pd"
        and timing["attempts"] == ["0:pd:ok"]
        and timing["prefill_pid"] != timing["decode_pid"]
    )
    metrics = httpx.get(f"{up.url}/metrics").text
    phases = [
        float(x)
        for x in re.findall(r"^baton_request_phase_seconds_sum\{.*\} (\S+)$", metrics, re.M)
    ]
    (e2e,) = [
        float(x) for x in re.findall(r"^baton_e2e_seconds_sum(?:\{.*\})? (\S+)$", metrics, re.M)
    ]
    assert len(phases) == len(PHASES) and abs(sum(phases) - e2e) < 1e-6 * max(1, e2e)
    if up.kind == "local":  # on Ray the routers' standard error is in Ray's log files
        line = up.logged(f"sum-{up.kind}")
        assert (
            line["path"] == "pd"
            and line["outcome"] == "finished"
            and line["attempts"] == ["0:pd:ok"]
        )
        assert abs(sum(line["phases_ms"].values()) - line["e2e_ms"]) < 0.02
        assert "France" not in json.dumps(line)


def test_tokenize_detokenize_load_and_offline_docs(up):
    text = "naïve 日本"
    reply = httpx.post(
        f"{up.url}/tokenize", json={"prompt": text, "return_token_strs": True}
    ).json()
    assert reply["tokens"] == list(text.encode()) and reply["count"] == len(text.encode()) == len(
        reply["token_strs"]
    )
    assert httpx.post(f"{up.url}/detokenize", json={"tokens": reply["tokens"]}).json() == {
        "prompt": text
    }
    chat = httpx.post(f"{up.url}/tokenize", json={"messages": ASK}).json()
    assert chat["count"] == 34 and chat["max_model_len"] == 2048
    load = httpx.get(f"{up.url}/load").json()
    assert load["server_load"] == 0 and load["pools"]["prefill"]["replicas"] == 1
    page = httpx.get(f"{up.url}/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links and all(link.startswith("/") for link in links)
    assert all(httpx.get(up.url + link).status_code == 200 for link in links)
    paths = httpx.get(f"{up.url}/openapi.json").json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert "min_p" in schema["properties"] and "messages" in schema["required"]


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
            assert refused.status_code == 503 and refused.headers["x-should-retry"] == "true"
            assert (
                1 <= int(refused.headers["retry-after"]) <= 60
                and 1000 <= int(refused.headers["retry-after-ms"]) <= 60_000
            )
            assert refused.json()["error"]["code"] == "queue_full"
            # Nobody's answer goes on while it is not read.
            reader = threads.submit(list, lines)
            reply = client.completions.create(model=MODEL, prompt="x", max_tokens=2)
            assert reply.usage.completion_tokens == 2 and len(sent) >= 2
            reader.result(60)
            assert queued.result(60).text.endswith("data: [DONE]\n\n")


def test_a_slow_body_is_given_up_and_strict_refuses_unknown_fields(busy):
    host, port = busy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        answer = raw.recv(4096).decode()
    assert "408" in answer.splitlines()[0] and "x-should-retry: false" in answer.lower()
    reply = httpx.post(f"{busy.url}/v1/completions", json={"prompt": "x", "flavour": 1})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "flavour"
