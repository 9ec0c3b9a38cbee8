"""Sums of what workers have counted since their start, which only grow.

Owns the rule that a count is added once, although a session that is dialled anew begins without
reports and a worker that starts again counts from nothing: a sum that fell would look like a start
of the router, and the whole of it like news. Does not know what is counted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping

from core.ids import WorkerLife
from router.workers.view import WorkerView

MAX_LIVES = 4096
"""Of workers, that are remembered; one that is forgotten and comes back is counted again."""


class GrowingCounts:
    """Sums by label, over all workers that there were."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.sums: Counter[str] = Counter()
        self._last: OrderedDict[WorkerLife, Counter[str]] = OrderedDict()

    def note(self, worker: WorkerView, counts: Mapping[str, int]) -> None:
        """Take what a worker reports; what is less than it was is an older report, or none."""
        life = (worker.descriptor.worker_id, worker.descriptor.incarnation)
        last = self._last.setdefault(life, Counter())
        self._last.move_to_end(life)
        for label, number in counts.items():
            self.sums[label] += max(0, number - last[label])
            last[label] = max(last[label], number)
        if len(self._last) > MAX_LIVES:
            self._last.popitem(last=False)
