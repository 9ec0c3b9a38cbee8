"""What a placement took, beside what was predicted of it and of those that were not chosen.

Owns the comparison, over the phases that a prediction covers: the worker's queue, a fetch in it,
the prompt, the exposed transfer. Does not know who measures them.

    error  = measured - predicted of the candidate that was chosen
    regret = measured + its predicted delay of others - the least price of the other candidates

A price is what was predicted, and what others lose by it: the paths are compared as they were when
one was chosen. A regret above zero says that another candidate would have been cheaper, if its
prediction is true.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.types import Path
from router.cost import Cost
from router.placement import Placement


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What the phases took (seconds)."""

    queue_s: float
    """At the worker that computed the prompt."""
    prefill_s: float
    transfer_s: float = 0.0
    """Exposed, as in `Cost`."""
    fetch_s: float = 0.0
    """Of `queue_s`, for which the prompt waited for a peer's blocks."""

    @property
    def total_s(self) -> float:
        """Seconds to the first token and, on path pd, to decode's."""
        return self.queue_s + self.prefill_s + self.transfer_s


@dataclass(frozen=True, slots=True)
class Regret:
    """One placement in hindsight (seconds)."""

    measured: MeasuredCost
    predicted: Cost
    """Of the candidate that was chosen."""
    best_other: tuple[Path, Cost] | None
    """The candidate of the least price of those not chosen; None: there was none."""

    @property
    def predicted_s(self) -> float:
        """What the same phases were to take."""
        return self.predicted.total_s

    @property
    def error_s(self) -> float:
        """By how much it took longer than predicted; negative: less long."""
        return self.measured.total_s - self.predicted_s

    @property
    def regret_s(self) -> float | None:
        """By how much it cost more than the best other was predicted to; negative: less."""
        if self.best_other is None:
            return None
        return self.measured.total_s + self.predicted.delay_s - self.best_other[1].price_s


def regret_of(placement: Placement, measured: MeasuredCost) -> Regret | None:
    """Compare; None if the chosen candidate's cost was not kept.

    Args:
        placement: With the costs of the cheapest candidates of each path.
        measured: Of the attempt that was placed so.
    """
    chosen = placement.path, placement.prefill.worker_id
    costs = {(path, cost.worker_id): cost for path, cost in placement.costs}
    own = costs.pop(chosen, None)
    if own is None:
        return None
    others = [(path, cost) for (path, _), cost in costs.items()]
    best = min(others, key=lambda other: other[1].price_s, default=None)
    return Regret(measured, own, best)
