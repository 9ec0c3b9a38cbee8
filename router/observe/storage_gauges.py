"""What operators see of the storage tiers below the workers' pools.

Owns the gauges made from the workers' reports. Does not know sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from core import metrics
from core.session import StorageLoad
from core.stored_block import StorageFault
from router.workers.view import SessionState, WorkerView

TIERS = ("host", "disk")


def storage_gauges(
    read_workers: Callable[[], Sequence[WorkerView]],
) -> dict[metrics.Metric, Callable[[], dict[str, int]]]:
    """Return how each gauge is read: sums over the workers whose session is live.

    What a newer worker reports beside the known tiers and reasons is left out: labels are few.
    """

    def loads() -> Iterator[StorageLoad]:
        for worker in read_workers():
            if worker.state is SessionState.LIVE:
                yield from worker.storage

    def blocks() -> dict[str, int]:
        held = Counter(dict.fromkeys(TIERS, 0))
        for load in loads():
            if load.tier in held:
                held[load.tier] += load.blocks
        return dict(held)

    def hits() -> dict[str, int]:
        found = Counter(dict.fromkeys(TIERS, 0))
        for load in loads():
            if load.tier in found:
                found[load.tier] += load.hit_blocks
        return dict(found)

    def faults() -> dict[str, int]:
        counted = Counter({fault.value: 0 for fault in StorageFault})
        for load in loads():
            counted.update({reason: n for reason, n in load.faults.items() if reason in counted})
        return dict(counted)

    return {
        metrics.STORED_BLOCKS: blocks,
        metrics.STORED_HITS: hits,
        metrics.STORAGE_FAULTS: faults,
    }
