"""Traces: the formats, what is wrong with a file, and the ideal."""

import gzip
import json

import pytest

from core.errors import ConfigError
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
