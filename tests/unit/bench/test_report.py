"""What the figures of a load mean."""

import xml.etree.ElementTree as ET

import pytest

from bench.report import Sample, percentile, summarise, svg
from bench.serve_cli import parse_limits
from core.errors import ConfigError


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
