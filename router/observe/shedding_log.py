"""Logs that load is shed, once a period, however many requests are refused.

Owns that period. Does not know why there is no room.
"""

from __future__ import annotations

from collections.abc import Callable

from core import events
from router.admission import Admission
from router.refusals import OVERLOAD_CODES

PERIOD_S = 10.0


class SheddingLog:
    """Counts the refusals between two events."""

    def __init__(self, admission: Admission, now_s: Callable[[], float]) -> None:
        """Start; `now_s` is in monotonic seconds."""
        self._admission = admission
        self._now_s = now_s
        self._logged_at = now_s() - PERIOD_S
        self._num_refused = 0

    def note(self, code: str) -> None:
        """Count a refusal; the first is logged at once, later ones every ten seconds."""
        if code not in OVERLOAD_CODES:
            return
        # Counted even while nothing is logged: the next line says how many there were.
        self._num_refused += 1
        now_s = self._now_s()
        if now_s - self._logged_at >= PERIOD_S:
            events.LOAD_SHED.log(
                refused=self._num_refused,
                running=self._admission.num_running,
                queued=self._admission.num_queued,
            )
            self._logged_at = now_s
            self._num_refused = 0
