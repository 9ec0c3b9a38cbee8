"""Time that all routers count alike, and whether their store has lost something.

Owns the offset to this router's own clock, and the epoch of the store. Does not know charges.

Every router counts with its monotonic clock, and the store only keeps how far the furthest has
counted: no wall clock, of a router or of the store, can free a key or lock it by a jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from core.ports import Clock, StoredValue
from router.quotas.values import ClockValue, ValueCodec

CLOCK = "clock"
"""Its name in the store."""
NEVER_MS = -1


class SharedClock:
    """Whole milliseconds that never go back."""

    def __init__(
        self,
        clock: Clock,
        codec: ValueCodec,
        new_epoch: Callable[[], str],
        on_set: Callable[[int], None],
    ) -> None:
        """Count alone, until the store was seen.

        Args:
            clock: This router's own.
            codec: Of the value in the store.
            new_epoch: Makes a name that no other router makes.
            on_set: Called with the seconds by which it moves to what the store has; what was
                charged moves with it.
        """
        self._clock = clock
        self._codec = codec
        self._new_epoch = new_epoch
        self._on_set = on_set
        self._offset_ms = 0
        self._epoch = ""
        self._base = ""
        self._is_written = True
        """False while this router has an epoch that the store has not."""
        self.version = 0
        """In the store, as far as is known."""
        self.lost_ms = NEVER_MS
        """When the store was last found to have lost something, by this clock."""
        self.moved_s = 0
        """By how much what was charged has moved with this clock, so far."""

    @property
    def is_shared(self) -> bool:
        """True once the store was seen."""
        return bool(self._epoch)

    def now_ms(self) -> int:
        """Return the time."""
        return self._offset_ms + int(self._clock.now_s() * 1000)

    def next_value(self) -> StoredValue:
        """Return what this router would write now."""
        epoch = self._epoch or self._new_epoch()
        value = ClockValue(epoch, self.now_ms(), self._base or epoch, self.lost_ms)
        return StoredValue(self.version + 1, self._codec.write_clock(CLOCK, value))

    def wrote(self, value: StoredValue, found: StoredValue) -> bool:
        """Note what the store had when `value` was offered to it.

        Returns:
            True if it has lost something; then there is a new epoch to write.
        """
        known = value.version - 1
        if found.version >= value.version:  # another router was first
            return self.see(found, known)
        self.version = max(self.version, value.version)
        before = self._codec.read_clock(CLOCK, found.content)
        is_same = before is not None and before.epoch == self._epoch
        if known and self._is_written and (found.version < known or not is_same):
            return self._note_loss(before)
        self._is_written = True
        written = self._codec.read_clock(CLOCK, value.content)
        if written is not None:
            self._epoch = written.epoch
            self._base = written.base
        return False

    def see(self, found: StoredValue, known: int) -> bool:
        """Take over what the store has.

        Args:
            found: Its clock.
            known: `version` when it was asked.

        Returns:
            True if it has lost something: it has less than it had, or an epoch that is new here.
        """
        value = self._codec.read_clock(CLOCK, found.content)
        if value is None or found.version < known:
            self.version = max(self.version, found.version)
            return self._note_loss(value)
        if found.version < self.version:  # read before something newer that was seen meanwhile
            return False
        is_lost = self.is_shared and value.epoch != self._epoch
        if is_lost and value.base != self._base and value.now_ms < self.now_ms():
            # Time does not go back: the others move to this one, which gets a new epoch.
            self.version = found.version
            return self._note_loss(value)
        if is_lost:
            self._join(value)
        self.follow(value.now_ms)
        self.version = found.version
        self._epoch = value.epoch
        self._base = value.base
        self._is_written = True
        # Whoever began the new epoch may have come after the loss, and know of none.
        self.lost_ms = self.now_ms() if is_lost else max(self.lost_ms, value.lost_ms)
        return is_lost

    def follow(self, now_ms: int) -> None:
        """Go on from another router's time if it is ahead, and from the first one in any case."""
        ahead_ms = now_ms - self.now_ms()
        if not self.is_shared:
            self._move(ahead_ms)
        elif ahead_ms > 0:
            self._offset_ms += ahead_ms

    def _move(self, ahead_ms: int) -> None:
        self._offset_ms += ahead_ms
        seconds = math.ceil(ahead_ms / 1000)  # rather a little longer than too short
        self.moved_s += seconds
        self._on_set(seconds)

    def _join(self, value: ClockValue) -> None:
        """Go on from an epoch's time if it is ahead; of another base, with all that was charged.

        Of the same, clocks have only drifted: what was charged stays in its second, in which its
        writer has it, too, and is not counted twice.
        """
        ahead_ms = value.now_ms - self.now_ms()
        if ahead_ms < 0:
            return
        if value.base == self._base:
            self._offset_ms += ahead_ms
        else:
            self._move(ahead_ms)
            self._base = value.base

    def _note_loss(self, value: ClockValue | None) -> bool:
        # Once, however many calls see it before the store has the new epoch.
        if not self.is_shared or not self._is_written:
            return False
        if value is not None and value.epoch != self._epoch:
            self._join(value)
        self._epoch = self._new_epoch()
        self._is_written = False
        self.lost_ms = self.now_ms()
        return True
