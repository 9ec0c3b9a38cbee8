"""Why a request went where it did: candidates, costs and decision, for people.

Owns the tree that replies, traces and `baton explain` show, and the log of the latest requests.
Does not know how a cost is predicted.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from core.types import RequestEnded
from router.cost import Cost
from router.placement import Placement
from router.prefix_sources import Fetch
from router.regret import Regret
from router.request_state import RequestState

MAX_EXPLAINED = 2_048


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
        "candidates": [
            *(_candidate("pd", cost) for cost in placement.prefill_costs),
            *(_candidate("local", cost) for cost in placement.local_costs),
        ],
        **({} if regret is None else {"measured": _measured(regret)}),
    }


def _measured(regret: Regret) -> dict[str, Any]:
    measured = regret.measured
    shown: dict[str, Any] = {
        "queue_ms": _ms(measured.queue_s),
        "fetch_ms": _ms(measured.fetch_s),
        "prefill_ms": _ms(measured.prefill_s),
        "transfer_ms": _ms(measured.transfer_s),
        "total_ms": _ms(measured.total_s),
        "predicted_ms": _ms(regret.predicted_s),
        "error_ms": _ms(regret.error_s),
    }
    if regret.best_other is not None and regret.regret_s is not None:
        path, cost = regret.best_other
        shown["best_other"] = {
            "path": path.value,
            "worker": cost.worker_id,
            "total_ms": _ms(cost.total_s),
        }
        shown["regret_ms"] = _ms(regret.regret_s)
    return shown


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _fetch(fetch: Fetch | None) -> dict[str, Any]:
    if fetch is None:
        return {}
    return {"source": fetch.source.worker_id, "fetched_tokens": fetch.num_gained}


def _candidate(path: str, cost: Cost) -> dict[str, Any]:
    return {
        "path": path,
        "worker": cost.worker_id,
        "cached_tokens": cost.cached_tokens,
        "uncached_tokens": cost.uncached_tokens,
        "queued_tokens": cost.queued_tokens,
        "source": cost.source,
        "fetched_tokens": cost.fetched_tokens,
        "fetch_ms": _ms(cost.fetch_s),
        "prefill_ms": _ms(cost.prefill_s),
        "transfer_ms": _ms(cost.transfer_s),
        "decode_ms": _ms(cost.decode_s),
        "total_ms": _ms(cost.total_s),
        "weighed_ms": _ms(cost.weighed_s),
        **({"is_preferred": True} if cost.is_preferred else {}),
    }


class Explanations:
    """Requests that ended here, the latest only, by their ids."""

    def __init__(self, max_explained: int = MAX_EXPLAINED) -> None:
        """Start with none."""
        self._max_explained = max_explained
        self._ended: OrderedDict[str, tuple[Placement | None, RequestEnded]] = OrderedDict()

    def note(self, run: RequestState, ended: RequestEnded) -> None:
        """Keep why a request went where it did; the oldest makes room."""
        request_id = run.request.request_id
        self._ended.pop(request_id, None)
        self._ended[request_id] = (run.placement, ended)
        if len(self._ended) > self._max_explained:
            self._ended.popitem(last=False)

    def of(self, request_id: str) -> dict[str, Any] | None:
        """Explain a request; nothing if it is unknown, still runs, or is too long ago."""
        found = self._ended.get(request_id)
        if found is None:
            return None
        placement, ended = found
        timing = ended.timing
        return {
            "request_id": request_id,
            "outcome": ended.error.code if ended.error else "ok",
            "prompt_tokens": ended.usage.prompt_tokens,
            "cached_tokens": timing.cached_tokens,
            "fetch_outcome": timing.fetch_outcome,
            "fetched_tokens": timing.fetched_tokens,
            "fetch_ms": _ms(timing.fetch_s),
            "ttft_ms": _ms(timing.ttft_s),
            "queue_ms": _ms(timing.queue_s),
            "prefill_ms": _ms(timing.prefill_s),
            "exposed_transfer_ms": _ms(timing.exposed_transfer_s),
            "attempts": list(timing.attempts),
            **why_of(placement),
        }
