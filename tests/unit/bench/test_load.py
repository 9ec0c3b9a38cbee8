"""The load that `baton bench serve` offers, and what its figures mean."""

import gzip
import json

import pytest

from bench.load import Shape, plan
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
