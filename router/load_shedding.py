"""Refuses at once what could not be served in time, and says when to come again.

Owns the limits on a predicted wait, what the router knows to predict it, and the time until another
try. Does not know the queue, permits or HTTP; `router.expected_wait` makes the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.config import PlacementConfig
from core.errors import TooLate
from core.ids import Ids
from core.ports import Clock
from router.candidate import Candidate
from router.expected_wait import (
    Ahead,
    ExpectedWait,
    PrefillWork,
    ReleaseRate,
    expected_wait,
    prefill_work,
)
from router.refusals import bounded_wait_s

JITTER_SHARE = 0.25
"""Clients that were refused together should not come back together."""
WORK_FRESH_S = 0.1
"""Workers report twice a second: to ask all of them for every request would be dear."""
IDLE = PrefillWork()


class LoadShedding:
    """Decides by a prediction; without one it refuses nothing."""

    def __init__(
        self,
        clock: Clock,
        ids: Ids,
        queue_wait_s: float,
        max_ttft_s: float = 0.0,
        rules: PlacementConfig | None = None,
        read_workers: Callable[[], Sequence[Candidate]] = list,
    ) -> None:
        """Start without a prediction.

        Args:
            clock: On which deadlines are.
            ids: The source of randomness.
            queue_wait_s: Longest wait for a permit; one that would be longer is not begun.
            max_ttft_s: Longest predicted wait for the first token; 0: any.
            rules: Which prompts are computed where they are decoded.
            read_workers: Lists live workers.
        """
        self._clock = clock
        self._ids = ids
        self._queue_wait_s = queue_wait_s
        self._max_ttft_s = max_ttft_s
        self._rules = rules or PlacementConfig()
        self._read_workers = read_workers
        self._releases = ReleaseRate()
        self._work = IDLE
        self._work_read_s: float | None = None

    def released(self, *, is_awaited: bool) -> None:
        """Note that a request has given back its permits; `is_awaited`: others still wait."""
        self._releases.released(self._clock.now_s(), is_awaited=is_awaited)

    def check(
        self, ahead: Ahead, num_tokens: int | None = None, deadline_at: float | None = None
    ) -> None:
        """Refuse a newcomer that would wait too long.

        Args:
            ahead: What stands before it.
            num_tokens: Of its prompt; None: not read yet, and it may be short.
            deadline_at: When it must have ended, on the clock.

        Raises:
            TooLate: Says how long it would wait, and how long it may.
        """
        # One request always runs: it alone can show that a prediction no longer holds.
        if not ahead.num_running:
            return
        now_s = self._clock.now_s()
        wait = self._expected(ahead, num_tokens, now_s)
        limits = [(wait.permit_s, self._queue_wait_s, "a permit", "router.queue_wait_s")]
        if self._max_ttft_s:
            limits.append((wait.first_token_s, self._max_ttft_s, "its turn", "router.max_ttft_s"))
        if deadline_at is not None:
            left_s = max(0.0, deadline_at - now_s)
            limits.append((wait.first_token_s, left_s, "its turn", "the time left to it"))
        for wait_s, limit_s, for_what, name in limits:
            if wait_s > limit_s:
                raise TooLate(
                    f"the request would wait {wait_s:.2f} s for {for_what}, {name} is "
                    f"{limit_s:.2f} s; try again later",
                    self.retry_after_s(wait_s - limit_s),
                )

    def _expected(self, ahead: Ahead, num_tokens: int | None, now_s: float) -> ExpectedWait:
        is_long = num_tokens is not None and num_tokens >= self._rules.local_below_tokens
        work = self._prefill_work(now_s) if is_long else IDLE
        return expected_wait(ahead, self._releases.interval_s(now_s), work)

    def _prefill_work(self, now_s: float) -> PrefillWork:
        """Read what those workers have to do that compute prompts for others, if there are any."""
        read_s = self._work_read_s
        if read_s is None or not 0 <= now_s - read_s < WORK_FRESH_S:
            workers = self._read_workers()
            apart = [c for c in workers if c.is_prefill] if self._rules.path != "local" else []
            self._work = prefill_work(apart or workers, now_s)
            self._work_read_s = now_s
        return self._work

    def retry_when_free_s(self, ahead: Ahead) -> float:
        """Return when a request that found no place should come again (seconds)."""
        self._releases.wanted()
        interval_s = self._releases.interval_s(self._clock.now_s())
        return self.retry_after_s(expected_wait(ahead, interval_s, IDLE).permit_s)

    def retry_after_s(self, room_in_s: float) -> float:
        """Spread the time until there is room again over those who were refused (seconds)."""
        return bounded_wait_s(self._ids.spread(bounded_wait_s(room_in_s), JITTER_SHARE))
