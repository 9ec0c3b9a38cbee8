"""Sessions with routers: commands come down, one frame per engine step goes up.

Owns the streams, and the patience with a router that is gone (5 s). A command that fails harms the
attempt it names, never the session. Does not know scheduling, nor what a frame holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Protocol

from core import events
from core.awake_clock import AwakeClock
from core.change_event import ChangeEvent
from core.containment import contained
from core.errors import InvalidRequest, ServingError, WorkerLost
from core.ids import RouterId, RunId
from core.ports import Clock, MessageStream, Network, StreamClosed
from core.session import (
    AttemptEnded,
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    OfferPrefix,
    PeerReport,
    Progress,
    Submit,
    Task,
    ToWorker,
    Wanted,
    Welcome,
    WorkerDescriptor,
    WorkerTiming,
)
from transport.sequenced import NumberedStream
from worker.checking import check_hello, check_peers
from worker.router_session import RouterSession, RouterSessions

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
ROUTER_PATIENCE_S = 5.0
"""As long as a lease: without its router nobody reads what is computed."""
HELLO_TIMEOUT_S = 5.0
"""A stream whose opener does not name itself must not stay open."""
MAX_ROUTERS = 1024
MAX_UNSENT_ENDS = 65_536
"""Ends of attempts that were never begun, for a router that does not read them."""


class Commands(Protocol):
    """What routers ask of the worker's attempts."""

    def submit(self, router_id: RouterId, submit: Submit) -> None:
        """Take part in an attempt."""
        ...

    def cancel(self, run_id: RunId, epoch: int) -> None:
        """Forget an attempt and older ones."""
        ...

    def credit(self, message: Credit) -> None:
        """More positions may be computed."""
        ...

    def fail(self, run_id: RunId, epoch: int, error: ServingError) -> None:
        """A command for this attempt failed: it ends."""
        ...

    def offer_prefix(self, message: OfferPrefix) -> None:
        """Let a peer fetch blocks that are cached here."""
        ...

    def connect_peers(self, message: ConnectPeers) -> None:
        """Connect to peers before a request needs them."""
        ...

    def router_alive(self, router_id: RouterId) -> None:
        """Something came from this router: its leases go on."""
        ...


class WorkerStatus(Protocol):
    """What routers are sent about the worker itself."""

    @property
    def descriptor(self) -> WorkerDescriptor:
        """Who the worker is."""
        ...

    def progress(self) -> Progress:
        """Read the current counters."""
        ...


