"""Whether a worker lives: it reports, and its steps advance.

Owns the two limits. Does not know streams: what stands still stands still over reconnects, too.
"""

from __future__ import annotations

import asyncio

from core.awake_clock import AwakeClock
from core.errors import WorkerDied, WorkerLost
from core.ids import WorkerId
from core.ports import Clock
from core.session import Progress

HUNG_S = 3.0
CHECK_PERIOD_S = 0.5


class Liveness:
    """Watches one worker. Time in which this process itself was suspended does not count."""

    def __init__(self, worker_id: WorkerId, clock: Clock) -> None:
        """Prepare; `connected` starts the watch."""
        self._worker_id = worker_id
        self._awake = AwakeClock(clock)
        self._counters: tuple[int, int] | None = None
        self._received_at = 0.0
        self._moved_at = 0.0

    def connected(self) -> None:
        """Note a new stream: the silence before it does not count."""
        self._awake.tick()
        self.note_message()

    def note_message(self) -> None:
        """Note that a message arrived, of any kind."""
        self._received_at = self._awake.now_s()

    def note_progress(self, progress: Progress) -> None:
        """Note the worker's counters: equal ones while it has work mean that it stands still.

        Raises:
            WorkerDied: It has work, and no counter has moved for 3 s.
        """
        counters = (progress.steps, progress.layers_done)
        # An idle worker's counters stand still, and it is well.
        if counters != self._counters or not progress.work_in_hand:
            self._counters = counters
            self._moved_at = self._received_at
        # By the times of messages, not by now: a worker that is silent is `watch`'s to find.
        if self._received_at - self._moved_at > HUNG_S:
            raise WorkerDied(f"worker {self._worker_id} is stuck in a step")

    async def watch(self) -> None:
        """Check twice a second, until cancelled.

        Raises:
            WorkerLost: No message came for 3 s.
        """
        while True:
            await asyncio.sleep(CHECK_PERIOD_S)
            self._awake.tick()
            if self._awake.now_s() - self._received_at > HUNG_S:
                raise WorkerLost(f"worker {self._worker_id} was silent for {HUNG_S:g} s")
