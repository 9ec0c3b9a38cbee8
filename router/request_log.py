"""One structured line per ending on standard error: what an operator greps for.

Owns the lines' fields and the bounded queue to the thread that writes them, so that a blocked pipe
never blocks the event loop. Prompts and outputs are never logged, nor addresses, and whatever a
client chose is escaped as JSON escapes it. Does not know doors. Called by `router.service`.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from core.errors import ServingError
from core.types import GenerateRequest, RequestEnded
from router.calls import Call

MAX_WAITING_LINES = 4096
STRANGERS_BURST = 1000
STRANGERS_PER_S = 20.0
"""Lines about callers without a key, who would otherwise decide how fast the disk fills. What goes
beyond is counted in the metrics, and in the next line as `unlogged`."""
SHOWN_ABOVE_S = 1e-6


class _DroppingQueueHandler(logging.handlers.QueueHandler):
    """Drops a line when the writer is behind, and counts it."""

    num_dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue without waiting."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1


class RequestLog:
    """Writes the lines."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        """Start the writer's thread; `now_s` is in monotonic seconds."""
        self._now_s = now_s
        self._allowed = float(STRANGERS_BURST)
        self._allowed_at = now_s()
        self._num_unlogged = 0
        lines: queue.Queue[Any] = queue.Queue(MAX_WAITING_LINES)
        self._entry = _DroppingQueueHandler(lines)
        self._writer = logging.handlers.QueueListener(lines, logging.StreamHandler(sys.stderr))
        self._logger = logging.getLogger("baton.requests")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._logger.addHandler(self._entry)
        self._writer.start()

    @property
    def num_dropped(self) -> int:
        """Lines lost because the reader of standard error was behind."""
        return self._entry.num_dropped

    def request_ended(
        self, request: GenerateRequest, ended: RequestEnded, call: Call | None = None
    ) -> None:
        """Log a request that ran, and the call that brought it."""
        a = ended.anatomy
        usage = ended.usage
        phases = {name: round(s * 1000, 3) for name, s in a.phases().items() if s > SHOWN_ABOVE_S}
        self._write({
            **_request_fields(request, ended.error, call),
            "prompt_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens, "n": request.sampling.n,
            "ttft_ms": round(a.ttft_s * 1000, 3), "e2e_ms": round(a.e2e_s * 1000, 3),
            "phases_ms": phases, "path": a.path, "prefill_worker": a.prefill_worker,
            "decode_worker": a.decode_worker, "kv_bytes": a.kv_bytes, "attempts": a.attempts,
            "correlation_id": request.correlation_id,
            "trace_id": f"{request.trace.trace_id:032x}" if request.trace else "",
        })  # fmt: skip

    def request_refused(
        self, request: GenerateRequest, error: ServingError, call: Call | None = None
    ) -> None:
        """Log a request that never ran."""
        self._write(_request_fields(request, error, call))

    def call_refused(self, call: Call) -> None:
        """Log a call that ended before it had a request of its own."""
        unlogged: dict[str, int] = {}
        if not call.identity.tenant:
            if not self._may_log_stranger():
                self._num_unlogged += 1
                return
            if self._num_unlogged:
                unlogged = {"unlogged": self._num_unlogged}
                self._num_unlogged = 0
        self._write({
            "event": "refusal", "outcome": call.code, "route": call.route,
            "tenant": call.identity.tenant, "tier": call.identity.tier, **_call_fields(call),
            **unlogged,
        })  # fmt: skip

    def _may_log_stranger(self) -> bool:
        now_s = self._now_s()
        earned = (now_s - self._allowed_at) * STRANGERS_PER_S
        self._allowed = min(STRANGERS_BURST, self._allowed + earned)
        self._allowed_at = now_s
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True

    def _write(self, fields: dict[str, Any]) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        self._logger.info(json.dumps(line, separators=(",", ":")))

    def close(self) -> None:
        """Write what is queued and end the thread."""
        self._logger.removeHandler(self._entry)
        self._writer.stop()


def _call_fields(call: Call | None) -> dict[str, str]:
    if call is None:
        return {}
    return {"door": call.door, "client": call.client}


def _request_fields(
    request: GenerateRequest, error: ServingError | None, call: Call | None
) -> dict[str, str]:
    return {
        "event": "request", "request_id": request.request_id, "model": request.model,
        "operation": request.operation, "outcome": error.code if error else "finished",
        "tenant": request.tenant, "tier": request.tier, **_call_fields(call),
    }  # fmt: skip
