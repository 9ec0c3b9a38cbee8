"""How busy one worker is: what it reported last, and what this router has sent it since.

Owns the account of unanswered prompts and the candidate that placement compares. Does not know
streams or attempts.
"""

from __future__ import annotations

from core.ids import RunId
from core.session import Load, WorkerDescriptor
from router.placement import Candidate


class WorkerLoad:
    """The load of one worker, as this router sees it."""

    def __init__(self, descriptor: WorkerDescriptor) -> None:
        """Start idle: nothing is reported yet, and nothing is sent."""
        self._descriptor = descriptor
        self._reported = Load()
        self._pending: set[RunId] = set()
        self._unanswered: dict[RunId, int] = {}
        self._num_unanswered_tokens = 0
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
                self._descriptor, self._reported, self._num_unanswered_tokens, len(self._pending)
            )
        return self._candidate

    def report(self, load: Load) -> None:
        """Replace what the worker reported before."""
        if load != self._reported:
            self._reported = load
            self._candidate = None

    def add(self, run_id: RunId, num_tokens: int) -> None:
        """Count a run; its `num_tokens` count too, until the worker first answers."""
        self._pending.add(run_id)
        self._unanswered[run_id] = num_tokens
        self._num_unanswered_tokens += num_tokens
        self._candidate = None

    def answered(self, run_id: RunId) -> None:
        """Stop counting a run's prompt: it is computed, and delays no other."""
        num_tokens = self._unanswered.pop(run_id, 0)
        if num_tokens:
            self._num_unanswered_tokens -= num_tokens
            self._candidate = None

    def remove(self, run_id: RunId) -> None:
        """Stop counting a run."""
        self.answered(run_id)
        self._pending.discard(run_id)
        self._candidate = None

    def clear(self) -> None:
        """Stop counting every run: the worker is lost, and they go elsewhere."""
        self._pending.clear()
        self._unanswered.clear()
        self._num_unanswered_tokens = 0
        self._candidate = None
