"""A router's account of one worker: what waits there, and how fast it computes."""

import math

import pytest

from core.session import Load, Role, WorkerDescriptor
from router.workers.load import WorkerLoad

DESCRIPTOR = WorkerDescriptor("w", Role.PREFILL, 1, "a", "b", "m", "digest", 16, 10_000, 65_536)


def test_a_report_is_not_counted_beside_the_prompts_that_it_counts():
    load = WorkerLoad(DESCRIPTOR)
    assert load.candidate.head_tokens == 0
    load.add("r1", 500, 1.0)
    load.report(Load(waiting_tokens=700), 1.0)
    assert load.candidate.queued_tokens == 700, "500 of this router, 200 of others"
    load.add("r2", 100, 2.0)
    assert load.candidate.queued_tokens == 800
    load.answered("r1", 3.0)
    assert load.candidate.queued_tokens == 300
    assert (load.candidate.head_tokens, load.candidate.head_started_s) == (100, 3.0)
    load.clear()
    assert load.candidate.pending_tokens == 0


def test_what_has_ended_since_a_report_runs_no_more_and_what_was_sent_runs_at_once():
    load = WorkerLoad(DESCRIPTOR)
    load.add("r1", 500, 0.0)
    assert load.candidate.num_running == 1
    load.report(Load(num_running=3, num_waiting=1), 0.0)
    assert load.candidate.num_running == 4, "this router's, and three of others"
    load.remove("r1", 0.0)
    assert load.candidate.num_running == 3, "before the next report"
    load.report(Load(num_running=3, num_waiting=1), 0.0)
    assert load.candidate.num_running == 4
    load.add("r2", 500, 0.0)
    load.add("r3", 500, 0.0)
    assert load.candidate.num_running == 6
    load.report(Load(num_running=1), 0.0)
    assert load.candidate.num_running == 2, "one of them has not reached it yet"
    load.clear()
    assert load.candidate.num_running == 1


def test_speed_is_learnt_from_prompts_that_took_time():
    load = WorkerLoad(DESCRIPTOR)
    for seconds in (0.0, -1.0, math.nan, math.inf):
        load.measured(1_000, seconds, 0.0)
    load.measured(8, 1.0, 0.0)
    assert load.candidate.prefill_tokens_per_s == 0.0
    load.measured(1_000, 1.0, 0.0)
    assert load.candidate.prefill_tokens_per_s == 1_000.0
    load.measured(2_000, 1.0, 0.0)
    assert load.candidate.prefill_tokens_per_s == pytest.approx(1_200.0)


def test_lateness_of_transfers_is_forgotten_a_minute_after_the_last():
    load = WorkerLoad(DESCRIPTOR)
    load.handed_over("d", 0.5, 10.0)
    idle = Load()
    load.report(idle, 69.0)
    assert load.candidate.exposed_transfer_s == 0.5
    assert load.candidate.exposed_by_receiver == {"d": 0.5}
    load.report(idle, 70.0)
    assert load.candidate.exposed_transfer_s == 0.0 and not load.candidate.exposed_by_receiver


def test_a_speed_counts_as_not_measured_ten_minutes_after_the_last_prompt():
    load = WorkerLoad(DESCRIPTOR)
    load.measured(1_000, 1.0, 100.0)
    load.measured(1_000, math.nan, 500.0)
    load.report(Load(), 699.0)
    assert load.candidate.prefill_tokens_per_s == 1_000.0
    load.report(Load(), 700.0)
    assert load.candidate.prefill_tokens_per_s == 0.0
    load.measured(3_000, 1.0, 701.0)
    assert load.candidate.prefill_tokens_per_s == 3_000.0, "nothing is left of the old one"


def test_lateness_that_is_no_number_is_not_noted():
    load = WorkerLoad(DESCRIPTOR)
    for exposed_s in (math.nan, math.inf, -1.0):
        load.handed_over("d", exposed_s, 10.0)
        assert load.candidate.exposed_transfer_s == 0.0 and not load.candidate.exposed_by_receiver


def test_a_request_decodes_from_its_first_answer_on_until_it_ends():
    load = WorkerLoad(DESCRIPTOR)
    load.report(Load(num_running=2), 0.0)
    load.add("coming", 0, 0.0)
    load.add("prompt", 500, 0.0)
    assert (load.candidate.num_running, load.candidate.num_decoding) == (4, 2)
    load.answered("coming", 1.0)
    load.answered("nobody", 1.0)
    assert load.candidate.num_decoding == 3
    load.remove("coming", 2.0)
    assert (load.candidate.num_running, load.candidate.num_decoding) == (3, 2)
    load.answered("prompt", 3.0)
    load.clear()
    assert load.candidate.num_decoding == 2
