"""Traces: the formats, what is wrong with a file, the ideal; their replay; the command."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from cli.main import app
from core.errors import ConfigError
from simulation.replay import Policy, Replay, ReplayPlan
from simulation.traces import Trace, TraceRequest, ideal_hit_rate, read_trace


def write(folder, name, text):
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


OWN = {"arrival_s": 2.5, "input_tokens": 1_000, "output_tokens": 7, "hash_ids": [5, 9]}
FORMATS = {
    "own.jsonl.gz": lines({**OWN, "arrival_s": 2.0}, OWN),
    "mooncake.jsonl": lines(
        {"timestamp": 2_000, "input_length": 1_000, "output_length": 7, "hash_ids": [5, 9]},
        {"timestamp": 2_500, "input_length": 1_000, "output_length": 7, "hash_ids": [5, 9]},
    ),
    "own.csv.gz": "arrival_s,input_tokens,output_tokens,type\n2.0,1000,7,chat\n2.5,1000,7,chat\n",
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,1000,7\n2023-11-16 18:17:04.4799600,1000,7\n",
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,1000,7,1007,Conversation log\n5.5,ChatGPT,1000,7,1007,Conversation log\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    trace = read_trace(write(tmp_path, name, FORMATS[name]))
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 0.5])
    assert {(r.input_tokens, r.output_tokens) for r in trace.requests} == {(1_000, 7)}
    if "jsonl" in name:
        assert (trace.requests[0].hash_ids, trace.block_tokens) == ((5, 9), 512)


def test_a_publishers_seconds_are_not_taken_for_milliseconds(tmp_path):
    rows = [
        {"chat_id": 1, "timestamp": t, "input_length": 40, "output_length": 1, "hash_ids": [1, 2]}
        for t in (10.0, 12.0)
    ]
    trace = read_trace(write(tmp_path, "bailian.jsonl", lines(*rows)), block_tokens=16)
    assert trace.requests[1].arrival_s == 2.0


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("none.jsonl", "", "has no requests"),
        ("bad.jsonl", lines(OWN) + "{\n", "line 2: "),
        ("list.jsonl", "[1]\n", "line 1: is no JSON object"),
        ("cut.jsonl.gz", None, "cannot be read"),
        ("lengths.csv", "input_tokens,output_tokens\n1,2\n", "row 1: has no arrival_s"),
        ("word.csv", "arrival_s,input_tokens,output_tokens\nsoon,1,2\n", "row 1: "),
        ("less.csv", "arrival_s,input_tokens,output_tokens\n1,-5,2\n", "input_tokens is -5"),
        ("nan.csv", "arrival_s,input_tokens,output_tokens\nnan,5,2\n", "arrival_s is nan"),
        ("ids.jsonl", lines({**OWN, "hash_ids": ["a"]}), "hash_ids is no list of integers"),
        ("size.jsonl", lines({**OWN, "input_tokens": 5_000}), "--block-tokens"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path, name, text, what):
    path = write(tmp_path, name, lines(OWN) if text is None else text)
    if text is None:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=f"{name}.*{what}"):
        read_trace(path, block_tokens=512 if name == "size.jsonl" else 0)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.csv cannot be read"):
        read_trace(tmp_path / "none.csv")


def test_the_ideal_is_the_longest_run_of_blocks_seen_before():
    requests = [
        TraceRequest(0.0, 1_024, 1, (1, 2)),
        TraceRequest(1.0, 1_500, 1, (1, 2, 3)),
        TraceRequest(2.0, 1_024, 1, (9, 2)),
    ]
    assert ideal_hit_rate(Trace(tuple(requests), 512)) == 1_024 / 3_548


# --- replay ----------------------------------------------------------------------------------------


def replay(requests, policy=Policy.COST, workers=2, cache_tokens=100_000, block=100, rate=1_000.0):
    plan = ReplayPlan(workers, cache_tokens, rate, policy)
    return Replay(Trace(tuple(requests), block), plan).run()


def test_a_worker_computes_one_prompt_after_another_and_only_what_it_lacks():
    ids = tuple(range(11))
    found = replay([TraceRequest(0.0, 1_050, 1, ids), TraceRequest(0.5, 1_050, 1, ids)], workers=1)
    # The second waits 0.55 s for the first; then 50 tokens are left: the last block is not full.
    assert found["ttft_p99_s"] == pytest.approx(1.05)
    assert found["ttft_mean_s"] == pytest.approx((1.05 + 0.6) / 2)
    assert found["token_hit_rate"] == pytest.approx(1_000 / 2_100)
    assert found["ideal_token_hit_rate"] == pytest.approx(0.5)


def conversations(number, turns):
    """Every prompt begins with the same block; each conversation grows by five blocks a turn."""
    return [
        TraceRequest(
            turn * 0.5 * number + 0.4 * chat,
            100 + 500 * (turn + 1) + 1,
            1,
            (0, *(1_000 * (chat + 1) + block for block in range(5 * (turn + 1)))),
        )
        for turn in range(turns)
        for chat in range(number)
    ]


def test_conversations_stay_where_they_are_cached_and_the_shared_block_gathers_nobody():
    requests = conversations(60, 4)
    by_cost = replay(requests, workers=4)
    turns = replay(requests, Policy.ROUND_ROBIN, workers=7)
    assert by_cost["token_hit_rate"] > 0.98 * by_cost["ideal_token_hit_rate"]
    assert by_cost["load_imbalance"] < 1.3
    assert turns["token_hit_rate"] < 0.7 * by_cost["token_hit_rate"]
    assert by_cost["ttft_mean_s"] < turns["ttft_mean_s"]


def test_a_burst_of_one_new_prefix_is_computed_by_few_before_anybody_tells():
    ids = tuple(range(50))
    burst = [TraceRequest(0.0, 5_001, 1, ids) for _ in range(6)]
    found = replay(burst, workers=4)
    assert found["token_hit_rate"] == pytest.approx(5 * 5_000 / (6 * 5_001), rel=0.25)


def test_nobody_waits_for_a_prefix_that_was_evicted():
    """Each prompt fills a worker's cache; that of the first is used again by the third."""

    def prompt(arrival_s, first):
        return TraceRequest(arrival_s, 1_001, 1, tuple(range(first, first + 10)))

    before = [prompt(2.0 * i, 100 * i) for i in range(3)]
    both_busy = [prompt(6.0, 300), prompt(6.1, 400)]
    found = replay([*before, *both_busy, prompt(6.2, 0)], cache_tokens=1_100)
    # It goes to the worker that is free first, at 7.001.
    assert found["token_hit_rate"] == 0.0
    assert found["ttft_p99_s"] == pytest.approx(1.802)


