"""The gauges of storage tiers: blocks of live workers, counts that only grow, every label."""

from types import SimpleNamespace

from core import metrics
from core.session import Load, StorageLoad
from router.observe.storage_gauges import storage_gauges
from router.workers.view import SessionState, WorkerView


def view(name, state, *storage, incarnation=1):
    descriptor = SimpleNamespace(worker_id=name, incarnation=incarnation)
    return WorkerView(descriptor, state, True, Load(), (), {}, storage=storage)


def test_live_workers_are_summed_up_and_every_label_is_there():
    views = [
        view("a", SessionState.LIVE, StorageLoad("disk", 7, 3, {"no_space": 2})),
        view(
            "b",
            SessionState.LIVE,
            StorageLoad("host", 5, 1, {"damaged": 1}),
            StorageLoad("disk", 1, 0, {"no_space": 4}),
        ),
        view("lost", SessionState.LOST, StorageLoad("disk", 100, 100, {"foreign": 100})),
    ]
    read = storage_gauges(lambda: views)
    assert read[metrics.STORED_BLOCKS]() == {"host": 5, "disk": 8}
    assert read[metrics.STORED_HITS]() == {"host": 1, "disk": 103}
    faults = read[metrics.STORAGE_FAULTS]()
    named = {"no_space": 6, "damaged": 1, "foreign": 100}
    assert {name: n for name, n in faults.items() if n} == named
    assert len(faults) == 6


def test_what_was_counted_is_no_news_when_a_session_or_a_worker_begins_anew():
    """For `rate` and `increase`, a number that falls has begun again, and all of it is new."""
    views = []
    read = storage_gauges(lambda: views)

    def shown(*now):
        views[:] = now
        return read[metrics.STORED_HITS]()["disk"], read[metrics.STORAGE_FAULTS]()["no_space"]

    def disk(hits, faults):
        return StorageLoad("disk", 1, hits, {"no_space": faults})

    other = view("b", SessionState.LIVE, disk(5, 1))
    assert shown(view("a", SessionState.LIVE, disk(20, 2)), other) == (25, 3)
    assert shown(view("a", SessionState.RECONNECTING), other) == (25, 3)
    assert shown(view("a", SessionState.LIVE), other) == (25, 3), "not reported yet"
    assert shown(other) == (25, 3)
    assert shown(view("a", SessionState.LIVE, disk(21, 2)), other) == (26, 3)
    again = view("a", SessionState.LIVE, disk(4, 1), incarnation=2)
    assert shown(again, other) == (30, 4)
