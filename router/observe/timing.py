"""Where an ended request's time went: the phases that add up to its TTFT and its end-to-end time.

Owns the arithmetic. Does not know how a request is served.
"""

from __future__ import annotations

from core.types import RequestTiming
from router.observe.why import why_of
from router.regret import regret_of
from router.request_state import RequestState


def timing_of(run: RequestState) -> RequestTiming:
    """Split the time of an ended request into phases that add up to it."""
    line = run.timeline
    reported = run.timings
    placement = run.placement
    measured = run.measured
    regret = regret_of(placement, measured) if placement and measured else None
    e2e_s = line.e2e_s or 0.0
    to_first_s = e2e_s if line.ttft_s is None else line.ttft_s
    # Workers measure by their own clocks: no duration may exceed what the router saw pass.
    tokenize_s = min(run.started_at - line.received_at, to_first_s)
    waited_s = to_first_s - tokenize_s
    if line.admitted_at is not None:
        # Admitted: from here on it was the workers' queue, which the worker reports.
        waited_s = line.admitted_at - run.started_at
    queue_s = min(waited_s + reported.queue_s, to_first_s - tokenize_s)
    prefill_s = min(reported.prefill_s, to_first_s - tokenize_s - queue_s)
    first = line.token_at[:1]
    second = line.token_at[1:2]
    last = line.token_at[-1:]
    gap_s = second[0] - first[0] if second else 0.0
    # Of the first gap at most: that is where a late transfer shows.
    transfer_s = min(run.exposed_transfer_s, gap_s)
    return RequestTiming(
        tokenize_s=tokenize_s,
        queue_s=queue_s,
        prefill_s=prefill_s,
        router_s=to_first_s - tokenize_s - queue_s - prefill_s,
        exposed_transfer_s=transfer_s,
        first_decode_s=gap_s - transfer_s,
        decode_s=last[0] - second[0] if second else 0.0,
        finish_s=line.ended_at - last[0] if last and line.ended_at is not None else 0.0,
        ttft_s=line.ttft_s or 0.0,
        e2e_s=e2e_s,
        cached_tokens=reported.cached_tokens,
        fetch_outcome=reported.fetch.outcome,
        fetched_tokens=reported.fetch.num_tokens,
        fetch_s=reported.fetch.took_s,
        kv_bytes=reported.kv_bytes,
        kv_blocks=reported.kv_blocks,
        kv_transport=reported.kv_transport,
        kv_fragments_resent=reported.kv_fragments_resent,
        path=placement.path.value if placement else "",
        prefill_worker=placement.prefill.worker_id if placement else "",
        decode_worker=placement.decode.worker_id if placement else "",
        prefill_pid=placement.prefill.pid if placement else 0,
        decode_pid=placement.decode.pid if placement else 0,
        attempts=tuple(map(str, run.attempts)),
        why=why_of(placement, regret),
        placement_error_s=regret.error_s if regret else None,
        placement_regret_s=regret.regret_s if regret else None,
    )
