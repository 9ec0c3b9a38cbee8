"""Spans of one attempt on one worker, recorded when it ends or is cancelled.

Owns their names and what they hold. Does not know who collects them.

    worker.prefill ─┬ prefill.queue ─ prefill.compute ─ kv.send
    worker.decode  ─┴ kv.wait ─ kv.receive ─ decode.generate
    worker.local   ── prefill.queue ─ prefill.compute ─ decode.generate
"""

from __future__ import annotations

from core.session import Task, WorkerTiming
from core.trace import Attributes, Tracing, record
from worker.attempt import Attempt


def trace_attempt(tracing: Tracing, attempt: Attempt, now_s: float) -> None:
    """Record an attempt that has just ended; nothing if its request is not traced.

    A router that needs no more of an attempt cancels it: after a stop string, or when decode has
    sent everything before prefill's end has come. That is no error, and the work was done.
    """
    parent, ended = attempt.submit.request.trace, attempt.ended
    if parent is None or not attempt.sequences:
        return
    sequence = attempt.sequences[0]
    t = ended.timings if ended is not None else attempt.timings or WorkerTiming()
    span = tracing.open(f"worker.{attempt.submit.task.value}", parent, sequence.arrived_at)
    started = sequence.started_at if sequence.started_at is not None else now_s
    computed = sequence.prompt_done_at if sequence.prompt_done_at is not None else now_s
    match attempt.submit.task:
        case Task.PREFILL:
            names = ("prefill.queue", "prefill.compute", "kv.send")
        case Task.LOCAL:
            names = ("prefill.queue", "prefill.compute", "decode.generate")
        case Task.DECODE:
            names = ("kv.wait", "kv.receive", "decode.generate")
    attributes: Attributes = {
        "baton.epoch": attempt.epoch,
        "baton.tier": attempt.submit.request.tier,
        "baton.preemptions": sum(one.num_preemptions for one in attempt.sequences),
        "baton.parkings": sum(one.num_parkings for one in attempt.sequences),
        "baton.cached_tokens": t.cached_tokens,
        "baton.kv_bytes": t.kv_bytes,
        "baton.kv_blocks": t.kv_blocks,
        "baton.kv_transport": t.kv_transport,
        "baton.cancelled": ended is None,
    }
    instants = (sequence.arrived_at, started, computed, now_s)
    for name, start_s, end_s in zip(names, instants, instants[1:], strict=False):
        # An attempt that ended early has later phases of no length, never a negative one.
        record(tracing, name, span.context, start_s, max(start_s, end_s))
    span.end(now_s, attributes, ended.error.code if ended and ended.error else "")
