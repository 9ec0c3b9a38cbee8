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
        load.measured(1_000, seconds)
    load.measured(8, 1.0)
    assert load.candidate.prefill_tokens_per_s == 0.0
    load.measured(1_000, 1.0)
    assert load.candidate.prefill_tokens_per_s == 1_000.0
    load.measured(2_000, 1.0)
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
