"""The boundary at which a fault stops: it harms what it belongs to, and nothing around it.

Owns two rules. An error of the tree passes as it is; any other exception is a bug of ours: it
is logged once, with its traceback, and becomes an `InternalError`. Does not know what goes on
around the boundary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def contained(what: str, on_fault: Callable[[ServingError], None] | None = None) -> Iterator[None]:
    """Let no exception out of the block.

    Args:
        what: As for `fault_of`.
        on_fault: Called with that error; without one, errors of the tree are logged too.
    """
    try:
        yield
    except Exception as error:
        if on_fault is not None:
            on_fault(fault_of(what, error))
        else:
            log.error("%s failed", what, exc_info=error)
