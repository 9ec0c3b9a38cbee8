"""The error of a transfer for whatever ended its stream, or broke while it was served.

Owns the translation of any exception into an error that the attempt can end with, and the log line
of those that only a bug explains. Does not know states or workers.
"""

from __future__ import annotations

import logging

from core.errors import KVTransferError, ServingError
from core.ports import StreamClosed

log = logging.getLogger(__name__)


def failure_of(error: BaseException, where: str, silence_s: float = 0.0) -> ServingError:
    """Name what happened; anything unforeseen is logged, and is a failed hand-over like any other.

    Args:
        error: What was raised; of a group, the first counts.
        where: The stream or the place, as a message begins.
        silence_s: What a `TimeoutError` waited for.
    """
    # A task group wraps what its reader or its writer raised; the other one was cancelled.
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ServingError):
        return error
    if isinstance(error, StreamClosed):
        return KVTransferError(f"{where} was lost")
    if isinstance(error, TimeoutError):
        return KVTransferError(f"{where} was silent for {silence_s:g} s")
    log.error("%s broke on a bug", where, exc_info=error)
    return KVTransferError(f"{where} broke on a bug of this worker: {type(error).__name__}")
