"""The boundary at which a fault stops: it harms what it belongs to, and nothing around it.

Owns two rules. An error of the tree passes as it is; any other exception is a bug of ours: it
is logged once, with its traceback, and becomes an `InternalError`. Does not know what goes on
around the boundary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from core.errors import InternalError, ServingError

log = logging.getLogger(__name__)


def fault_of(what: str, error: Exception) -> ServingError:
    """Turn an exception into an error of the tree; logs it unless it is one already.

    Args:
        what: What failed, as the subject of a sentence; no data of users.
        error: The exception that is being handled.
    """
    if isinstance(error, ServingError):
        return error
    log.error("%s failed", what, exc_info=error)
    return InternalError(f"{what} failed with {type(error).__name__}; the log has the traceback")


class contained:  # noqa: N801 - reads as a word of the `with` statement
    """Let no exception out of the block. Cheap to enter: every token passes one."""

    __slots__ = ("_on_fault", "_what")

    def __init__(self, what: str, on_fault: Callable[[ServingError], None] | None = None) -> None:
        """Guard a block.

        Args:
            what: As for `fault_of`.
            on_fault: Called with that error; without one, errors of the tree are logged too.
        """
        self._what = what
        self._on_fault = on_fault

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        """End it; True if it raised an exception, which goes no further."""
        if not isinstance(error, Exception):
            return False
        if self._on_fault is not None:
            self._on_fault(fault_of(self._what, error))
        else:
            log.error("%s failed", self._what, exc_info=error)
        return True
