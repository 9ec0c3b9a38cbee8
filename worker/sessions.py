"""Sessions with routers: commands come down, one frame per engine step goes up.

Owns the streams, what each router has not been sent yet, and the patience with a router that is
gone (5 s). There is no outbox of frames: the next frame is built from unsent positions when the
stream is writable. A command that fails harms the attempt it names, never the session. Does not
know scheduling.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Protocol

from core import events
from core.awake import AwakeClock
from core.changes import Changes
from core.containment import contained
from core.errors import InvalidRequest, ServingError, WorkerLost
from core.ids import Epoch, RouterId, RunId
from core.ports import Clock, MessageStream, Network, StreamClosed
from core.session import (
    AttemptEnded,
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    PeerReport,
    Progress,
    RouteReport,
    StepFrame,
    Submit,
    Task,
    TokenDelta,
    ToWorker,
    Wanted,
    Welcome,
    WorkerDescriptor,
    WorkerTiming,
)
from transport.sequenced import NumberedStream
from worker.attempt import ENDED_BYTES, MIN_SHARE_BYTES, Attempt
from worker.checking import check_hello, check_peers

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
ROUTER_PATIENCE_S = 5.0
HELLO_TIMEOUT_S = 5.0
MAX_ROUTERS = 1024
MAX_UNTOLD = 65_536
"""Ends of attempts that were never begun, for a router that does not read them."""
FRAME_BYTES = 256 << 10
"""Most that a frame holds: far below what a message may, and coded in some milliseconds."""


class SessionCallbacks(Protocol):
    """What sessions ask of the worker."""

    def submit(self, router_id: RouterId, submit: Submit) -> None:
        """Take part in an attempt."""
        ...

    def cancel(self, request_id: RunId, epoch: int) -> None:
        """Forget an attempt and older ones."""
        ...

    def credit(self, message: Credit) -> None:
        """More positions may be computed."""
        ...

    def fail(self, request_id: RunId, epoch: int, error: ServingError) -> None:
        """A command for this attempt failed: it ends."""
        ...

    def connect_peers(self, message: ConnectPeers) -> None:
        """Open the ways to peers."""
        ...

    def router_alive(self, router_id: RouterId) -> None:
        """Something came from this router: its leases go on."""
        ...

    def progress(self) -> Progress:
        """Current counters."""
        ...

    def descriptor(self) -> WorkerDescriptor:
        """Who the worker is."""
        ...


Fail = Callable[[RunId, Epoch, ServingError], None]


class RouterSession:
    """One router's side: its attempts, and the stream while there is one."""

    def __init__(self, router_id: RouterId, fail: Fail, frame_bytes: int = FRAME_BYTES) -> None:
        """Start without a stream.

        Args:
            router_id: Whose session it is.
            fail: Ends an attempt that cannot be told.
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
        self.routes: dict[str, RouteReport] = {}
        self.dirty: dict[RunId, None] = {}
        self.wake = asyncio.Event()

    def touch(self, attempt: Attempt) -> None:
        """Something of this attempt is unsent."""
        self.dirty[attempt.request_id] = None
        self.wake.set()

    def build_frame(self, step_id: int) -> StepFrame | None:
        """Collect what is unsent into one frame of a bounded size; None if nothing is.

        Attempts share the frame equally, so that one with much to say holds back nobody's tokens;
        what does not fit stays unsent, behind the others.
        """
        attempts = [a for r in self.dirty if (a := self.attempts.get(r)) is not None]
        self.dirty = {attempt.request_id: None for attempt in attempts}
        share_bytes = max(self._frame_bytes // max(1, len(attempts)), MIN_SHARE_BYTES)
        deltas: list[TokenDelta] = []
        num_unknown = self._frame_bytes // MIN_SHARE_BYTES
        ended = self.unknown[:num_unknown]
        del self.unknown[:num_unknown]
        left_bytes = self._frame_bytes - ENDED_BYTES * len(ended)
        for attempt in attempts:
            if left_bytes < MIN_SHARE_BYTES:
                break
            del self.dirty[attempt.request_id]
            with contained("the frame of an attempt", functools.partial(self._drop, attempt)):
                part = attempt.take(min(share_bytes, left_bytes))
                left_bytes -= part.num_bytes
                deltas += part.deltas
                ended += part.ended
                if attempt.has_unsent:
                    self.dirty[attempt.request_id] = None
        return StepFrame(step_id, tuple(deltas), tuple(ended)) if deltas or ended else None

    def _drop(self, attempt: Attempt, error: ServingError) -> None:
        attempt.drop_output()
        self._fail(attempt.request_id, attempt.epoch, error)
        self.touch(attempt)  # `fail` does not touch one that had ended already


class SessionServer:
    """All sessions of one worker."""

    def __init__(
        self,
        network: Network,
        callbacks: SessionCallbacks,
        clock: Clock,
        step_id: Callable[[], int],
        frame_bytes: int = FRAME_BYTES,
    ) -> None:
        """Keep the collaborators; `listen` starts it."""
        self._frame_bytes = frame_bytes
        self._network = network
        self._callbacks = callbacks
        self._step_id = step_id
        self._awake = AwakeClock(clock)
        self._sessions: dict[RouterId, RouterSession] = {}
        self._changes = Changes()

    async def listen(self) -> str:
        """Serve sessions; returns the address to publish."""
        return await self._network.listen(self._serve)

    def send_route(self, route: RouteReport) -> None:
        """Every router may know how a way to a peer was found."""
        for session in self._sessions.values():
            session.routes[route.address] = route
            session.wake.set()

    def tell(self) -> None:
        """Something in `progress` changed that routers should know before the next beat."""
        self._changes.note()

    async def close(self) -> None:
        """End every stream."""
        await self._network.close()

    def session(self, router_id: RouterId) -> RouterSession:
        """Find or begin the session with a router."""
        session = self._sessions.get(router_id)
        if session is None:
            events.ROUTER_CONNECTED.log(router_id=router_id)
            session = RouterSession(router_id, self._callbacks.fail, self._frame_bytes)
            self._sessions[router_id] = session
        return session

    async def _serve(self, sidecar: MessageStream) -> None:
        stream = NumberedStream(sidecar)
        hello: object = None
        with (
            contained("the greeting of a router"),
            contextlib.suppress(StreamClosed, TimeoutError),
        ):
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await stream.recv()
        if not isinstance(hello, Hello) or not self._is_welcome(hello):
            stream.reset()
            return
        session = self.session(hello.router_id)
        if hello.stream_number < session.stream_number:
            stream.reset()  # it was dialled before the newest, which has said what is wanted
            return
        session.stream_number = hello.stream_number
        if session.stream is not None:
            session.stream.reset()
        session.stream = stream
        session.lost_at = None
        session.heard_at = self._awake.now_s()
        self._resume(session, hello.wanted)
        try:
            await stream.send(Welcome(self._callbacks.descriptor()))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(session, stream))
                tasks.create_task(self._write(session, stream))
                tasks.create_task(self._heartbeat(stream))
        except* StreamClosed:
            pass  # the router dials again and says what it wants
        except* Exception as fault:
            # The stream's own fault ends the stream alone; here too the router dials again.
            log.error("the session with router %s failed", session.router_id, exc_info=fault)
            stream.reset()
        finally:
            if session.stream is stream:
                session.stream = None
                session.lost_at = self._awake.now_s()

    def _is_welcome(self, hello: Hello) -> bool:
        """Refuse a greeting that cannot be a router's."""
        try:
            check_hello(hello)
            if hello.router_id not in self._sessions and len(self._sessions) >= MAX_ROUTERS:
                raise InvalidRequest("router_id", f"is that of router no. {MAX_ROUTERS + 1}")
        except InvalidRequest as error:
            log.warning("the greeting of a router is refused: %s", error)
            return False
        return True

    def _resume(self, session: RouterSession, wanted: tuple[Wanted, ...]) -> None:
        """Send again from the wanted positions; cancel what is no longer wanted."""
        wanted_by_id = {w.request_id: w for w in wanted}
        session.unknown.clear()  # what is unknown is worked out anew
        for request_id, attempt in list(session.attempts.items()):
            want = wanted_by_id.get(request_id)
            fail = functools.partial(self._callbacks.fail, request_id, attempt.epoch)
            with contained("taking up an attempt after a reconnect", fail):
                if want is None or want.epoch != attempt.epoch:
                    # A newer one, if wanted, is reported as unknown below.
                    self._callbacks.cancel(request_id, attempt.epoch)
                else:
                    del wanted_by_id[request_id]
                    attempt.rewind(want)
                    self._callbacks.credit(
                        Credit(request_id, want.epoch, want.credit, want.finished_choices)
                    )
                    session.touch(attempt)
        for want in wanted_by_id.values():
            if not want.is_coming:
                error = WorkerLost("the worker does not know this attempt (any more)")
                session.unknown.append(
                    AttemptEnded(want.request_id, want.epoch, Task.LOCAL, WorkerTiming(), error)
                )
        session.wake.set()

    async def _read(self, session: RouterSession, stream: MessageStream) -> None:
        while True:
            message = await stream.recv()
            if session.stream is not stream:
                raise StreamClosed(
                    "a newer stream took over"
                )  # it has said what is wanted; this is older
            session.heard_at = self._awake.now_s()
            self._take(session, message)

    def _take(self, session: RouterSession, message: ToWorker) -> None:
        """Pass a command on; what goes wrong with it ends the attempt it names, if it names one."""
        with contained("the renewal of a router's leases"):
            self._callbacks.router_alive(session.router_id)
        match message:
            case Submit():
                with contained("a Submit", functools.partial(self._refuse, session, message)):
                    self._callbacks.submit(session.router_id, message)
            case Cancel(request_id, epoch):
                with contained("a Cancel"):
                    self._callbacks.cancel(request_id, epoch)
            case Credit(request_id, epoch):
                with contained(
                    "a Credit", functools.partial(self._callbacks.fail, request_id, epoch)
                ):
                    self._callbacks.credit(message)
            case ConnectPeers():
                with contained("meeting peers"):
                    check_peers(message)
                    self._callbacks.connect_peers(message)
            case _:
                pass  # a beat, or a message of a newer version

    def _refuse(self, session: RouterSession, submit: Submit, error: ServingError) -> None:
        """The worker could not even begin: say so, or the router would wait for it.

        Raises:
            StreamClosed: The router has not read what was said to very many others.
        """
        if len(session.unknown) >= MAX_UNTOLD:
            raise StreamClosed(f"the router does not read of {MAX_UNTOLD} attempts' ends")
        request_id = submit.run_id
        session.unknown.append(
            AttemptEnded(request_id, submit.epoch, submit.task, WorkerTiming(), error)
        )
        session.wake.set()

    async def _write(self, session: RouterSession, stream: MessageStream) -> None:
        while True:
            session.wake.clear()
            if session.stream is not stream:
                raise StreamClosed("a newer stream took over")  # what is unsent is its to send
            frame = session.build_frame(self._step_id())
            if frame is not None:
                await stream.send(frame)
            elif session.routes:
                routes, session.routes = session.routes, {}
                await stream.send(PeerReport(tuple(routes.values())))
            else:
                await session.wake.wait()

    async def _heartbeat(self, stream: MessageStream) -> None:
        while True:
            changed = self._changes.next  # before the count: what comes later is told next
            progress: Progress | None = None
            with contained("counting progress"):
                progress = self._callbacks.progress()
            if progress is not None:
                await stream.send(progress)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await changed.wait()

    async def watch(self) -> None:
        """Give up on routers that stay away or are silent; runs as long as the worker."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._awake.tick()
            now_s = self._awake.now_s()
            for session in list(self._sessions.values()):
                if session.stream is not None and now_s - session.heard_at > ROUTER_PATIENCE_S:
                    # Half open: the router's end of the wire is gone without a word.
                    session.stream.reset()
                    session.stream = None
                    session.lost_at = session.heard_at
                if session.lost_at is not None and now_s - session.lost_at > ROUTER_PATIENCE_S:
                    self._give_up(session)

    def _give_up(self, session: RouterSession) -> None:
        events.ROUTER_GONE.log(router_id=session.router_id, attempts=len(session.attempts))
        for request_id, attempt in list(session.attempts.items()):
            with contained("a Cancel for a router that is gone"):
                self._callbacks.cancel(request_id, attempt.epoch)
        del self._sessions[session.router_id]
