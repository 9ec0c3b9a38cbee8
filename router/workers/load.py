"""How busy one worker is: what it reported last, and what this router has sent it since.

Owns the account of unanswered prompts, the measured speed and lateness, and the candidate that
placement compares. Does not know streams or attempts.
"""

from __future__ import annotations

import math

from core.ids import RunId, WorkerId
from core.session import Load, WorkerDescriptor
from router.candidate import RECENT_S, Candidate
from router.workers.hand_overs import HandOvers

NEWEST_SHARE = 0.2
"""Weight of the newest prompt in a measured speed."""
MIN_MEASURED_TOKENS = 32
"""A shorter prompt tells of a step's overhead, not of its speed."""
SPEED_KEPT_S = 600.0
"""A speed that no prompt confirmed for so long counts as not measured. Placement leaves a slow
worker: without this, one bad moment would count for ever."""


class WorkerLoad:
    """The load of one worker, as this router sees it."""

    def __init__(self, descriptor: WorkerDescriptor) -> None:
        """Start idle: nothing is reported yet, and nothing is sent."""
        self._descriptor = descriptor
        self._reported = Load()
        self._pending: set[RunId] = set()
        self._answered: set[RunId] = set()
        """Of the pending ones."""
        self._unanswered: dict[RunId, int] = {}
        """Tokens of each prompt, in the order in which they were sent."""
        self._head_started_s = 0.0
        self._num_unanswered_tokens = 0
        self._num_reported_tokens = 0
        self._num_reported_requests = 0
        self._tokens_per_s = 0.0
        self._measured_at_s = 0.0
        self._recent_work = 0.0
        self._hand_overs = HandOvers()
        # Placement reads every worker for every request, and few have changed since the last.
        self._candidate: Candidate | None = None

    @property
    def reported(self) -> Load:
        """What the worker reported last."""
        return self._reported

    @property
    def candidate(self) -> Candidate:
        """The worker as placement compares it."""
        if self._candidate is None:
            self._candidate = Candidate(
                self._descriptor,
                self._reported,
                self._num_unanswered_tokens,
                len(self._pending),
                answered_requests=len(self._answered),
                reported_tokens=self._num_reported_tokens,
                reported_requests=self._num_reported_requests,
                head_tokens=next(iter(self._unanswered.values()), 0),
                head_started_s=self._head_started_s,
                prefill_tokens_per_s=self._tokens_per_s,
                exposed_transfer_s=self._hand_overs.mean_s,
                exposed_by_receiver=self._hand_overs.by_receiver,
                recent_work=self._recent_work,
            )
        return self._candidate

    def report(self, load: Load, now_s: float) -> None:
        """Replace what the worker reported before."""
        if self._hand_overs.forget_old(now_s):
            self._candidate = None
        if self._tokens_per_s and now_s - self._measured_at_s >= SPEED_KEPT_S:
            self._tokens_per_s = 0.0
            self._candidate = None
        own = self._num_unanswered_tokens, len(self._pending)
        if load != self._reported or own != (
            self._num_reported_tokens,
            self._num_reported_requests,
        ):
            self._reported = load
            self._num_reported_tokens, self._num_reported_requests = own
            self._candidate = None

    def measured(self, num_tokens: int, seconds: float, now_s: float) -> None:
        """Learn the worker's speed from a prompt of which it computed `num_tokens`."""
        # A worker's figures are not ours: what is no number would stay in the mean for ever.
        if num_tokens < MIN_MEASURED_TOKENS or not 0 < seconds < math.inf:
            return
        newest = num_tokens / seconds
        known = self._tokens_per_s or newest
        self._tokens_per_s = known + NEWEST_SHARE * (newest - known)
        self._measured_at_s = now_s
        self._candidate = None

    def handed_over(self, receiver: WorkerId, exposed_s: float, now_s: float) -> None:
        """Learn how late the worker's KV came: `exposed_s` behind the first token."""
        self._hand_overs.note(receiver, exposed_s, now_s)
        self._candidate = None

    def add(self, run_id: RunId, num_tokens: int, now_s: float) -> None:
        """Count a run; its `num_tokens` count too, until the worker first answers."""
        if num_tokens:
            # The logarithm of a sum in which the newest weighs most: it only grows, and workers
            # compare without bringing their sums to one instant.
            newest = math.log(num_tokens) + now_s / RECENT_S
            older = self._recent_work
            self._recent_work = max(newest, older) + math.log1p(math.exp(-abs(newest - older)))
            if not self._unanswered:
                self._head_started_s = now_s
            self._unanswered[run_id] = num_tokens
        self._pending.add(run_id)
        self._num_unanswered_tokens += num_tokens
        self._candidate = None

    def answered(self, run_id: RunId, now_s: float) -> None:
        """Stop counting a run's prompt: it is computed, and delays no other."""
        if run_id in self._pending and run_id not in self._answered:
            self._answered.add(run_id)
            self._candidate = None
        num_tokens = self._unanswered.pop(run_id, 0)
        if num_tokens:
            self._num_unanswered_tokens -= num_tokens
            self._head_started_s = max(self._head_started_s, now_s)
            self._candidate = None

    def remove(self, run_id: RunId, now_s: float) -> None:
        """Stop counting a run."""
        self.answered(run_id, now_s)
        self._pending.discard(run_id)
        self._answered.discard(run_id)
        self._candidate = None

    def clear(self) -> None:
        """Stop counting every run: the worker is lost, and they go elsewhere."""
        self._pending.clear()
        self._answered.clear()
        self._unanswered.clear()
        self._num_unanswered_tokens = 0
        self._num_reported_tokens = 0
        self._num_reported_requests = 0
        self._candidate = None
