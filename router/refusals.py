"""Refusals: those that are no error of the tree, and when to come again after any.

Owns the table of code, status and meaning, and the bounds on a client's wait. Does not know who is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import Overloaded, RateLimited, ServingError, Unavailable, all_errors

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """One kind of refusal; without a status the connection or call just ends."""

    code: str
    meaning: str
    http_status: int = 0
    grpc_status: str = ""


UNSUPPORTED_ENDPOINT = Refusal(
    "unsupported_endpoint", "There is no such path or gRPC method.", 404, "UNIMPLEMENTED"
)
METHOD_NOT_ALLOWED = Refusal("method_not_allowed", "The path has no such method.", 405)
BAD_REQUEST = Refusal("bad_request", "What came is no HTTP request.", 400)
HEADERS_TOO_LARGE = Refusal(
    "headers_too_large", "Request line and headers are too long, or too many.", 431
)
TOO_MANY_PIPELINED = Refusal("too_many_pipelined", "Too many requests wait on one connection.", 429)
TOO_MANY_CONNECTIONS = Refusal(
    "too_many_connections",
    "All connections are busy; with too many even for this answer, there is none.",
    503,
)
NO_DESCRIPTORS = Refusal(
    "no_descriptors", "The process can open no more connections; an idle one was closed."
)
SILENT = Refusal("silent", "Nothing came on a new connection, and it was closed.")
UNREAD = Refusal(
    "unread",
    "A gRPC call ended before its message was read. Its client left, or the message is longer than "
    "`router.max_body_bytes`: then the client gets RESOURCE_EXHAUSTED. This library shows a server "
    "no difference.",
)
OTHER = Refusal("other", "In the metrics, any code that is not listed here; the log has it.")
ALL = (
    UNSUPPORTED_ENDPOINT, METHOD_NOT_ALLOWED, BAD_REQUEST, HEADERS_TOO_LARGE, TOO_MANY_PIPELINED,
    TOO_MANY_CONNECTIONS, NO_DESCRIPTORS, SILENT, UNREAD, OTHER,
)  # fmt: skip
CODES = frozenset(kind.code for kind in ALL) | {error.code for error in all_errors()}
"""Every code that may become a label."""
OVERLOAD_CODES = frozenset(kind.code for kind in all_errors() if issubclass(kind, Overloaded))
"""Codes of a router that has no room, or none in time."""


def retry_after_s(error: ServingError) -> float | None:
    """Return when a client may try again (seconds); None: that would not help."""
    if isinstance(error, RateLimited):  # known, not predicted: a minute and a little at most
        return max(MIN_RETRY_AFTER_S, error.retry_after_s)
    if isinstance(error, Unavailable):
        return bounded_wait_s(error.retry_after_s)
    return None


def bounded_wait_s(wait_s: float) -> float:
    """Return a wait as clients may be told it (seconds); the shortest if it is no number."""
    return min(wait_s, MAX_RETRY_AFTER_S) if wait_s > MIN_RETRY_AFTER_S else MIN_RETRY_AFTER_S
