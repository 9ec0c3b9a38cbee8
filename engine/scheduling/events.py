"""What a step meant: tokens drawn, prompts computed, sequences failed.

Owns the events that `Scheduler.commit` returns. Does not know who hears them.
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


SchedulerEvent = Sampled | PromptComputed | SequenceFailed
