"""Whether a worker takes attempts: not while it drains, nor without ranks, nor once it is broken.

Owns these three facts and the refusal. Does not know attempts.
"""

from __future__ import annotations

import asyncio
import logging

from core import events
from core.errors import Draining, ServingError

log = logging.getLogger(__name__)


class Availability:
    """What one worker can do at the moment."""

    def __init__(self) -> None:
        """Begin ready. Needs a running loop, on which `fatal` can be awaited."""
        self.is_ready = True
        self.is_draining = False
        self.fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set to what ended the worker."""

    @property
    def is_leaving(self) -> bool:
        """True if the worker ends as it was asked to, and not because it broke."""
        return self.is_draining and not self.fatal.done()

    def check_open(self) -> None:
        """Refuse an attempt that would be lost: while the ranks are down there is no pool.

        Raises:
            Draining: Nothing of the request is here, so it moves, and no fault is counted.
        """
        if self.is_draining:
            raise Draining("the worker is shutting down; another one will take the request")
        if not self.is_ready:
            raise Draining(
                "the worker's ranks are not running, fresh ones start; "
                "another worker will take the request"
            )

    def drain(self) -> None:
        """Take nothing new from now on."""
        self.is_draining = True
        self.is_ready = False

    def pause(self) -> None:
        """The ranks are down, and the KV pool with them."""
        self.is_ready = False

    def resume(self) -> None:
        """Fresh ranks are up; a worker that drains stays closed."""
        self.is_ready = not self.is_draining

    def break_down(self, error: BaseException) -> None:
        """End the worker: something it cannot go on without has broken. The first error is kept."""
        if isinstance(error, ServingError):
            events.WORKER_FAILED.log(reason=error.message)
        else:
            log.error("the worker cannot go on", exc_info=error)
        # Later errors are mostly consequences: the first one explains the end.
        if self.fatal.done():
            return
        self.is_ready = False
        self.fatal.set_exception(error)
