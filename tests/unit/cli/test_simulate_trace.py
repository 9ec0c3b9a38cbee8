"""`baton simulate trace`: its figures, and options that do not fit."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from cli.main import app
from core.errors import ConfigError


def write_trace(folder):
    row = {"input_tokens": 1_000, "output_tokens": 7, "hash_ids": [5, 9]}
    rows = [{"arrival_s": arrival_s, **row} for arrival_s in (2.0, 2.5)]
    path = folder / "t.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_the_command_prints_the_figures(tmp_path):
    path = write_trace(tmp_path)
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
    path = write_trace(tmp_path)
    result = CliRunner().invoke(app, ["simulate", "trace", "--trace", str(path), *options])
    assert isinstance(result.exception, ConfigError) and what in result.exception.message
