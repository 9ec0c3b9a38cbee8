"""What the phases of a request are."""

import pytest

from core.timeline import Timeline


def test_timeline_definitions():
    line = Timeline(received_at=10.0)
    assert line.ttft_s is None and line.tpot_s is None and line.e2e_s is None
    for at, tokens in ((10.5, 1), (10.7, 2), (11.1, 1)):
        line.delivered(at, tokens)
    line.ended_at = 11.2
    assert line.ttft_s == pytest.approx(0.5) and line.e2e_s == pytest.approx(1.2)
    assert line.itl_s == pytest.approx([0.2, 0.4]) and line.tpot_s == pytest.approx(0.6 / 3)
