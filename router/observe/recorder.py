"""The account of a router's work: each request, refusal, retry and call is counted and logged once.

Owns which of them are noted where, and that none is noted twice. Does not know how a request is
served, HTTP or gRPC.
"""

from __future__ import annotations

from core.errors import ServingError, SlowReader
from core.types import CANARY_TIER, GenerateRequest, RequestEnded
from router import calls
from router.calls import Call
from router.observe.explanations import Explanations
from router.observe.request_log import RequestLog
from router.observe.shedding_log import SheddingLog
from router.observe.telemetry import Telemetry
from router.prefix_outcome import PromptOutcome
from router.request_state import RequestObserver, RequestState


class Recorder(RequestObserver):
    """Notes in the metrics and in the log what becomes of requests and calls."""

    def __init__(
        self,
        telemetry: Telemetry,
        shedding_log: SheddingLog,
        explanations: Explanations,
        log: RequestLog | None,
    ) -> None:
        """Start; without a `log` everything is still counted."""
        self._telemetry = telemetry
        self._shedding_log = shedding_log
        self._explanations = explanations
        self._log = log

    def request_ended(self, run: RequestState, ended: RequestEnded) -> None:
        """Note the end of a request that began to run; canaries are nobody's."""
        # Its own requests are none of the service's figures.
        if run.request.tier == CANARY_TIER:
            return
        call = calls.current()
        self._telemetry.request_ended(run, ended, call.server if call else "")
        if ended.error is not None:
            self._shedding_log.note(ended.error.code)
        self._explanations.note(run, ended)
        if self._log is not None:
            self._log.request_ended(run.request, ended, call)
        if call is not None:
            call.is_recorded = True

    def request_refused(self, request: GenerateRequest, error: ServingError) -> None:
        """Note a request that never began to run."""
        call = calls.current()
        self._telemetry.request_refused(request, error, call.server if call else "")
        self._shedding_log.note(error.code)
        if self._log is not None:
            self._log.request_refused(request, error, call)
        if call is not None:
            call.is_recorded = True

    def prompt_computed(self, run: RequestState, outcome: PromptOutcome) -> None:
        """Note what of a prompt was cached."""
        if run.request.tier != CANARY_TIER:
            self._telemetry.prompt_computed(outcome)

    def retried(self, error: ServingError) -> None:
        """Note the fault after which a request is tried again."""
        self._telemetry.retried(error)

    def call_ended(self, call: Call) -> None:
        """Note a refused call, unless the request that it started is noted already.

        Both servers call this, and so does whatever turns a client away before it asked anything.
        """
        if call.is_recorded or not call.code:
            return
        call.is_recorded = True
        self._telemetry.call_refused(call)
        self._shedding_log.note(call.code)
        if self._log is not None:
            self._log.call_refused(call)

    def connection_refused(self, code: str, address: str) -> None:
        """Note an HTTP client that was turned away outside of any request."""
        # The request of a client that leaves its whole answer unread is counted already.
        outcome = "" if code == SlowReader.code else "rejected"
        self.call_ended(Call("http", address, code=code, outcome=outcome))
