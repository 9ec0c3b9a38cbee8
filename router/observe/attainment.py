"""Whether a request was served as its tier's SLO says.

Owns what counts as met, as missed, and as neither. Does not know who counts.
"""

from __future__ import annotations

from core.config import TierConfig
from core.errors import ServingError
from core.timeline import Timeline
from router.calls import Call, outcome_of
from router.refusals import OVERLOAD_CODES

MET = "met"
MISSED = "missed"
RESULTS = (MET, MISSED)


def result_of(tier: TierConfig, line: Timeline, error: ServingError | None) -> str:
    """Return `MET`, `MISSED`, or nothing if the end was the caller's doing.

    Args:
        tier: Whose limits count.
        line: When its tokens came.
        error: What it ended with.
    """
    if error is not None:
        return result_of_refusal(error)
    is_met = _within(line.ttft_s, tier.slo_ttft_s) and _within(line.tpot_s, tier.slo_tpot_s)
    return MET if is_met else MISSED


def result_of_refusal(error: ServingError) -> str:
    """Return `MISSED` for a request that was not served, unless that was the caller's doing."""
    return MISSED if _is_ours(outcome_of(error), error.code) else ""


def result_of_call(call: Call) -> str:
    """Return `MISSED` for a call that had no room or met a fault, so that no request began."""
    return MISSED if _is_ours(call.outcome, call.code) else ""


def _is_ours(outcome: str, code: str) -> bool:
    # Over all that was offered: to refuse what would be late must not raise the attainment.
    return outcome == "failed" or code in OVERLOAD_CODES


def _within(took_s: float | None, limit_s: float) -> bool:
    # One token has no time per further token, and an echo alone has no first one.
    return took_s is None or not limit_s or took_s <= limit_s
