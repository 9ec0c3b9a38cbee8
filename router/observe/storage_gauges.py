"""What operators see of the storage tiers below the workers' pools.

Owns the gauges made from the workers' reports. Does not know sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from core import metrics
from core.prefix_changes import StorageTier
from core.stored_block import StorageFault
from router.observe.growing_counts import GrowingCounts
from router.workers.view import SessionState, WorkerView

TIERS = tuple(tier.label for tier in StorageTier if tier is not StorageTier.POOL)
REASONS = tuple(fault.value for fault in StorageFault)


def storage_gauges(
    read_workers: Callable[[], Sequence[WorkerView]],
) -> dict[metrics.Metric, Callable[[], dict[str, int]]]:
    """Return how each gauge is read: blocks are summed up over the workers whose session is live.

    What a newer worker reports beside the known tiers and reasons is left out: labels are few.
    """
    hits = GrowingCounts()
    faults = GrowingCounts()

    def read_blocks() -> dict[str, int]:
        live = [one for one in read_workers() if one.state is SessionState.LIVE]
        return _sums(TIERS, ((it.tier, it.blocks) for one in live for it in one.storage))

    def read_hits() -> dict[str, int]:
        for worker in read_workers():
            counts = ((it.tier, it.hit_blocks) for it in worker.storage)
            hits.note(worker, _sums(TIERS, counts))
        return {tier: hits.sums[tier] for tier in TIERS}

    def read_faults() -> dict[str, int]:
        for worker in read_workers():
            counts = (item for it in worker.storage for item in it.faults.items())
            faults.note(worker, _sums(REASONS, counts))
        return {reason: faults.sums[reason] for reason in REASONS}

    return {
        metrics.STORED_BLOCKS: read_blocks,
        metrics.STORED_HITS: read_hits,
        metrics.STORAGE_FAULTS: read_faults,
    }


def _sums(labels: Sequence[str], numbers: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sum up the numbers of each known label, those without any among them."""
    sums = Counter(dict.fromkeys(labels, 0))
    for label, number in numbers:
        if label in sums:
            sums[label] += number
    return dict(sums)
