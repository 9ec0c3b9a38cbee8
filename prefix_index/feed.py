"""A router's view, kept up to date from the store.

Owns the position in each worker's log, the check that no batch is missing, and when a whole content
is read: at first sight, and after a gap. Does not know Redis, nor who asks the view.

No request waits for it. While the store fails the view stays as it is, and grows old.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from core import events
from core.containment import contained
from core.ids import WorkerLife
from core.ports import START, Clock, PrefixStore, StoreFailed
from core.prefix_changes import PrefixChange
from prefix_index.entries import BadEntry, EntryCodec, Head
from prefix_index.view import PrefixView

WAIT_S = 0.25
"""Longest wait for a batch; then the members are looked at again."""
RETRY_WHOLE_S = 0.5
"""Between two readings of one worker's whole content, whatever its log says."""
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
"""While the store fails, before and after it counts as down."""
FAILURES_TO_BREAK = 3
LAG_KEPT_S = 10.0
"""How long a lag is shown that is over: about a scrape's interval."""
SWEEP_BLOCKS = 4_096


@dataclass(slots=True)
class _Follower:
    """How far one life's log was read."""

    number: int = 0
    """Of the last batch in the view."""
    position: str = START
    is_begun: bool = False
    """The view has a whole content, so that batches after it mean something."""
    wanted: int | None = 0
    """Lowest number of a whole content that would mend a gap; None: there is none."""
    look_at: float = 0.0
    begun_at: float = 0.0
    """When the whole content was read."""


