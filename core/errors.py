"""Every error a user can meet, in one tree, with its HTTP and gRPC code.

    ServingError
    ├─ ClientError                 400  INVALID_ARGUMENT
    │   ├─ InvalidRequest          400  INVALID_ARGUMENT
    │   ├─ PromptTooLong           400  INVALID_ARGUMENT
    │   ├─ PayloadTooLarge         413  INVALID_ARGUMENT
    │   ├─ RequestTimeout          408  DEADLINE_EXCEEDED
    │   ├─ ModelNotFound           404  NOT_FOUND
    │   ├─ RequestNotFound         404  NOT_FOUND
    │   └─ DuplicateRequest        409  ALREADY_EXISTS
    ├─ Unauthenticated             401  UNAUTHENTICATED
    ├─ PermissionDenied            403  PERMISSION_DENIED
    ├─ RateLimited                 429  RESOURCE_EXHAUSTED
    ├─ Unavailable                 503  UNAVAILABLE
    │   ├─ Overloaded              503  UNAVAILABLE
    │   │   ├─ QueueFull           503  UNAVAILABLE
    │   │   ├─ QueueTimeout        503  UNAVAILABLE
    │   │   └─ TooLate             503  UNAVAILABLE
    │   ├─ NoWorker                503  UNAVAILABLE
    │   ├─ Draining                503  UNAVAILABLE
    │   ├─ PoolExhausted           503  UNAVAILABLE
    │   ├─ WorkerLost              503  UNAVAILABLE
    │   │   └─ WorkerDied          503  UNAVAILABLE
    │   └─ KVTransferError         502  UNAVAILABLE
    │       ├─ TransferNotFound    502  UNAVAILABLE
    │       ├─ ChecksumMismatch    502  UNAVAILABLE
    │       └─ LeaseExpired        502  UNAVAILABLE
    ├─ DeadlineExceeded            504  DEADLINE_EXCEEDED
    ├─ Cancelled                   499  CANCELLED
    │   └─ SlowReader              499  CANCELLED
    ├─ ConfigError                 500  FAILED_PRECONDITION
    │   └─ ModelLoadError          500  FAILED_PRECONDITION
    └─ InternalError               500  INTERNAL
        ├─ StepFailed              500  INTERNAL
        ├─ Quarantined             500  INTERNAL
        ├─ LayoutMismatch          500  FAILED_PRECONDITION
        └─ InvariantViolation      500  INTERNAL

Owns the classes, their codes, and their form on our wires (`code`, `message`). Does not know grpc
or HTTP libraries: codes are numbers and names, translated once by each server and client.
A message states the fact, the numbers and the remedy, and never a path, host or stack.
"""

from __future__ import annotations

from typing import ClassVar


class ServingError(Exception):
    """Root of the tree. `is_retryable`: another attempt, elsewhere, may succeed."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        """Keep the whole message as the only argument, so that copies lose nothing."""
        super().__init__(message)
        self.message = message


class ClientError(ServingError):
    """The request cannot be served as it is written."""

    code = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class InvalidRequest(ClientError):
    """A field is wrong; `field` names it."""

    code = "invalid_value"

    def __init__(self, field: str, fact: str) -> None:
        """Name the field and state what is wrong with it."""
        super().__init__(f"{field} {fact}")
        self.field = field


class PromptTooLong(ClientError):
    """Prompt plus requested output exceed the context window or the KV pool."""

    code = "context_length_exceeded"


class PayloadTooLarge(ClientError):
    """The body has too many bytes."""

    code = "payload_too_large"
    http_status = 413


class RequestTimeout(ClientError):
    """The request itself came too slowly."""

    code = "request_timeout"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"


class ModelNotFound(ClientError):
    """No such model is served here."""

    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class RequestNotFound(ClientError):
    """This router remembers no such request of the caller's."""

    code = "request_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class DuplicateRequest(ClientError):
    """A request with this id is running."""

    code = "duplicate_request"
    http_status = 409
    grpc_status = "ALREADY_EXISTS"


