"""What a `Client` raises: `except errors.ServingError` catches all of it.

Owns the choice of what a caller can meet in the error tree. Does not know its classes' meaning: see
the tree in `core.errors`, and its table in the reference.
"""

from core.errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    PermissionDenied,
    PromptTooLong,
    RateLimited,
    ServingError,
    SlowReader,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "Cancelled",
    "ClientError",
    "DeadlineExceeded",
    "DuplicateRequest",
    "InternalError",
    "InvalidRequest",
    "ModelNotFound",
    "NoWorker",
    "PermissionDenied",
    "PromptTooLong",
    "RateLimited",
    "ServingError",
    "SlowReader",
    "Unauthenticated",
    "Unavailable",
]
