"""What the doors refuse without an error of the tree: each word, its status and its meaning.

Owns the table. Does not know who is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import all_errors


@dataclass(frozen=True, slots=True)
class Refusal:
    """One kind of refusal. Without a status it is not answered: the connection or call ends."""

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
    "A gRPC call ended before its message had come. Its client left, or the message is longer than "
    "`router.max_body_bytes`, which only the client is told, as RESOURCE_EXHAUSTED: a server sees "
    "both alike in this library.",
)
OTHER = Refusal("other", "In the metrics, whatever has no word here; the log has its own.")
ALL = (
    UNSUPPORTED_ENDPOINT, METHOD_NOT_ALLOWED, BAD_REQUEST, HEADERS_TOO_LARGE, TOO_MANY_PIPELINED,
    TOO_MANY_CONNECTIONS, NO_DESCRIPTORS, SILENT, UNREAD, OTHER,
)  # fmt: skip
CODES = frozenset(kind.code for kind in ALL) | {error.code for error in all_errors()}
"""Every word that may become a label."""
