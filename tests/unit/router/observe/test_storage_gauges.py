"""The gauges of storage tiers: sums over live workers, every label from the start."""

from types import SimpleNamespace

from core import metrics
from core.session import Load, StorageLoad
from router.observe.storage_gauges import storage_gauges
from router.workers.view import SessionState, WorkerView


def view(name, state, *storage):
    return WorkerView(SimpleNamespace(worker_id=name), state, True, Load(), (), {}, storage=storage)


def test_live_workers_are_summed_up_and_every_label_is_there():
    views = [
        view("a", SessionState.LIVE, StorageLoad("disk", 7, 3, {"no_space": 2})),
        view(
            "b",
            SessionState.LIVE,
            StorageLoad("host", 5, 1, {"damaged": 1}),
            StorageLoad("disk", 1, 0, {"no_space": 4}),
        ),
        view("gone", SessionState.LOST, StorageLoad("disk", 100, 100, {"foreign": 100})),
    ]
    read = storage_gauges(lambda: views)
    assert read[metrics.STORED_BLOCKS]() == {"host": 5, "disk": 8}
    assert read[metrics.STORED_HITS]() == {"host": 1, "disk": 3}
    faults = read[metrics.STORAGE_FAULTS]()
    assert {name: n for name, n in faults.items() if n} == {"no_space": 6, "damaged": 1}
    assert len(faults) == 6
