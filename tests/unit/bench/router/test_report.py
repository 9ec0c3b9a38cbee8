"""The figures of `baton bench router`, by hand."""

import pytest

from bench.report import Sample
from bench.router.report import (
    Measured,
    summarise_first_token,
    summarise_overload,
    summarise_streams,
)
from bench.router.stub_worker import StubFirstToken


def answered(index, sent_at, first_at, ended_at, output_tokens=4):
    return Sample(
        index, sent_at - 0.001, sent_at, [first_at, ended_at], 10, output_tokens, 4, ended_at
    )


def refused(index, sent_at, ended_at, error="503 queue_full"):
    return Sample(index, sent_at, sent_at, ended_at=ended_at, error=error)


def test_added_ttft_leaves_out_the_stubs_own_time():
    samples = [answered(0, 1.0, 1.030, 1.5), answered(1, 2.0, 2.027, 2.5), refused(2, 3.0, 3.1)]
    # Number 3 is of another load; number 0 waited 4 ms, 20 ms were the stub's, and 6 went back.
    stubs = {
        0: StubFirstToken(1.004, 1.024),
        1: StubFirstToken(2.001, 2.021),
        3: StubFirstToken(9.0, 9.1),
    }
    found = summarise_first_token(Measured(samples, stubs, 10.0, 0.5, 0.25))
    assert found["added_ttft_ms_p50"] == pytest.approx(7)
    assert found["added_ttft_ms_p99"] == pytest.approx(10)
    assert found["to_worker_ms_p99"] == pytest.approx(4)
    assert found["to_client_ms_p99"] == pytest.approx(6)
    assert (found["measured"], found["requests"], found["completed"]) == (2, 3, 2)
    assert found["errors"] == {"503 queue_full": 1}
    assert (found["prompt_tokens"], found["cached_tokens"]) == (20, 8)
    assert found["send_lag_ms_p99"] == pytest.approx(1)
    assert (found["router_cpu_s"], found["children_cpu_s"]) == (0.5, 0.25)


def test_tokens_per_core_count_the_routers_children_and_no_token_of_a_broken_answer():
    samples = [answered(i, 0.0, 0.1, 2.0, output_tokens=300) for i in range(5)]
    samples.append(Sample(5, 0.0, output_tokens=77, error="cut off"))
    found = summarise_streams(Measured(samples, {}, 3.0, 0.25, 0.05))
    assert found["tokens"] == 1500
    assert found["tokens_per_s_per_core"] == pytest.approx(5000)
    assert found["tokens_per_s"] == pytest.approx(500)


def test_refusals_are_those_of_the_server_over_the_time_of_the_load():
    samples = [refused(i, 1.0, 1.0 + 0.001 * (i + 1)) for i in range(10)]
    samples += [refused(10, 1.0, 1.5, "429 rate_limited"), refused(11, 1.0, 1.9, "cut off")]
    samples += [answered(12, 1.0, 1.25, 2.0)]
    found = summarise_overload(Measured(samples, {}, 2.0, 0.5, 0.0))
    assert found["refused"] == 11 and found["refusals_per_s"] == pytest.approx(5.5)
    assert found["refusal_ms_p50"] == pytest.approx(6)
    assert found["refusal_ms_p99"] == pytest.approx(500)
    assert found["answered_per_s"] == pytest.approx(0.5)
    assert found["ttft_ms_p50"] == pytest.approx(250)


def test_without_a_single_value_there_is_no_percentile():
    nothing = Measured([], {}, 1.0, 0.0, 0.0)
    assert summarise_first_token(nothing)["added_ttft_ms_p99"] is None
    assert summarise_streams(nothing)["tokens_per_s_per_core"] is None
    overload = summarise_overload(nothing)
    assert (overload["refusals_per_s"], overload["refusal_ms_p50"]) == (0.0, None)
