"""Every worker's cache and queues in the metrics."""

import re
from dataclasses import replace

from core import metrics
from core.session import Load, Role, WorkerDescriptor
from router.observe import worker_gauges as module
from router.observe.telemetry import Telemetry
from router.observe.worker_gauges import worker_gauges
from router.workers.view import SessionState, WorkerView


def view(name, num_blocks=100, **load):
    descriptor = WorkerDescriptor(name, Role.DECODE, 1, "a", "b", "m", "d", 16, num_blocks, 2048)
    return WorkerView(descriptor, SessionState.LIVE, True, Load(**load), (), {})


BUSY = view(
    "a",
    num_running=3,
    num_waiting=2,
    waiting_tokens=700,
    free_blocks=20,
    cached_blocks=50,
    num_preemptions=9,
)


def shown(views, metric):
    return dict(worker_gauges(lambda: views)[metric]())


def test_blocks_are_used_cached_or_free_and_queues_have_their_lengths():
    views = [BUSY, view("new")]
    assert shown(views, metrics.WORKER_BLOCKS) == {
        ("a", "used"): 30,
        ("a", "cached"): 50,
        ("a", "free"): 20,
        **{("new", state): 0 for state in ("used", "cached", "free")},
    }
    assert shown([BUSY], metrics.WORKER_SEQUENCES) == {("a", "running"): 3, ("a", "waiting"): 2}
    assert shown([BUSY], metrics.WORKER_WAITING_TOKENS) == {("a",): 700}
    assert shown([BUSY], metrics.WORKER_PREEMPTIONS) == {("a",): 9}


def test_preemptions_only_grow_over_sessions_and_starts_of_a_worker():
    views = [BUSY]
    read = worker_gauges(lambda: views)[metrics.WORKER_PREEMPTIONS]
    assert read() == {("a",): 9}
    views[:] = [replace(BUSY, load=Load())]
    assert read() == {("a",): 9}, "a new session has no report yet"
    views[:] = [replace(BUSY, load=Load(num_preemptions=10))]
    assert read() == {("a",): 10}
    reborn = replace(BUSY.descriptor, incarnation=2)
    views[:] = [replace(BUSY, descriptor=reborn, load=Load(num_preemptions=3))]
    assert read() == {("a",): 13}


def test_beyond_a_number_of_workers_the_others_are_summed_up(monkeypatch):
    monkeypatch.setattr(module, "MAX_WORKERS", 2)
    views = [view(name, waiting_tokens=n) for n, name in enumerate("dbcae", 1)]
    assert shown(views, metrics.WORKER_WAITING_TOKENS) == {
        ("a",): 4,
        ("b",): 2,
        ("other",): 1 + 3 + 5,
    }


def test_lateness_is_that_of_senders_and_of_the_others_together_the_longest(monkeypatch):
    monkeypatch.setattr(module, "MAX_WORKERS", 1)
    senders = [
        replace(view(name), descriptor=replace(BUSY.descriptor, worker_id=name, role=Role.PREFILL))
        for name in "abc"
    ]
    late = [replace(x, exposed_transfer_s=n / 4) for n, x in enumerate(senders)]
    assert shown([*late, view("d")], metrics.WORKER_EXPOSED) == {("a",): 0.0, ("other",): 0.5}


def test_a_worker_that_has_left_is_shown_no_more():
    views = [BUSY, view("gone", free_blocks=7)]
    telemetry = Telemetry(worker_gauges(lambda: views))
    try:
        text = telemetry.text().decode()
        assert 'baton_worker_kv_blocks{state="cached",worker="a"} 50.0' in text
        assert 'baton_worker_kv_blocks{state="free",worker="gone"} 7.0' in text
        assert 'baton_worker_waiting_tokens{worker="a"} 700.0' in text
        del views[1]
        assert not re.search('worker="gone"', telemetry.text().decode())
    finally:
        telemetry.close()
