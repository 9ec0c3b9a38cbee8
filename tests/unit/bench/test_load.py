"""The load that `baton bench serve` offers, and what its figures mean."""

import gzip
import json
import xml.etree.ElementTree as ET

import pytest

from bench.load import Shape, plan
from bench.report import Sample, percentile, summarise, svg
from bench.serve_cli import parse_limits
from core.errors import ConfigError


def test_a_load_is_a_function_of_its_seed():
    shape = Shape(50, 20, 5, rate=10.0, burstiness=0.5, seed=3)
    assert plan(shape) == plan(shape) != plan(Shape(50, 20, 5, rate=10.0, burstiness=0.5, seed=4))
    assert all(p.due_s is None for p in plan(Shape(5, 20, 5)))
    assert all(3 <= t < 256 for p in plan(shape) for t in p.prompt)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_gaps_have_the_wanted_mean_and_burstiness(burstiness):
    due = [p.due_s for p in plan(Shape(20_000, 1, 1, rate=50.0, burstiness=burstiness))]
    gaps = [b - a for a, b in zip(due, due[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((g - mean) ** 2 for g in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert variance / mean**2 == pytest.approx(
        1 / burstiness, rel=0.15
    )  # squared coefficient of variation


def test_a_trace_is_replayed_and_equal_blocks_are_equal_tokens(tmp_path):
    rows = [
        {
            "arrival_s": 2.0 * i,
            "input_tokens": 1000 + i,
            "output_tokens": 90,
            "hash_ids": [7, 8 + i],
        }
        for i in range(3)
    ]
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    load = plan(Shape(2, 0, 0, trace=str(path), trace_divide=10, speed=4.0))
    assert [(p.due_s, len(p.prompt), p.output_tokens) for p in load] == [
        (0.0, 100, 9),
        (0.5, 100, 9),
    ]
    assert load[0].prompt[:51] == load[1].prompt[:51] and load[0].prompt[51:] != load[1].prompt[51:]
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens,type\n0.0,30,4,x\n")
    assert len(plan(Shape(9, 0, 0, trace=str(tmp_path / "t.csv")))[0].prompt) == 30
    (tmp_path / "bad.csv").write_text("arrival_s,input_tokens\n0.0,30\n")
    for name, message in (("bad.csv", "output_tokens"), ("none.csv", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            plan(Shape(9, 0, 0, trace=str(tmp_path / name)))


def samples():
    """Two good requests and a failed one, by hand."""
    return [
        Sample(0, 0.0, 0.1, [0.5, 0.6, 0.9], 10, 5, 4, 1.0),
        Sample(1, 1.0, 1.0, [1.2, 1.3], 10, 2, 0, 2.0),
        Sample(2, 1.5, 1.5, [], 10, 0, 0, 1.6, "HTTP 503"),
    ]


def test_the_metrics_by_hand():
    summary = summarise(samples(), {"ttft": 300.0, "tpot": 150.0})
    assert (summary["requests"], summary["completed"], summary["errors"]) == (3, 2, {"HTTP 503": 1})
    assert summary["ttft"]["p50_ms"] == pytest.approx(200) and summary["ttft"][
        "max_ms"
    ] == pytest.approx(500)
    assert summary["itl"]["count"] == 3 and summary["itl"]["max_ms"] == pytest.approx(300)
    assert sorted([summary["tpot"]["p50_ms"], summary["tpot"]["max_ms"]]) == pytest.approx(
        [100, 100]
    )
    assert summary["output_tokens_per_s"] == pytest.approx(3.5) and summary["took_s"] == 2.0
    assert summary["attainment"] == pytest.approx(
        1 / 3
    )  # of the offered: the slow and the failed are misses
    assert summary["goodput_requests_per_s"] == pytest.approx(0.5)
    assert summary["send_lag"]["max_ms"] == pytest.approx(100)
    assert summarise([], {})["completed"] == 0


def test_percentiles_are_nearest_rank():
    assert [percentile(list(range(1, 101)), p) for p in (50, 95, 99)] == [50, 95, 99]
    assert percentile([7.0], 99) == 7.0


def test_the_picture_is_well_formed_and_has_a_panel_for_each_metric():
    root = ET.fromstring(svg(samples(), "a < b"))
    text = "".join(root.itertext())
    assert all(name in text for name in ("a < b", "TTFT", "ITL", "TPOT", "E2E"))
    assert len(root.findall(".//{*}polyline")) == 4


def test_limits():
    assert parse_limits("ttft:500, tpot:40") == {"ttft": 500.0, "tpot": 40.0}
    for text in ("ttft", "ttft:x", "speed:3"):
        with pytest.raises(ConfigError, match="goodput"):
            parse_limits(text)
