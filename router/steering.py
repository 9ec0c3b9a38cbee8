"""Which workers a caller's key used last: a hint of where its prompts are cached.

Owns the keys of this router, bounded in number. Does not know costs, nor what workers hold.

The index says more, and decides: a key counts where the index is empty or late, and where costs are
near (`router.cost.PREFERENCE`). A tenant's keys are its own.
"""

from __future__ import annotations

from collections import OrderedDict

from core.ids import WorkerId
from core.session import Role
from core.types import GenerateRequest
from router.placement import Placement

MAX_KEYS = 16_384


class Steering:
    """The latest keys, and for each the last worker of either role that it used."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        """Know no key."""
        self._max_keys = max_keys
        self._workers: OrderedDict[tuple[str, str], dict[Role, WorkerId]] = OrderedDict()

    def preferred(self, request: GenerateRequest) -> frozenset[WorkerId]:
        """Return the workers that the first known one of a request's keys used."""
        for key in request.affinity:
            workers = self._workers.get((request.tenant, key))
            if workers is not None:
                return frozenset(workers.values())
        return frozenset()

    def placed(self, request: GenerateRequest, placement: Placement) -> None:
        """A request goes to these workers; the key that was used longest ago makes room."""
        for key in request.affinity:
            workers = self._workers.setdefault((request.tenant, key), {})
            # By role: a turn that one worker serves alone leaves the other's prefix where it is.
            for worker in (placement.prefill, placement.decode):
                workers[worker.role] = worker.worker_id
            self._workers.move_to_end((request.tenant, key))
            if len(self._workers) > self._max_keys:
                self._workers.popitem(last=False)