class PrefixFeed:
    """Applies what workers publish to one view."""

    def __init__(
        self,
        store: PrefixStore,
        view: PrefixView,
        read_members: Callable[[], Iterable[WorkerLife]],
        codec: EntryCodec,
        clock: Clock,
    ) -> None:
        """Keep the collaborators; nothing is read until `run`.

        Args:
            store: Where from.
            view: What is changed.
            read_members: The lives that count now; all others are forgotten.
            codec: Reads entries.
            clock: For pauses and the age.
        """
        self.view = view
        self.state: Literal["starting", "ok", "down"] = "starting"
        self.refused: Counter[str] = Counter()
        """Entries that did not count, by reason."""
        self.num_gaps = 0
        self.num_wholes = 0
        self.num_batches = 0
        self._store = store
        self._read_members = read_members
        self._codec = codec
        self._clock = clock
        self._followers: dict[WorkerLife, _Follower] = {}
        self._num_failures = 0
        self._fresh_at: float | None = None
        self._began_at = clock.now_s()
        self._worst_lag = (self._began_at, 0.0)

    @property
    def age_s(self) -> float | None:
        """Seconds since the last answer of the store; None: never."""
        return None if self._fresh_at is None else self._clock.now_s() - self._fresh_at

    @property
    def lag_s(self) -> float:
        """Longest time of late that a batch lay in the store before it was read (seconds)."""
        at, lag_s = self._worst_lag
        return lag_s if self._clock.now_s() - at < LAG_KEPT_S else 0.0

    def report(self) -> dict[str, Any]:
        """Describe the view and how it is kept, in plain values."""
        age_s = self.age_s
        return {
            "state": self.state,
            "age_s": round(self._clock.now_s() - self._began_at if age_s is None else age_s, 3),
            "lag_s": round(self.lag_s, 4),
            "entries": self.view.num_entries,
            "leaving": self.view.num_leaving,
            "gaps": self.num_gaps,
            "refused": dict(self.refused),
            "workers": dict(self.view.workers()),
        }

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                pause_s = await self._turn()
                self.view.sweep(SWEEP_BLOCKS)
                await asyncio.sleep(pause_s)
        finally:
            await self._store.close()

    async def _turn(self) -> float:
        reason = "a fault of this router; the log has the traceback"
        with contained("following the prefix index"):
            try:
                await self.read()
            except StoreFailed as error:
                reason = str(error)
            else:
                reason = ""
        if reason:
            self._num_failures += 1
            # Once per outage: this turn comes again until the store is back.
            if self._num_failures == FAILURES_TO_BREAK:
                self.state = "down"
                events.PREFIX_INDEX_DOWN.log(reason=reason)
            return float(min(FIRST_PAUSE_S * 2 ** min(self._num_failures, 9), MAX_PAUSE_S))
        self._num_failures = 0
        self._fresh_at = self._clock.now_s()
        if self.state != "ok":
            self.state = "ok"
            events.PREFIX_INDEX_UP.log()
        return 0.0

    async def read(self) -> None:
        """Follow the members, and take over what is new; waits a while if nothing is.

        Raises:
            StoreFailed: The view stays as far as it came.
        """
        self._follow_members()
        now_s = self._clock.now_s()
        for life, follower in list(self._followers.items()):
            if follower.wanted is not None and now_s >= follower.look_at:
                follower.look_at = now_s + RETRY_WHOLE_S
                await self._read_whole(life, follower, follower.wanted)
        positions = {
            life: follower.position
            for life, follower in self._followers.items()
            if follower.is_begun
        }
        if not positions:
            await asyncio.sleep(WAIT_S)
            return
        for life, entries in (await self._store.read_log(positions, WAIT_S)).items():
            follower = self._followers[life]
            if entries:
                self._note_lag(follower, self._store.age_s(entries[0][0]))
            for position, entry in entries:
                follower.position = position
                self._take(life, follower, entry)
            await asyncio.sleep(0)

    def _follow_members(self) -> None:
        lives = set(self._read_members())
        for life in [life for life in self._followers if life not in lives]:
            del self._followers[life]
            worker, incarnation = life
            self.view.forget(worker, incarnation)
        for life in sorted(lives - self._followers.keys()):
            self._followers[life] = _Follower()

    async def _read_whole(self, life: WorkerLife, follower: _Follower, wanted: int) -> None:
        entry = await self._store.read_head(life)
        if entry is None:
            return
        try:
            head = self._codec.read_head(life, entry)
            changes = await self._read_segments(life, head) if head.number >= wanted else None
        except BadEntry as error:
            self.refused[error.reason] += 1
            return
        if changes is None:
            return
        worker, incarnation = life
        # Empty first: what the worker evicted unseen must go, too.
        self.view.apply(worker, incarnation, PrefixChange(is_whole=True))
        for change in changes:
            self.view.apply(worker, incarnation, change)
            await asyncio.sleep(0)
        follower.number = head.number
        follower.position = head.position
        follower.is_begun = True
        follower.begun_at = self._clock.now_s()
        follower.wanted = None
        self.num_wholes += 1

    async def _read_segments(self, life: WorkerLife, head: Head) -> list[PrefixChange] | None:
        """Read a whole content; None if a segment has gone, as when another took its place."""
        changes = []
        for index in range(head.num_segments):
            segment = await self._store.read_segment(life, head.number, index)
            if segment is None:
                return None
            changes.append(self._codec.read_segment(life, head.number, index, segment))
        return changes

    def _note_lag(self, follower: _Follower, lag_s: float) -> None:
        # What was there before this router looked is old, and not late.
        if self._clock.now_s() - follower.begun_at >= lag_s >= self.lag_s:
            self._worst_lag = (self._clock.now_s(), lag_s)

    def _take(self, life: WorkerLife, follower: _Follower, entry: bytes) -> None:
        try:
            batch = self._codec.read_batch(life, entry)
        except BadEntry as error:
            self.refused[error.reason] += 1
            return
        if batch.number <= follower.number:
            return
        if batch.number != follower.number + 1:
            # What is missing makes the view wrong in places, which costs hits; it goes on.
            self.num_gaps += 1
            follower.wanted = batch.number - 1
        worker, incarnation = life
        self.view.apply(worker, incarnation, batch.change)
        follower.number = batch.number
        self.num_batches += 1
