"""What a step meant, and what became of hand-overs.

Owns the events that `Scheduler.commit` and `Scheduler.take_events` return. Does not know who acts
on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.types import FinishReason, Logprob
from engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token was drawn for one choice."""

    sequence: Sequence
    choice: int
    position: int
    token: Logprob
    finish: FinishReason | None
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """A sequence with a hand-over has all its KV and its first tokens; it is now HOLDING."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The runner could not compute this sequence; its blocks are free."""

    sequence: Sequence
    message: str


@dataclass(frozen=True, slots=True)
class Announced:
    """The partner of a hand-over may reserve blocks: its turn is near."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Started:
    """A hand-over has its blocks; the first of them may have been computed before."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Preempted:
    """A hand-over has lost its blocks and will be computed again."""

    sequence: Sequence
    pins: tuple[int, ...]
    """The blocks it had, if a transfer may be reading them: whoever takes this unpins them."""


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """An arrival has its blocks."""

    sequence: Sequence
    num_have_blocks: int
    """Leading ones whose content is here already."""


HandoverEvent = Announced | Started | Preempted | BlocksReserved
SchedulerEvent = Sampled | PromptComputed | SequenceFailed | HandoverEvent


class HandoverEvents:
    """Those that nobody has taken yet, in order."""

    def __init__(self) -> None:
        self._events: list[HandoverEvent] = []

    def add(self, event: HandoverEvent) -> None:
        """Put an event behind the others."""
        self._events.append(event)

    def withdraw_start(self, sequence: Sequence) -> bool:
        """Withdraw the start of a sequence; False: somebody has taken the event already."""
        event = Started(sequence)
        is_untaken = event in self._events
        if is_untaken:
            self._events.remove(event)
        return is_untaken

    def take(self) -> list[SchedulerEvent]:
        """Return all of them, and keep none."""
        taken: list[SchedulerEvent] = [*self._events]
        self._events.clear()
        return taken
