"""How many retries after faults this router may start, and how fast.

Owns one rate with a burst, so that retries do not bring down a cluster in trouble: the burst covers
the loss of whole workers, and beyond it retries wait their turn. Pure: `now_s` is an argument. Does
not know requests. The method is GCRA (ITU-T I.371), whose only state is one instant.
"""

from __future__ import annotations


class RetryBudget:
    """A router's share of the cluster's retry budget."""

    def __init__(self, burst: int, per_s: float) -> None:
        """Start full.

        Args:
            burst: Retries that may start at once.
            per_s: Retries per second in the long run.
        """
        self._interval_s = 1.0 / per_s
        self._tolerance_s = (burst - 1) / per_s
        self._full_at = 0.0
        """When the bucket will be full again, if nobody takes from it meanwhile."""

    def reserve(self, now_s: float, patience_s: float) -> float | None:
        """Take one retry.

        Args:
            now_s: Current instant.
            patience_s: Longest wait that the caller accepts.

        Returns:
            Seconds to wait before starting; None, with nothing taken, if that is too long.
        """
        # The generic cell rate algorithm: a token bucket in one number, without a refill.
        full_at = max(self._full_at, now_s)
        delay_s = max(0.0, full_at - self._tolerance_s - now_s)
        if delay_s > patience_s:
            return None
        self._full_at = full_at + self._interval_s
        return delay_s
