"""What operators see of the storage tiers below the workers' pools.

Owns the gauges made from the workers' reports. Does not know sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from core import metrics
from core.prefix_changes import StorageTier
from core.session import StorageLoad
from core.stored_block import StorageFault
from router.workers.view import SessionState, WorkerView

TIERS = tuple(tier.label for tier in StorageTier if tier is not StorageTier.POOL)
REASONS = tuple(fault.value for fault in StorageFault)


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

    return {
        metrics.STORED_BLOCKS: lambda: _sums(TIERS, ((it.tier, it.blocks) for it in loads())),
        metrics.STORED_HITS: lambda: _sums(TIERS, ((it.tier, it.hit_blocks) for it in loads())),
        metrics.STORAGE_FAULTS: lambda: _sums(
            REASONS, (item for load in loads() for item in load.faults.items())
        ),
    }


def _sums(labels: Sequence[str], numbers: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sum up the numbers of each known label, those without any among them."""
    sums = Counter(dict.fromkeys(labels, 0))
    for label, number in numbers:
        if label in sums:
            sums[label] += number
    return dict(sums)
