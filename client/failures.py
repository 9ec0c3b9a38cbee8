"""What a gRPC error means, as an error of our own tree.

Owns the reading of `google.rpc` details: the reason, the field at fault, when to come back. Does
not know streams.
"""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError

from core.errors import (
    InternalError,
    InvalidRequest,
    RateLimited,
    ServingError,
    Unavailable,
    all_errors,
    from_wire,
)

DETAILS_KEY = "grpc-status-details-bin"


def details_of(failure: AioRpcError) -> bytes:
    """Return the details that a server sent, serialized; empty: it sent none."""
    return next((v for key, v in failure.trailing_metadata() or () if key == DETAILS_KEY), b"")


def error_of(failure: AioRpcError) -> ServingError:
    """Return the error that the server meant, or, without details, the one of the status."""
    reason = error_details_pb2.ErrorInfo()
    request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for box in status_pb2.Status.FromString(details_of(failure)).details:
        for detail in (reason, request, retry):
            box.Unpack(detail)
    status = failure.code().name
    _, *kinds = all_errors()
    named = [kind for kind in kinds if kind.code == reason.reason]
    likely = named or [kind for kind in kinds if kind.grpc_status == status] or [InternalError]
    # Several may share a code: the wire shows no more than what they have in common.
    kind = min(likely, key=lambda kind: len(kind.mro()))
    error = from_wire(kind.__name__, failure.details() or status)
    if isinstance(error, InvalidRequest) and request.field_violations:
        error.field = request.field_violations[0].field
    if isinstance(error, (RateLimited, Unavailable)) and retry.retry_delay != Duration():
        error.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return error
