"""What each router has still to be sent, by router.

Owns a session's unsent attempts, ends and reports, and the frame that is built from them. There is
no outbox of frames: the next frame is built from unsent positions when the stream is writable. Does
not know streams' life, nor scheduling.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator

from core import events
from core.containment import contained
from core.errors import ServingError
from core.ids import Epoch, RouterId, RunId
from core.ports import MessageStream
from core.session import AttemptEnded, RouteReport, StepFrame, TokenDelta
from worker.attempt import ENDED_BYTES, MIN_SHARE_BYTES, Attempt

FRAME_BYTES = 256 << 10
"""Most that a frame holds: far below what a message may, and coded in some milliseconds."""

Fail = Callable[[RunId, Epoch, ServingError], None]


class RouterSession:
    """One router's side: its attempts, and the stream while there is one."""

    def __init__(self, router_id: RouterId, fail: Fail, frame_bytes: int = FRAME_BYTES) -> None:
        """Start without a stream.

        Args:
            router_id: Whose session it is.
            fail: Ends an attempt that cannot be sent.
            frame_bytes: Longest frame; at least `MIN_SHARE_BYTES`.
        """
        self.router_id = router_id
        self._frame_bytes = frame_bytes
        self._fail = fail
        self.attempts: dict[RunId, Attempt] = {}
        self.stream: MessageStream | None = None
        self.lost_at: float | None = None
        self.stream_number = -1
        """Of the newest stream: an older one that comes late is refused."""
        self.heard_at = 0.0
        self.unknown: list[AttemptEnded] = []
        """Ends of attempts that are not here."""
        self.routes: dict[str, RouteReport] = {}
        """Unsent reports by the peer's address: only the newest of each is worth sending."""
        self.dirty: dict[RunId, None] = {}
        """Attempts with something unsent, in turn: a dict, as a set has no order."""
        self.wake = asyncio.Event()

    def touch(self, attempt: Attempt) -> None:
        """Something of this attempt is unsent."""
        self.dirty[attempt.run_id] = None
        self.wake.set()

    def build_frame(self, step_id: int) -> StepFrame | None:
        """Collect what is unsent into one frame of a bounded size; None if nothing is.

        Attempts share the frame equally, so that one with much to send holds back nobody's tokens;
        what does not fit stays unsent, behind the others.
        """
        # An attempt may have been cancelled since it was touched.
        attempts = [a for r in self.dirty if (a := self.attempts.get(r)) is not None]
        self.dirty = {attempt.run_id: None for attempt in attempts}
        share_bytes = max(self._frame_bytes // max(1, len(attempts)), MIN_SHARE_BYTES)
        deltas: list[TokenDelta] = []
        # Few enough to leave room for the attempts: an end is smaller than the smallest share.
        num_unknown = self._frame_bytes // MIN_SHARE_BYTES
        ended = self.unknown[:num_unknown]
        del self.unknown[:num_unknown]
        left_bytes = self._frame_bytes - ENDED_BYTES * len(ended)
        for attempt in attempts:
            if left_bytes < MIN_SHARE_BYTES:
                break  # those left are still in `dirty`, now at the head of the line
            del self.dirty[attempt.run_id]
            with contained("the frame of an attempt", functools.partial(self._drop, attempt)):
                share = attempt.take(min(share_bytes, left_bytes))
                left_bytes -= share.num_bytes
                deltas += share.deltas
                ended += share.ended
                if attempt.has_unsent:
                    self.dirty[attempt.run_id] = None  # to the end of the line
        return StepFrame(step_id, tuple(deltas), tuple(ended)) if deltas or ended else None

    def _drop(self, attempt: Attempt, error: ServingError) -> None:
        # Its output broke the frame once and would break every later one.
        attempt.drop_output()
        self._fail(attempt.run_id, attempt.epoch, error)
        self.touch(attempt)  # `fail` does not touch one that had ended already


class RouterSessions:
    """The sessions of one worker, by router."""

    def __init__(self, fail: Fail, frame_bytes: int = FRAME_BYTES) -> None:
        """Start with no router; the arguments are those of `RouterSession`."""
        self._fail = fail
        self._frame_bytes = frame_bytes
        self._by_id: dict[RouterId, RouterSession] = {}

    def __len__(self) -> int:
        """Count the routers."""
        return len(self._by_id)

    def __contains__(self, router_id: RouterId) -> bool:
        """Return True for a router that has a session."""
        return router_id in self._by_id

    def __iter__(self) -> Iterator[RouterSession]:
        """Go over the sessions as they are now; some may be forgotten meanwhile."""
        return iter(list(self._by_id.values()))

    def of(self, router_id: RouterId) -> RouterSession:
        """Find or begin the session with a router."""
        session = self._by_id.get(router_id)
        if session is None:
            events.ROUTER_CONNECTED.log(router_id=router_id)
            session = RouterSession(router_id, self._fail, self._frame_bytes)
            self._by_id[router_id] = session
        return session

    def forget(self, session: RouterSession) -> None:
        """Drop the session of a router that is gone."""
        del self._by_id[session.router_id]

    def send_route(self, route: RouteReport) -> None:
        """Report to every router how KV would come from a peer."""
        for session in self._by_id.values():
            session.routes[route.address] = route
            session.wake.set()
