"""One event for each ended request and each refused call: what an operator greps for.

Owns the events' fields, and how many are logged about callers without a key. Prompts, outputs and
addresses are never logged; `core.logs` escapes what a client chose. Does not know HTTP or gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from core import events
from core.errors import ServingError
from core.timeline import rounded_ms
from core.types import GenerateRequest, RequestEnded
from router.calls import Call

ANONYMOUS_BURST = 1000
ANONYMOUS_PER_S = 20.0
"""Limits of lines about callers without a key, who could otherwise fill the disk. The metrics count
the rest, and so does the next line, as `unlogged`."""
SHOWN_ABOVE_S = 1e-6


class RequestLog:
    """Logs requests and refusals."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        """Start with the full burst; `now_s` is in monotonic seconds."""
        self._now_s = now_s
        self._allowed = float(ANONYMOUS_BURST)
        self._allowed_at = now_s()
        self._num_unlogged = 0

    def request_ended(
        self, request: GenerateRequest, ended: RequestEnded, call: Call | None = None
    ) -> None:
        """Log a request that ran, and the call that brought it."""
        timing = ended.timing
        usage = ended.usage
        phases = {name: rounded_ms(s) for name, s in timing.phases().items() if s > SHOWN_ABOVE_S}
        events.REQUEST.log(
            **_request_fields(request, ended.error, call),
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            n=request.sampling.n,
            ttft_ms=rounded_ms(timing.ttft_s),
            e2e_ms=rounded_ms(timing.e2e_s),
            phases_ms=phases,
            path=timing.path,
            prefill_worker=timing.prefill_worker,
            decode_worker=timing.decode_worker,
            kv_bytes=timing.kv_bytes,
            attempts=timing.attempts,
            correlation_id=request.correlation_id,
            trace_id=f"{request.trace.trace_id:032x}" if request.trace else "",
        )

    def request_refused(
        self, request: GenerateRequest, error: ServingError, call: Call | None = None
    ) -> None:
        """Log a request that never ran."""
        events.REQUEST.log(**_request_fields(request, error, call))

    def call_refused(self, call: Call) -> None:
        """Log a call that ended before it had a request."""
        unlogged: dict[str, int] = {}
        # Whoever has a key answers for it, and the operator can take it away.
        if not call.identity.tenant:
            if not self._may_log_anonymous():
                self._num_unlogged += 1
                return
            if self._num_unlogged:
                unlogged = {"unlogged": self._num_unlogged}
                self._num_unlogged = 0
        events.REFUSAL.log(
            outcome=call.code,
            route=call.route,
            tenant=call.identity.tenant,
            tier=call.tier,
            **_call_fields(call),
            **unlogged,
        )

    def _may_log_anonymous(self) -> bool:
        now_s = self._now_s()
        earned = (now_s - self._allowed_at) * ANONYMOUS_PER_S
        self._allowed = min(ANONYMOUS_BURST, self._allowed + earned)
        self._allowed_at = now_s
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True


def _call_fields(call: Call | None) -> dict[str, str]:
    if call is None:
        return {}
    return {"server": call.server, "client": call.client}


def _request_fields(
    request: GenerateRequest, error: ServingError | None, call: Call | None
) -> dict[str, str]:
    return {
        "request_id": request.request_id,
        "model": request.model,
        "operation": request.operation,
        "outcome": error.code if error else "finished",
        "tenant": request.tenant,
        "tier": request.tier,
        **_call_fields(call),
    }
