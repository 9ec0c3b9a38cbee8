"""What the trace of a request says of it: the attributes of the router's span.

Owns their names and values; attempts are events of the same span (`router.request_state`). Does not
know who collects spans, nor how a request is served.

Names under `gen_ai` are OpenTelemetry's conventions for generative AI; those under `baton` are our
own. Nothing is made for a span that nobody records.
"""

from __future__ import annotations

import json

from core.timeline import rounded_ms
from core.trace import Attributes
from core.types import RequestEnded
from router.calls import outcome_of
from router.request_state import RequestState


def end_span(run: RequestState, ended: RequestEnded) -> None:
    """End the request's span."""
    if run.span is None or run.timeline.ended_at is None:
        return
    attributes: Attributes = {}
    if run.span.is_recorded:
        attributes = {
            **_gen_ai(run, ended),
            **_caller(run),
            **_admission(run),
            **_placement(run, ended),
            **_ending(ended),
        }
    run.span.end(run.timeline.ended_at, attributes, ended.error.code if ended.error else "")


def _gen_ai(run: RequestState, ended: RequestEnded) -> Attributes:
    request = run.request
    usage = ended.usage
    return {
        "gen_ai.operation.name": request.operation,
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.finish_reasons": tuple(
            choice.finished.reason.value for choice in run.choices if choice.finished is not None
        ),
        "gen_ai.request.max_tokens": request.sampling.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
        "gen_ai.request.top_p": request.sampling.top_p,
        "gen_ai.request.choice.count": request.sampling.n,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }


def _caller(run: RequestState) -> Attributes:
    request = run.request
    charged = request.charged_tokens
    return {
        "baton.tier": request.tier,
        "baton.tier.asked": request.asked_tier,
        "baton.tenant_class": request.tenant_class,
        **({} if charged is None else {"baton.quota.charged_tokens": charged}),
    }


def _admission(run: RequestState) -> Attributes:
    line = run.timeline
    waited_until = line.ended_at if line.admitted_at is None else line.admitted_at
    shown: dict[str, float] = {}
    if waited_until is not None:
        shown["baton.admission.wait_ms"] = rounded_ms(max(0.0, waited_until - run.started_at))
    expected = run.expected_wait
    if expected is not None:
        shown["baton.admission.predicted_permit_ms"] = rounded_ms(expected.permit_s)
        shown["baton.admission.predicted_turn_ms"] = rounded_ms(expected.first_token_s)
        if run.max_ttft_s:
            shown["baton.admission.max_ttft_ms"] = rounded_ms(run.max_ttft_s)
    return shown


def _placement(run: RequestState, ended: RequestEnded) -> Attributes:
    timing = ended.timing
    errors = {"error": timing.placement_error_s, "regret": timing.placement_regret_s}
    return {
        "baton.path": timing.path,
        "baton.placement.reason": run.placement.reason if run.placement else "",
        "baton.prefill_worker": timing.prefill_worker,
        "baton.decode_worker": timing.decode_worker,
        "baton.kv_bytes": timing.kv_bytes,
        "baton.attempts": ",".join(timing.attempts),
        "baton.why": json.dumps(timing.why),
        **{f"baton.phase.{name}_ms": seconds * 1000 for name, seconds in timing.phases().items()},
        **{
            f"baton.placement.{name}_ms": seconds * 1000
            for name, seconds in errors.items()
            if seconds is not None
        },
    }


def _ending(ended: RequestEnded) -> Attributes:
    cost = ended.usage.cost
    return {
        "baton.outcome": outcome_of(ended.error),
        **({} if cost is None else {"baton.cost": cost}),
    }