class SessionServer:
    """The streams of one worker's sessions."""

    def __init__(
        self,
        network: Network,
        sessions: RouterSessions,
        commands: Commands,
        status: WorkerStatus,
        clock: Clock,
        step_id: Callable[[], int],
    ) -> None:
        """Keep the collaborators; `listen` starts it."""
        self._network = network
        self._sessions = sessions
        self._commands = commands
        self._status = status
        self._step_id = step_id
        self._awake = AwakeClock(clock)
        self._changes = ChangeEvent()

    async def listen(self) -> str:
        """Serve sessions; returns the address to publish."""
        return await self._network.listen(self._serve)

    def progress_changed(self) -> None:
        """Send `progress` at once: routers should know of a change before the next heartbeat."""
        self._changes.note()

    async def close(self) -> None:
        """End every stream."""
        await self._network.close()

    async def _serve(self, inner: MessageStream) -> None:
        stream = NumberedStream(inner)
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
        session = self._sessions.of(hello.router_id)
        if hello.stream_number < session.stream_number:
            # It was dialled before the newest, whose Hello lists what is wanted by now.
            stream.reset()
            return
        session.stream_number = hello.stream_number
        # Two streams at once would each send a part of what is unsent, in no order.
        if session.stream is not None:
            session.stream.reset()
        session.stream = stream
        session.lost_at = None
        session.heard_at = self._awake.now_s()
        self._resume(session, hello.wanted)
        try:
            await stream.send(Welcome(self._status.descriptor))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(session, stream))
                tasks.create_task(self._write(session, stream))
                tasks.create_task(self._heartbeat(stream))
        except* StreamClosed:
            pass  # the router dials again, and its Hello lists what it wants
        except* Exception as fault:
            # The stream's own fault ends the stream alone; here too the router dials again.
            log.error("the session with router %s failed", session.router_id, exc_info=fault)
            stream.reset()
        finally:
            # A newer stream may have taken the session over: then the router is not lost.
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
        wanted_by_id = {w.run_id: w for w in wanted}
        session.unknown.clear()  # what is unknown is worked out anew
        for run_id, attempt in list(session.attempts.items()):
            want = wanted_by_id.get(run_id)
            fail = functools.partial(self._commands.fail, run_id, attempt.epoch)
            with contained("taking up an attempt after a reconnect", fail):
                if want is None or want.epoch != attempt.epoch:
                    # A newer one, if wanted, is reported as unknown below.
                    self._commands.cancel(run_id, attempt.epoch)
                else:
                    del wanted_by_id[run_id]
                    attempt.rewind(want)
                    self._commands.credit(
                        Credit(run_id, want.epoch, want.credit, want.finished_choices)
                    )
                    session.touch(attempt)
        for want in wanted_by_id.values():
            # One whose Submit is still on its way is no loss.
            if not want.is_coming:
                error = WorkerLost("the worker does not know this attempt (any more)")
                session.unknown.append(
                    AttemptEnded(want.run_id, want.epoch, Task.LOCAL, WorkerTiming(), error)
                )
        session.wake.set()

    async def _read(self, session: RouterSession, stream: MessageStream) -> None:
        while True:
            message = await stream.recv()
            if session.stream is not stream:
                # The newer stream's Hello lists what is wanted; this message is older than that.
                raise StreamClosed("a newer stream took over")
            session.heard_at = self._awake.now_s()
            self._take(session, message)

    def _take(self, session: RouterSession, message: ToWorker) -> None:
        """Pass a command on; what goes wrong with it ends the attempt it names, if it names one."""
        with contained("the renewal of a router's leases"):
            self._commands.router_alive(session.router_id)
        match message:
            case Submit():
                with contained("a Submit", functools.partial(self._refuse, session, message)):
                    self._commands.submit(session.router_id, message)
            case Cancel(run_id, epoch):
                with contained("a Cancel"):
                    self._commands.cancel(run_id, epoch)
            case Credit(run_id, epoch):
                fail = functools.partial(self._commands.fail, run_id, epoch)
                with contained("a Credit", fail):
                    self._commands.credit(message)
            case OfferPrefix():
                # No attempt of this worker depends on it: the peer computes what it does not get.
                with contained("the offer of a prefix"):
                    self._commands.offer_prefix(message)
            case ConnectPeers():
                with contained("connecting peers"):
                    check_peers(message)
                    self._commands.connect_peers(message)
            case _:
                pass  # a heartbeat, or a message of a newer version

    def _refuse(self, session: RouterSession, submit: Submit, error: ServingError) -> None:
        """Report an attempt that could not even begin, or the router would wait for it.

        Raises:
            StreamClosed: The router has not read the ends of very many others.
        """
        if len(session.unknown) >= MAX_UNSENT_ENDS:
            raise StreamClosed(f"the router does not read of {MAX_UNSENT_ENDS} attempts' ends")
        session.unknown.append(
            AttemptEnded(submit.run_id, submit.epoch, submit.task, WorkerTiming(), error)
        )
        session.wake.set()

    async def _write(self, session: RouterSession, stream: MessageStream) -> None:
        while True:
            # Cleared before the look: what comes after it wakes this task again.
            session.wake.clear()
            if session.stream is not stream:
                raise StreamClosed("a newer stream took over")  # what is unsent is its to send
            frame = session.build_frame(self._step_id())
            if frame is not None:
                await stream.send(frame)
            elif session.routes:
                # Tokens go first: a report of a route can wait, and a client cannot.
                routes = session.routes
                session.routes = {}
                await stream.send(PeerReport(tuple(routes.values())))
            else:
                await session.wake.wait()

    async def _heartbeat(self, stream: MessageStream) -> None:
        while True:
            changed = self._changes.next  # before the count: what comes later is sent next
            progress: Progress | None = None
            with contained("counting progress"):
                progress = self._status.progress()
            if progress is not None:
                await stream.send(progress)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await changed.wait()

    async def watch(self) -> None:
        """Give up on routers that stay away or are silent; runs as long as the worker."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            # Counted in time awake: after a pause of this process no router has been silent yet.
            self._awake.tick()
            now_s = self._awake.now_s()
            for session in self._sessions:
                if session.stream is not None and now_s - session.heard_at > ROUTER_PATIENCE_S:
                    # Half open: the router's end of the wire is gone without a word.
                    session.stream.reset()
                    session.lost_at = session.heard_at
                if session.lost_at is not None and now_s - session.lost_at > ROUTER_PATIENCE_S:
                    self._give_up(session)

    def _give_up(self, session: RouterSession) -> None:
        events.ROUTER_GONE.log(router_id=session.router_id, attempts=len(session.attempts))
        for run_id, attempt in list(session.attempts.items()):
            with contained("a Cancel for a router that is gone"):
                self._commands.cancel(run_id, attempt.epoch)
        self._sessions.forget(session)
