"""The sequences of an attempt: how they are made of its Submit, and what they have cost.

Owns which choices share a sequence. Does not know who schedules it, nor what a role does with it.
"""

from __future__ import annotations

from core.session import WorkerTiming
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import UNLIMITED_CREDIT, Handover, Sequence
from worker.attempt import Attempt


def add_sequence(
    scheduler: Scheduler,
    attempt: Attempt,
    choices: tuple[int, ...],
    now_s: float,
    handover: Handover | None = None,
) -> Sequence:
    """Make one of an attempt's sequences; it waits nowhere yet.

    Args:
        scheduler: Numbers it and gives it its place in line.
        attempt: Keeps it.
        choices: Those it stands for; their outputs so far are equal.
        now_s: Current instant.
        handover: For a prompt whose KV a decode worker will fetch.

    Raises:
        PromptTooLong: It could not fit the context window or the pool even alone.
    """
    submit = attempt.submit
    sequence = scheduler.new_sequence(
        submit.request,
        submit.epoch,
        choices,
        submit.emitted[choices[0]],
        now_s,
        age_s=submit.age_s,
        # A prompt that is handed over ends with its first tokens, which need no credit.
        credit=submit.credit if handover is None else UNLIMITED_CREDIT,
        handover=handover,
    )
    sequence.run_alone = submit.run_alone
    attempt.sequences.append(sequence)
    return sequence


def add_local_sequences(scheduler: Scheduler, attempt: Attempt, now_s: float) -> None:
    """Make the sequences of an attempt that is prefilled and decoded on one worker.

    Raises:
        PromptTooLong: See `add_sequence`; sequences made before it stay the attempt's.
    """
    choices = attempt.open_choices
    # Choices with output of their own are sequences of their own; fresh ones share a prompt.
    is_fresh = not any(attempt.submit.emitted[c] for c in choices)
    for group in [choices] if is_fresh else [(c,) for c in choices]:
        add_sequence(scheduler, attempt, group, now_s)


def timing_of(attempt: Attempt, sequence: Sequence, now_s: float) -> WorkerTiming:
    """What a sequence of an attempt has cost so far."""
    started = sequence.started_at if sequence.started_at is not None else now_s
    prompt_done = sequence.prompt_done_at if sequence.prompt_done_at is not None else now_s
    return WorkerTiming(
        queue_s=started - sequence.arrived_at,
        prefill_s=prompt_done - started,
        cached_tokens=sequence.num_prefix_hit_tokens,
        fetch=attempt.fetch,
    )
