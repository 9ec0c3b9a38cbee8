"""Why a request goes where it does: the candidates, what each would cost, and the decision.

Owns the tree that replies, traces and `baton explain` show. Does not know how a cost is predicted,
nor whose request it is.
"""

from __future__ import annotations

from typing import Any

from core.timeline import rounded_ms
from core.types import Path
from router.cost import Cost
from router.placement import Placement
from router.prefix_sources import Fetch
from router.regret import Regret


def why_of(placement: Placement | None, regret: Regret | None = None) -> dict[str, Any]:
    """Describe a decision: what was chosen, what the best candidates would cost, what it took."""
    if placement is None:
        return {}
    return {
        "decision": {
            "path": placement.path.value,
            "prefill_worker": placement.prefill.worker_id,
            "decode_worker": placement.decode.worker_id,
            "reason": placement.reason,
            "uncached_tokens": placement.uncached_tokens,
            **_fetch(placement.fetch),
        },
        "candidates": [_candidate(path, cost) for path, cost in placement.costs],
        **({} if regret is None else {"measured": _measured(regret)}),
    }


def _measured(regret: Regret) -> dict[str, Any]:
    measured = regret.measured
    shown: dict[str, Any] = {
        "queue_ms": rounded_ms(measured.queue_s),
        "fetch_ms": rounded_ms(measured.fetch_s),
        "prefill_ms": rounded_ms(measured.prefill_s),
        "transfer_ms": rounded_ms(measured.transfer_s),
        "total_ms": rounded_ms(measured.total_s),
        "predicted_ms": rounded_ms(regret.predicted_s),
        "error_ms": rounded_ms(regret.error_s),
    }
    if regret.best_other is not None and regret.regret_s is not None:
        path, cost = regret.best_other
        shown["best_other"] = {
            "path": path.value,
            "worker": cost.worker_id,
            "total_ms": rounded_ms(cost.total_s),
            "delay_ms": rounded_ms(cost.delay_s),
        }
        shown["regret_ms"] = rounded_ms(regret.regret_s)
    return shown


def _fetch(fetch: Fetch | None) -> dict[str, Any]:
    if fetch is None:
        return {}
    return {"source": fetch.source.worker_id, "fetched_tokens": fetch.num_gained}


def _candidate(path: Path, cost: Cost) -> dict[str, Any]:
    return {
        "path": path.value,
        "worker": cost.worker_id,
        "cached_tokens": cost.cached_tokens,
        "uncached_tokens": cost.uncached_tokens,
        "queued_tokens": cost.queued_tokens,
        "source": cost.source,
        "fetched_tokens": cost.fetched_tokens,
        "fetch_ms": rounded_ms(cost.fetch_s),
        "prefill_ms": rounded_ms(cost.prefill_s),
        "transfer_ms": rounded_ms(cost.transfer_s),
        "decode_ms": rounded_ms(cost.decode_s),
        "total_ms": rounded_ms(cost.total_s),
        "delay_ms": rounded_ms(cost.delay_s),
        "weighed_ms": rounded_ms(cost.weighed_s),
        **({"is_preferred": True} if cost.is_preferred else {}),
    }
