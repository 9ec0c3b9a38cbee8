"""Load that is shed: told of while it lasts, however many requests that are.

Owns how often that is said. Does not know why there is no room.
"""

from __future__ import annotations

from collections.abc import Callable

from core import events
from core.errors import Overloaded
from router.admission import Admission

PERIOD_S = 10.0


class Shedding:
    """Counts refusals for want of room between two events."""

    def __init__(self, admission: Admission, now_s: Callable[[], float]) -> None:
        """Begin; `now_s` is in monotonic seconds."""
        self._admission = admission
        self._now_s = now_s
        self._told_at = now_s() - PERIOD_S
        self._num_refused = 0

    def note(self, code: str) -> None:
        """A refusal: the first is told at once, later ones every ten seconds."""
        if code != Overloaded.code:
            return
        self._num_refused += 1
        now_s = self._now_s()
        if now_s - self._told_at >= PERIOD_S:
            events.LOAD_SHED.tell(
                refused=self._num_refused,
                running=self._admission.num_running,
                queued=self._admission.num_queued,
            )
            self._told_at = now_s
            self._num_refused = 0
