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
from router.request_state import RequestState

MAX_EXPLAINED = 2_048


def why_of(placement: Placement | None) -> dict[str, Any]:
    """Describe a decision: what was chosen, and what each of the best candidates would cost."""
    if placement is None:
        return {}
    return {
        "decision": {
            "path": placement.path.value,
            "prefill_worker": placement.prefill.worker_id,
            "decode_worker": placement.decode.worker_id,
            "reason": placement.reason,
            "uncached_tokens": placement.uncached_tokens,
        },
        "candidates": [
            *(_candidate("pd", cost) for cost in placement.prefill_costs),
            *(_candidate("local", cost) for cost in placement.local_costs),
        ],
    }


def _candidate(path: str, cost: Cost) -> dict[str, Any]:
    return {
        "path": path,
        "worker": cost.worker_id,
        "cached_tokens": cost.cached_tokens,
        "uncached_tokens": cost.uncached_tokens,
        "queued_tokens": cost.queued_tokens,
        "prefill_ms": round(cost.prefill_s * 1e3, 3),
        "transfer_ms": round(cost.transfer_s * 1e3, 3),
        "decode_ms": round(cost.decode_s * 1e3, 3),
        "total_ms": round(cost.total_s * 1e3, 3),
        "weighed_ms": round(cost.weighed_s * 1e3, 3),
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
            "ttft_ms": round(timing.ttft_s * 1e3, 3),
            "queue_ms": round(timing.queue_s * 1e3, 3),
            "prefill_ms": round(timing.prefill_s * 1e3, 3),
            "exposed_transfer_ms": round(timing.exposed_transfer_s * 1e3, 3),
            "attempts": list(timing.attempts),
            **why_of(placement),
        }
