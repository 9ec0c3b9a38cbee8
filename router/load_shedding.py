"""Refuses at once what could not be served in time, and says when to come again.

Owns the limits on a predicted wait, what the router knows to predict it, and the time until another
try. Does not know the queue, permits or HTTP; `router.expected_wait` makes the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core.config import PlacementConfig, TierConfig
from core.errors import Overloaded, TooLate
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
OnExpected = Callable[[ExpectedWait, float], None]
"""Gets a predicted wait, and the longest that its tier allows before the first token; 0: any."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a newcomer is to be refused."""

    kind: type[Overloaded]
    message: str
    room_in_s: float
    """Predicted, until there would be room for it."""


class _Limit(NamedTuple):
    """One predicted wait, and how long it may be."""

    wait_s: float
    limit_s: float
    purpose: str
    """What the request would wait for."""
    name: str
    """The limit's, as the client is told."""


class LoadShedding:
    """Decides by a prediction; without one it refuses nothing."""

    def __init__(
        self,
        clock: Clock,
        ids: Ids,
        tiers: Mapping[str, TierConfig],
        queue_wait_s: float,
        rules: PlacementConfig | None = None,
        read_workers: Callable[[str], Sequence[Candidate]] = lambda tier: (),
    ) -> None:
        """Start without a prediction.

        Args:
            clock: On which deadlines are.
            ids: The source of randomness.
            tiers: Each with its limits.
            queue_wait_s: Longest wait for a permit, where a tier has no other; one that would be
                longer is not begun.
            rules: Which prompts are computed where they are decoded.
            read_workers: Lists the live workers that a tier may use.
        """
        self._clock = clock
        self._ids = ids
        self._tiers = tiers
        self._queue_wait_s = queue_wait_s
        self._rules = rules or PlacementConfig()
        self._read_workers = read_workers
        self._releases = ReleaseRate()
        self._own_releases = {tier: ReleaseRate() for tier in tiers}
        """Of each tier, while it has its share."""
        self._work: dict[str, tuple[float, PrefillWork]] = {}
        """For each tier, and when it was read."""

    def released(self, tier: str, *, is_awaited: bool, is_share_awaited: bool = False) -> None:
        """Note that a request has given back its permits.

        Args:
            tier: Its tier.
            is_awaited: Others wait for any permit.
            is_share_awaited: Others wait because the tier has its share.
        """
        now_s = self._clock.now_s()
        self._releases.released(now_s, is_awaited=is_awaited)
        self._own_releases[tier].released(now_s, is_awaited=is_share_awaited)

    def too_late(
        self,
        tier: str,
        ahead: Ahead,
        num_tokens: int | None = None,
        deadline_at: float | None = None,
        on_expected: OnExpected | None = None,
    ) -> Shortage | None:
        """Say how long a newcomer would wait, and how long it may; None: not too long.

        Args:
            tier: Its tier.
            ahead: What is ahead of it.
            num_tokens: Of its prompt; None: not read yet, and it may be short.
            deadline_at: When it must have ended, on the clock.
            on_expected: Hears of the prediction, if there is one.
        """
        # One request always runs: it alone can show that a prediction no longer holds.
        if not ahead.num_running:
            return None
        now_s = self._clock.now_s()
        wait = self._expected(tier, ahead, self._work_for(tier, num_tokens, now_s), now_s)
        if on_expected is not None:
            on_expected(wait, self._tiers[tier].max_ttft_s)
        left_s = None if deadline_at is None else max(0.0, deadline_at - now_s)
        for limit in self._limits(tier, wait, left_s):
            if limit.wait_s > limit.limit_s:
                return Shortage(
                    TooLate,
                    f"the request would wait {limit.wait_s:.2f} s for {limit.purpose}, "
                    f"{limit.name} is {limit.limit_s:.2f} s; try again later",
                    limit.wait_s - limit.limit_s,
                )
        return None

    def _limits(self, tier: str, wait: ExpectedWait, left_s: float | None) -> Iterator[_Limit]:
        """List the limits on a newcomer's wait.

        Args:
            tier: The newcomer's.
            wait: Predicted for it.
            left_s: Until its deadline; None: it has none that is known.
        """
        own = self._tiers[tier]
        if own.queue_wait_s is None:
            yield _Limit(wait.permit_s, self._queue_wait_s, "a permit", "router.queue_wait_s")
        else:
            name = f"tiers.{tier}.queue_wait_s"
            yield _Limit(wait.permit_s, own.queue_wait_s, "a permit", name)
        if own.max_ttft_s:
            name = f"tiers.{tier}.max_ttft_s"
            yield _Limit(wait.first_token_s, own.max_ttft_s, "its turn", name)
        if left_s is not None:
            # What workers seem to need counts only for those who ask for a limit on it: one that
            # stood still for a while looks slow for long after.
            yield _Limit(wait.permit_s, left_s, "a permit", "the time left to it")

    def _expected(self, tier: str, ahead: Ahead, work: PrefillWork, now_s: float) -> ExpectedWait:
        own_interval_s = self._own_releases[tier].interval_s(now_s)
        return expected_wait(ahead, self._releases.interval_s(now_s), work, own_interval_s)

    def _work_for(self, tier: str, num_tokens: int | None, now_s: float) -> PrefillWork:
        is_long = num_tokens is not None and num_tokens >= self._rules.local_below_tokens
        return self._prefill_work(tier, now_s) if is_long else IDLE

    def _prefill_work(self, tier: str, now_s: float) -> PrefillWork:
        """Read what those workers have to do that a long prompt may go to."""
        known = self._work.get(tier)
        if known is None or not 0 <= now_s - known[0] < WORK_FRESH_S:
            workers = self._read_workers(tier)
            work = prefill_work([c for c in workers if self._may_compute(c)] or workers, now_s)
            known = self._work[tier] = now_s, work
        return known[1]

    def _may_compute(self, c: Candidate) -> bool:
        """True if a worker computes long prompts for others, or has nobody whom one would delay."""
        rules = self._rules
        if c.is_prefill or rules.path != "auto":
            return c.is_prefill and rules.path != "local"
        return rules.min_local_saving < 1 and not c.num_decoding

    def room_in_s(self, tier: str, ahead: Ahead) -> float:
        """Note that a request found no room, and predict when there will be some (seconds)."""
        # A tier that has its share may wait for its own permits while others are free.
        lacking = self._own_releases[tier] if ahead.num_own_releases else self._releases
        lacking.wanted()
        return self._expected(tier, ahead, IDLE, self._clock.now_s()).permit_s

    def refusal(self, shortage: Shortage) -> Overloaded:
        """Make the error of a refusal."""
        return shortage.kind(shortage.message, self.retry_after_s(shortage.room_in_s))

    def retry_after_s(self, room_in_s: float) -> float:
        """Spread the time until there is room again over those who were refused (seconds)."""
        return bounded_wait_s(self._ids.spread(bounded_wait_s(room_in_s), JITTER_SHARE))
