"""Every worker's cache and queues as gauges.

Owns the labels, and their bound: each worker has its own up to a number, and the others are summed
up. Does not know who counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from core import metrics
from core.session import Role
from router.observe.growing_counts import GrowingCounts
from router.observe.telemetry import Labelled
from router.workers.view import WorkerView

MAX_WORKERS = 512
OTHER = "other"


def worker_gauges(
    read: Callable[[], Sequence[WorkerView]],
) -> dict[metrics.Metric, Labelled]:
    """Return how each gauge is read; a worker that has left is shown no more."""
    preemptions = GrowingCounts()

    def read_preemptions() -> Mapping[tuple[str, ...], float]:
        views = read()
        for view in views:
            preemptions.note(view, {view.descriptor.worker_id: view.load.num_preemptions})
        shown = {view.descriptor.worker_id: name for name, view in _named(views)}
        return _summed(((name,), preemptions.sums[worker]) for worker, name in shown.items())

    return {
        metrics.WORKER_BLOCKS: lambda: _summed(_blocks(read())),
        metrics.WORKER_SEQUENCES: lambda: _summed(_sequences(read())),
        metrics.WORKER_WAITING_TOKENS: lambda: _summed(
            ((name,), view.load.waiting_tokens) for name, view in _named(read())
        ),
        metrics.WORKER_PREEMPTIONS: read_preemptions,
        metrics.WORKER_EXPOSED: lambda: _exposed_transfers(read()),
    }


def _named(views: Sequence[WorkerView]) -> Iterator[tuple[str, WorkerView]]:
    # By name, so that the same ones have their own label at each reading.
    in_order = sorted(views, key=lambda view: view.descriptor.worker_id)
    for number, view in enumerate(in_order):
        yield view.descriptor.worker_id if number < MAX_WORKERS else OTHER, view


def _blocks(views: Sequence[WorkerView]) -> Iterator[tuple[tuple[str, str], int]]:
    for name, view in _named(views):
        load = view.load
        yield (name, "free"), load.free_blocks
        yield (name, "cached"), load.cached_blocks
        # Before its first report all of a worker's blocks would seem to be in use.
        used = view.descriptor.num_blocks - load.free_blocks - load.cached_blocks
        yield (name, "used"), used if load.free_blocks or load.cached_blocks else 0


def _sequences(views: Sequence[WorkerView]) -> Iterator[tuple[tuple[str, str], int]]:
    for name, view in _named(views):
        yield (name, "running"), view.load.num_running
        yield (name, "waiting"), view.load.num_waiting


def _exposed_transfers(views: Sequence[WorkerView]) -> Mapping[tuple[str, ...], float]:
    """Return by how much the KV of each prefill worker is late; times cannot be summed up."""
    found: dict[tuple[str, ...], float] = {}
    for name, view in _named(views):
        if view.descriptor.role is Role.PREFILL:
            found[name,] = max(found.get((name,), 0.0), view.exposed_transfer_s)
    return found


def _summed(
    rows: Iterable[tuple[tuple[str, ...], int]],
) -> Mapping[tuple[str, ...], float]:
    found: Counter[tuple[str, ...]] = Counter()
    for labels, number in rows:
        found[labels] += number
    return found
