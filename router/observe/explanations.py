"""What a router remembers of the latest requests that have ended there, to explain them.

Owns how many are kept, whose they are, and the answer to whoever asks for one. Does not know why a
request went where it did: that comes with its timing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from core.errors import RequestNotFound
from core.ids import RequestId
from core.timeline import rounded_ms
from core.types import RequestEnded, RequestTiming, Usage
from router.charging import ReplyCost
from router.request_state import EndedAttempt, RequestState, RunKey


@dataclass(slots=True)
class _Explained:
    """What is kept of one request: figures and names, nothing of its prompt or its answer."""

    tenant: str
    tier: str
    ended_at: float
    outcome: str
    """ok, or its error's code: the error itself would keep the frames that it went through."""
    usage: Usage
    timing: RequestTiming
    permit_wait_s: float
    attempts: tuple[EndedAttempt, ...]
    charge: ReplyCost | None = None


class Explanations:
    """Requests that ended here, the latest only, by tenant and id."""

    def __init__(
        self,
        max_explained: int,
        router_id: str,
        num_routers: int,
        now_s: Callable[[], float],
    ) -> None:
        """Start with none.

        Args:
            max_explained: How many are kept.
            router_id: Of this router.
            num_routers: That serve together: each keeps what has ended there.
            now_s: Monotonic seconds.
        """
        self.router_id = router_id
        self.num_routers = num_routers
        self._max_explained = max_explained
        self._now_s = now_s
        self._ended: OrderedDict[RunKey, _Explained] = OrderedDict()

    def note(self, run: RequestState, ended: RequestEnded) -> None:
        """Keep why a request went where it did; the oldest makes room."""
        run_key = run.request.run_key
        line = run.timeline
        now_s = self._now_s()
        waited_until = now_s if line.admitted_at is None else line.admitted_at
        self._ended.pop(run_key, None)
        self._ended[run_key] = _Explained(
            tenant=run.request.tenant,
            tier=run.request.tier,
            ended_at=now_s,
            outcome=ended.error.code if ended.error else "ok",
            usage=ended.usage,
            timing=ended.timing,
            permit_wait_s=max(0.0, waited_until - run.started_at),
            attempts=tuple(run.attempts),
        )
        if len(self._ended) > self._max_explained:
            self._ended.popitem(last=False)

    def note_cost(self, run_keys: Iterable[RunKey], cost: ReplyCost) -> None:
        """Keep what a reply has cost its key, with each of its requests."""
        for run_key in run_keys:
            found = self._ended.get(run_key)
            if found is not None:
                found.charge = cost

    def of(self, request_id: str, tenant: str | None = None) -> dict[str, Any] | None:
        """Explain a request; nothing if it is unknown, still runs, or is too long ago.

        Args:
            request_id: As it was when the request ran; of several tenants' the latest is meant.
            tenant: Whose it must be; None: anybody's.
        """
        if tenant is None:
            named = (key for key in reversed(self._ended) if key[1] == request_id)
            run_key = next(named, None)
        else:
            run_key = (tenant, RequestId(request_id))
        found = self._ended.get(run_key) if run_key is not None else None
        return None if found is None else {"request_id": request_id, **self._tree(found)}

    def not_found(self, request_id: str, *, sees_all: bool) -> RequestNotFound:
        """Make the error of a request that `of` does not know: how long it would be kept.

        Args:
            request_id: As it was asked for.
            sees_all: The caller may know how much of others is kept.
        """
        kept = f"it keeps the newest {self._max_explained} that ended there"
        if sees_all and self._ended:
            oldest = next(iter(self._ended.values()))
            age_s = self._now_s() - oldest.ended_at
            kept += f", now {len(self._ended)}, the oldest since {age_s:.0f} s"
        remedy = "ask for it once it has ended, or raise router.max_explained"
        if self.num_routers > 1:
            remedy += (
                f"; {self.num_routers} routers serve, and only the one that a reply names in "
                "x-baton-router knows its request: ask at its address, or again where they share "
                "one"
            )
        whose = "" if sees_all else " of this key's tenant"
        return RequestNotFound(
            f"{self.router_id} remembers no request {request_id[:80]!r}{whose}: {kept}; {remedy}"
        )

    def _tree(self, found: _Explained) -> dict[str, Any]:
        timing = found.timing
        return {
            "tenant": found.tenant,
            "tier": found.tier,
            "router": self.router_id,
            "ended_s_ago": round(self._now_s() - found.ended_at, 1),
            "outcome": found.outcome,
            "prompt_tokens": found.usage.prompt_tokens,
            "output_tokens": found.usage.completion_tokens,
            "cached_tokens": timing.cached_tokens,
            "fetch_outcome": timing.fetch_outcome,
            "fetched_tokens": timing.fetched_tokens,
            "fetch_ms": rounded_ms(timing.fetch_s),
            "ttft_ms": rounded_ms(timing.ttft_s),
            "e2e_ms": rounded_ms(timing.e2e_s),
            "permit_wait_ms": rounded_ms(found.permit_wait_s),
            "phases_ms": {name: rounded_ms(seconds) for name, seconds in timing.phases().items()},
            "charge": None if found.charge is None else found.charge.shown(),
            "attempts": [
                {
                    "epoch": attempt.epoch,
                    "path": attempt.path,
                    "workers": list(attempt.workers),
                    "outcome": attempt.outcome,
                    "is_move": attempt.is_move,
                }
                for attempt in found.attempts
            ],
            **timing.why,
        }
