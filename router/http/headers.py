"""The headers of our own in calls and replies.

Owns their names, and the reading of those that name or trace a call. Does not know bodies.
"""

from __future__ import annotations

from fastapi import Request

from core.ids import MAX_REQUEST_ID_CHARACTERS
from core.trace import TraceContext, parse_trace
from router.http.errors import REQUEST_ID_HEADER
from router.request_params import check_text, correlation_id_of

TIMING_HEADER = "x-baton-timing"
IGNORED_HEADER = "x-baton-ignored-params"
KEY_HEADER = "idempotency-key"
"""Requests with one key are one request: they run one at a time, and draw the same tokens."""
ROUTER_HEADER = "x-baton-router"
"""Names the router that served: only it can explain the request."""
NUM_ROUTERS_HEADER = "x-baton-num-routers"
EVENT_IDS_HEADER = "x-baton-event-ids"
LAST_EVENT_HEADER = "last-event-id"


def trace_of(request: Request) -> TraceContext | None:
    """Return the W3C trace context; baggage is not trusted, and not read."""
    return parse_trace(
        request.headers.get("traceparent", ""), request.headers.get("tracestate", "")
    )


def correlation_of(request: Request) -> str:
    """Return the caller's name for the action that this call belongs to, if it may be echoed.

    A proxy gives all calls of one action the same name, so it does not identify a request.
    """
    return correlation_id_of(request.headers.get(REQUEST_ID_HEADER, ""))


def key_of(request: Request) -> str:
    """Return the idempotency key; empty if there is none.

    Raises:
        InvalidRequest: It cannot be a request's id.
    """
    key = request.headers.get(KEY_HEADER, "")
    check_text(KEY_HEADER, key, MAX_REQUEST_ID_CHARACTERS)
    return key
