"""How long a request that comes now would wait for its first token, because of those before it.

Owns the rate at which permits come free, and the prediction made of it and of what workers report.
Pure: time is an argument. Does not know limits, errors, or who holds a permit.

    larger of  requests ahead x seconds between releases
               its tier's releases before it x seconds between these, if the tier has its share
               prompt tokens ahead / prefill tokens/s of all workers
    + least time for which a worker has prompts to compute already

What the request itself takes is left out: coming again later would not shorten it. Whatever is not
known, or is no number, counts nothing, so a request is only refused for what was measured of late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from router.candidate import Candidate

NUM_INTERVALS = 64
"""Between releases, that are kept: a step ends several requests at once."""
MIN_INTERVALS = 8
"""Fewer say nothing."""
MIN_PATIENCE_S = 5.0
MAX_PATIENCE_S = 120.0
PATIENCE_INTERVALS = 8
"""After so many usual intervals without a release, within these limits, nothing that was measured
holds any more: workers stand still, the load has ended, or the clock has jumped."""


class ReleaseRate:
    """How fast permits come free while requests wait for them; at other times nothing is learned.

    A router that is not full releases permits only as fast as requests come, which says nothing of
    how fast it could.
    """

    def __init__(self) -> None:
        """Start without any release."""
        self._intervals_s: deque[float] = deque(maxlen=NUM_INTERVALS)
        self._released_s = 0.0
        self._measured_s = 0.0
        self._is_awaited = False

    def released(self, now_s: float, *, is_awaited: bool) -> None:
        """Note that a request has given back its permits; `is_awaited`: others still wait."""
        if self._is_awaited:
            if not self._is_fresh(now_s):
                self._intervals_s.clear()
            interval_s = now_s - self._released_s
            if 0 <= interval_s <= MAX_PATIENCE_S:
                self._intervals_s.append(interval_s)
                self._measured_s = now_s
        self._released_s = now_s
        self._is_awaited = is_awaited

    def wanted(self) -> None:
        """Note that a request found no permit and could not wait for one."""
        self._is_awaited = True

    def interval_s(self, now_s: float) -> float | None:
        """Return the usual time between two releases (seconds); None: not known."""
        num = len(self._intervals_s)
        if num < MIN_INTERVALS or not self._is_fresh(now_s):
            return None
        # Without the longest: one pause, or one jump of the clock, is not what is usual.
        return (sum(self._intervals_s) - max(self._intervals_s)) / (num - 1)

    def _is_fresh(self, now_s: float) -> bool:
        num = len(self._intervals_s)
        usual_s = PATIENCE_INTERVALS * sum(self._intervals_s) / num if num else 0.0
        patience_s = min(max(MIN_PATIENCE_S, usual_s), MAX_PATIENCE_S)
        return 0 <= now_s - self._measured_s <= patience_s


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is ahead of a newcomer in this router."""

    num_running: int
    """Permits that are taken."""
    num_requests: int
    """Requests that wait and have their turn before it."""
    num_tokens: int
    """Of their prompts."""
    is_free: bool
    """True if a permit is free and nobody goes before it."""
    num_own_releases: int = 0
    """Releases of its tier's permits until it is within the tier's share."""


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """What the workers that compute prompts have before them."""

    least_s: float = 0.0
    """Until the first of them could begin with another prompt."""
    tokens_per_s: float = inf
    """Of all of them; without a limit where one was not measured."""


@dataclass(frozen=True, slots=True)
class ExpectedWait:
    """The prediction for a newcomer, in seconds."""

    permit_s: float
    """Until it has its permits."""
    first_token_s: float
    """Until its prompt is the next to be computed."""


def expected_wait(
    ahead: Ahead,
    interval_s: float | None,
    work: PrefillWork,
    own_interval_s: float | None = None,
) -> ExpectedWait:
    """Predict the wait of a newcomer.

    Args:
        ahead: What is ahead of it.
        interval_s: That of `ReleaseRate`.
        work: Of the workers.
        own_interval_s: The same of its tier alone, while the tier had its share.
    """
    permit_s = 0.0
    if not ahead.is_free:
        permit_s = max(
            (ahead.num_requests + 1) * (interval_s or 0.0),
            ahead.num_own_releases * (own_interval_s or 0.0),
        )
    prompts_s = ahead.num_tokens / work.tokens_per_s
    return ExpectedWait(permit_s, max(permit_s, prompts_s) + work.least_s)


def prefill_work(candidates: Sequence[Candidate], now_s: float) -> PrefillWork:
    """Sum up what the workers have to compute that a prompt may go to.

    Args:
        candidates: These workers.
        now_s: On the clock of the candidates' instants.
    """
    if not candidates:
        return PrefillWork()
    speeds = [_tokens_per_s(c) for c in candidates]
    queued_s = [
        _queued_tokens(c, speed, now_s) / speed for c, speed in zip(candidates, speeds, strict=True)
    ]
    return PrefillWork(min(queued_s), sum(speeds))


def _tokens_per_s(c: Candidate) -> float:
    """Return a worker's speed, without a limit while it is not known."""
    return c.prefill_tokens_per_s if 0 < c.prefill_tokens_per_s < inf else inf


def _queued_tokens(c: Candidate, tokens_per_s: float, now_s: float) -> float:
    """Count tokens to compute, less what must be done by now of the prompt that came first."""
    queued = c.queued_tokens
    if not 0 < queued < inf:
        return 0.0
    done = (now_s - c.head_started_s) * tokens_per_s
    # Not a number: no speed is known, or the clock is none.
    return queued - min(done, c.head_tokens) if done > 0 else queued