class Unauthenticated(ServingError):
    """No credential, or a wrong one; the answer does not tell which."""

    code = "invalid_api_key"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class PermissionDenied(ServingError):
    """A good credential that may not do this."""

    code = "permission_denied"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class RateLimited(ServingError):
    """The caller's quota is used up."""

    code = "rate_limit_exceeded"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    retry_after_s: float = 1.0

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        """Keep when the request will fit (seconds)."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ServingError):
    """The cluster cannot serve this now; trying again later may help."""

    code = "server_overloaded"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    is_retryable = True
    retry_after_s: float = 1.0


class Overloaded(Unavailable):
    """There is no room for the request now."""

    is_retryable = False

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        """Keep when to come back (seconds)."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """As many requests, or tokens of their prompts, wait for a permit as may."""

    code = "queue_full"


class QueueTimeout(Overloaded):
    """No permit came free while the request waited for one."""

    code = "queue_timeout"


class TooLate(Overloaded):
    """Predicted: the request would wait beyond its deadline, or longer than requests may."""

    code = "too_late"


class NoWorker(Unavailable):
    """No live worker can take the request, and waiting for one has not helped."""

    code = "no_worker"
    is_retryable = False


class Draining(Unavailable):
    """The process takes nothing new: it shuts down, or its ranks start again."""

    code = "draining"


class PoolExhausted(Unavailable):
    """A KV pool had no room in time."""

    code = "pool_exhausted"


class WorkerLost(Unavailable):
    """A worker died, hung or was cut off during an attempt."""

    code = "worker_lost"


class WorkerDied(WorkerLost):
    """The worker's process, or its ranks in a step with this request, are dead or stuck.

    Counts towards quarantine.
    """


class KVTransferError(Unavailable):
    """The hand-over of KV blocks failed."""

    code = "kv_transfer_failed"
    http_status = 502


class TransferNotFound(KVTransferError):
    """The sender knows no such transfer, or does not know this receiver."""


class ChecksumMismatch(KVTransferError):
    """Received KV did not match its checksum, twice."""


class LeaseExpired(KVTransferError):
    """Nobody asked for the blocks in time."""


class DeadlineExceeded(ServingError):
    """The request's deadline passed."""

    code = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(ServingError):
    """The caller no longer wants the answer."""

    code = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class SlowReader(Cancelled):
    """The caller stopped reading, and was cut off."""

    code = "slow_reader"


class ConfigError(ServingError):
    """A configuration that cannot be started."""

    code = "config_error"
    grpc_status = "FAILED_PRECONDITION"


class ModelLoadError(ConfigError):
    """A model folder that cannot be served, with the tensor or key at fault."""

    code = "model_load_error"


class InternalError(ServingError):
    """A bug of ours."""


class StepFailed(InternalError):
    """The engine failed while computing this request."""

    code = "step_failed"
    is_retryable = True


class Quarantined(InternalError):
    """The request was present at several worker deaths and is not tried again."""

    code = "request_quarantined"


class LayoutMismatch(InternalError):
    """Two workers do not agree on what a KV block is."""

    code = "layout_mismatch"
    grpc_status = "FAILED_PRECONDITION"
    is_retryable = True


class InvariantViolation(InternalError):
    """The books do not balance; the message carries them."""

    code = "invariant_violation"


def all_errors() -> list[type[ServingError]]:
    """List the tree, parents first."""
    found: list[type[ServingError]] = []
    stack: list[type[ServingError]] = [ServingError]
    while stack:
        error = stack.pop(0)
        found.append(error)
        stack = error.__subclasses__() + stack
    return found


def to_wire(error: ServingError) -> tuple[str, str]:
    """Reduce an error to (class name, message)."""
    return type(error).__name__, error.message


def from_wire(name: str, message: str) -> ServingError:
    """Rebuild an error from `to_wire`; a name of a newer version becomes `InternalError`."""
    kind = next((e for e in all_errors() if e.__name__ == name), InternalError)
    # Past the constructor: each class has its own, and the message is whole already.
    error = kind.__new__(kind)
    ServingError.__init__(error, message)
    if isinstance(error, InvalidRequest):
        error.field = message.partition(" ")[0]
    return error
