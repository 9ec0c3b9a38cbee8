"""`baton bench router` as a user types it: real router, stub workers and clients in processes."""

import json
import subprocess

import pytest
from support.up import BATON, ROOT

OPTIONS = {
    "--rate": 20,
    "--seconds": 1,
    "--prompt-tokens": 200,
    "--shared-tokens": 100,
    "--output-tokens": 4,
    "--streams": 6,
    "--overload": 8,
    "--max-concurrent": 2,
    "--workers": 1,
    "--clients": 2,
    "--first-token-ms": 20,
    "--token-ms": 20,
}


@pytest.fixture(scope="module")
def report():
    """The JSON of one short run."""
    options = [str(word) for option in OPTIONS.items() for word in option]
    done = subprocess.run(
        [*BATON, "bench", "router", *options, "-o", "json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=170,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_a_result_says_where_it_comes_from(report):
    for option, value in OPTIONS.items():
        assert report["parameters"][option.removeprefix("--").replace("-", "_")] == value
    assert report["parameters"]["stream_tokens"] == 50
    assert report["command"].startswith("baton bench router --rate 20")
    assert report["commit"] and report["at"] and report["environment"]["cores"] >= 1
    assert report["environment"]["packages"]["grpcio"]


def test_every_first_token_was_measured_from_the_client_to_the_stub_and_back(report):
    found = report["first_token"]
    assert found["requests"] == found["completed"] == found["measured"] == 20, found["errors"]
    assert found["prompt_tokens"] == 20 * 200, "a letter is a token, and none is added"
    assert found["cached_tokens"] > 0, "beginnings repeat, and the worker that has them says so"
    assert 0 < found["added_ttft_ms_p50"] <= found["added_ttft_ms_p99"]
    assert found["to_worker_ms_p50"] > 0 and found["to_client_ms_p50"] > 0
    assert found["router_cpu_s"] > 0


def test_streams_deliver_every_token(report):
    found = report["streams"]
    assert found["requests"] == found["completed"] == 6, found["errors"]
    assert found["tokens"] == 6 * 50 and found["cached_tokens"] >= 0
    used_s = found["router_cpu_s"] + found["children_cpu_s"]
    assert found["tokens_per_s_per_core"] == pytest.approx(300 / used_s)


def test_above_capacity_all_but_those_at_once_are_refused_at_once(report):
    found = report["overload"]
    assert found["refused"] > 0 and found["completed"] >= 2
    assert found["refused"] + found["completed"] == found["requests"], found["errors"]
    assert set(found["errors"]) == {"503 queue_full"}
    assert found["refusals_per_s"] == found["refused"] / found["took_s"]
    assert 0 < found["refusal_ms_p50"] <= found["refusal_ms_p99"]