def test_a_small_cache_keeps_less():
    requests = conversations(12, 6)
    small = replay(requests, workers=4, cache_tokens=4_000)
    large = replay(requests, workers=4)
    assert 0 < small["token_hit_rate"] < 0.7 * large["token_hit_rate"]


def test_a_prompt_larger_than_the_cache_is_computed_and_not_kept():
    ids = tuple(range(50))
    found = replay([TraceRequest(t, 5_001, 1, ids) for t in (0.0, 9.0)], cache_tokens=2_000)
    assert found["token_hit_rate"] == 0.0


def test_least_queued_knows_no_caches_and_round_robin_no_queues():
    ids = tuple(range(10))
    requests = [TraceRequest(float(t * 5), 1_001, 1, ids) for t in range(4)]
    # The idle worker that comes first, again and again.
    assert replay(requests, Policy.LEAST_QUEUED)["load_imbalance"] == 2.0
    assert replay(requests, Policy.ROUND_ROBIN)["load_imbalance"] == 1.0


def test_a_turn_is_sent_when_the_one_before_it_has_ended():
    turns = [TraceRequest(t, 2_001, 1, tuple(range(20)), "s") for t in (0.0, 1.0, 9.0)]
    found = replay(turns, workers=1)
    # 2 s for the first, so that the second is late; none ever waits for another.
    assert found["ttft_p99_s"] == pytest.approx(2.001)
    assert found["ttft_p50_s"] == pytest.approx(0.001)


# --- the command -----------------------------------------------------------------------------------


def test_the_command_prints_the_figures(tmp_path):
    path = write(tmp_path, "t.jsonl.gz", FORMATS["own.jsonl.gz"])
    options = ["--workers", "2", "--cache-tokens", "2000", "--prefill-tokens-per-s", "1000"]
    result = CliRunner().invoke(
        app, ["simulate", "trace", "--trace", str(path), *options, "-o", "json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["requests"] == 2 and found["policy"] == "cost" and found["wall_s"] > 0
    assert found["token_hit_rate"] == pytest.approx(512 / 2_000)
    assert found["ideal_token_hit_rate"] == 0.5
    assert {"load_imbalance", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s"} <= {*found}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--policy", "best"], "cost, least-queued, round-robin"),
        (["--cache-tokens", "511"], "a block of this trace has 512"),
    ],
)
def test_an_option_that_does_not_fit_is_named(tmp_path, options, what):
    path = write(tmp_path, "t.jsonl.gz", FORMATS["own.jsonl.gz"])
    result = CliRunner().invoke(app, ["simulate", "trace", "--trace", str(path), *options])
    assert isinstance(result.exception, ConfigError) and what in result.exception.message
