"""The router's end of its session with one worker.

Owns connecting, reconnecting within 2 s, heartbeats and the watch over a hung or silent worker.
Does not know requests, other workers or placement. An exception of the session itself ends the
session, and `subscriptions` ends every attempt that listens.

    DIALLING ─Welcome─▶ LIVE ─stream lost─▶ RECONNECTING ─Welcome─▶ LIVE
                          │ hung 3 s            │ 2 s                  (unsent messages go again)
                          └────────▶ LOST ◀─────┘
                                      └─ dialled anew each second while it is a member ─▶ LIVE
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from core import events
from core.containment import contained
from core.errors import WorkerDied, WorkerLost
from core.ids import Epoch, RouterId, RunId, WorkerLife
from core.ports import Clock, MessageStream, Network, StreamClosed
from core.session import (
    Cancel,
    Credit,
    Hello,
    OfferPrefix,
    PeerReport,
    Progress,
    StepFrame,
    StorageLoad,
    Submit,
    Welcome,
    WorkerDescriptor,
)
from router.candidate import Candidate
from router.workers.liveness import Liveness
from router.workers.load import WorkerLoad
from router.workers.outbox import Outbox
from router.workers.routes import KVRoutes
from router.workers.subscriptions import Subscriber, Subscriptions
from router.workers.view import SessionState, WorkerView
from transport.sequenced import NumberedStream

RECONNECT_S = 2.0
DIAL_TIMEOUT_S = 2.0
RETRY_S = 0.1
MAX_REFUSED = 2


class WorkerSession:
    """One worker, as this router sees it."""

    def __init__(
        self,
        descriptor: WorkerDescriptor,
        network: Network,
        router_id: RouterId,
        clock: Clock,
        stream_numbers: Iterator[int],
        on_state_changed: Callable[[WorkerSession], None],
        *,
        was_lost: bool = False,
    ) -> None:
        """Prepare; `run` dials.

        Args:
            descriptor: The worker.
            network: Dials the worker.
            router_id: How this router introduces itself.
            clock: Of this process.
            stream_numbers: Rise over all streams of this router, so that the worker knows the
                newest.
            on_state_changed: Called after each change of `state` or `is_ready`.
            was_lost: A worker that was lost must answer before requests are placed on it again.
        """
        self.descriptor = descriptor
        self.rank_pids = descriptor.rank_pids
        self.num_reconnects = 0
        self._network = network
        self._router_id = router_id
        self._clock = clock
        self._stream_numbers = stream_numbers
        self._on_state_changed = on_state_changed
        self._state = SessionState.LOST if was_lost else SessionState.DIALLING
        self._is_ready = True
        self._load = WorkerLoad(descriptor)
        self.subscriptions = Subscriptions(descriptor.worker_id, self._load, clock)
        self._outbox = Outbox()
        self.routes = KVRoutes(self._outbox)
        self._liveness = Liveness(descriptor.worker_id, clock)
        self._has_lived = was_lost
        self._close_reason = ""
        self._is_leaving = False
        self._storage: tuple[StorageLoad, ...] = ()

    @property
    def key(self) -> WorkerLife:
        """One life of one worker."""
        return self.descriptor.worker_id, self.descriptor.incarnation

    # --- what placement reads ---------------------------------------------------------------------

    @property
    def state(self) -> SessionState:
        """Whether the session is connected."""
        return self._state

    @property
    def is_ready(self) -> bool:
        """False while the worker drains or restarts its ranks."""
        return self._is_ready

    def view(self) -> WorkerView:
        """Return what operators are shown."""
        return WorkerView(
            self.descriptor,
            self._state,
            self._is_ready,
            self._load.reported,
            self.rank_pids,
            self.routes.reports,
            self._load.candidate.exposed_transfer_s,
            self._storage,
        )

    @property
    def candidate(self) -> Candidate:
        """The worker as placement compares it."""
        return self._load.candidate

    @property
    def is_usable(self) -> bool:
        """True if requests may be placed here."""
        return self._is_ready and self._state in (SessionState.DIALLING, SessionState.LIVE)

    @property
    def is_back_soon(self) -> bool:
        """True if it is not usable now but is likely to be soon, or when its ranks are up."""
        is_connected = self._state in (SessionState.DIALLING, SessionState.LIVE)
        return self._state is SessionState.RECONNECTING or (is_connected and not self._is_ready)

    def _log(self, event: events.Event, **fields: object) -> None:
        d = self.descriptor
        event.log(worker_id=d.worker_id, role=d.role.value, worker_pid=d.pid, node=d.node, **fields)

    def log_left(self) -> None:
        """Log that the worker is no member any more."""
        self._log(events.WORKER_LEFT)

    def _set_state(
        self, *, state: SessionState | None = None, is_ready: bool | None = None
    ) -> None:
        """Change whether the worker is usable. Only here: every change wakes those who wait."""
        before = (self._state, self._is_ready)
        self._state = self._state if state is None else state
        self._is_ready = self._is_ready if is_ready is None else is_ready
        if (self._state, self._is_ready) != before:
            with contained("noting the state of a worker's session"):
                self._on_state_changed(self)

    # --- called by `Attempts` ---------------------------------------------------------------------

    def subscribe(self, run_id: RunId, subscriber: Subscriber, num_tokens: int) -> None:
        """Listen to a run; its `num_tokens` to compute are load until the worker first answers."""
        self.subscriptions.add(run_id, subscriber, num_tokens)

    def measured(self, num_tokens: int, seconds: float) -> None:
        """Learn the worker's speed from a prompt of which it computed `num_tokens`."""
        self._load.measured(num_tokens, seconds, self._clock.now_s())

    def handed_over(self, receiver: WorkerDescriptor, exposed_s: float) -> None:
        """Learn how late the worker's KV came to a receiver, behind the first token."""
        self._load.handed_over(receiver.worker_id, exposed_s, self._clock.now_s())

    def forget(self, run_id: RunId, epoch: Epoch) -> None:
        """Stop listening to a run and cancel it on the worker. Never waits."""
        if self.subscriptions.remove(run_id) and self._state is not SessionState.LOST:
            self._outbox.push(Cancel(run_id, epoch))

    def send(self, message: Submit | Credit | OfferPrefix) -> None:
        """Queue a command.

        Raises:
            WorkerLost: The worker is gone, or does not read.
        """
        if self._state is SessionState.LOST or self._outbox.is_full:
            raise WorkerLost(f"worker {self.descriptor.worker_id} is {self._state.name.lower()}")
        self._outbox.push(message)

    # --- connection -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and stay connected until the worker is lost; then end every attempt on it."""
        error = WorkerLost(f"the session with worker {self.descriptor.worker_id} failed")
        try:
            error = await self._stay_connected()
            if self._state is not SessionState.LOST and not self._leaves_in_order:
                requests = len(self.subscriptions)
                self._log(events.WORKER_LOST, reason=error.message, requests=requests)
        finally:
            # LOST comes first: an attempt that ends here may be placed again before this returns.
            self._set_state(state=SessionState.LOST)
            self._outbox.clear()
            self.subscriptions.lose(error)

    @property
    def _leaves_in_order(self) -> bool:
        """True if the worker drains and holds no request of ours: its end harms nobody."""
        return self._is_leaving and not self.subscriptions

    async def _stay_connected(self) -> WorkerLost:
        """Return why the worker was given up."""
        name = self.descriptor.worker_id
        give_up_at = self._clock.now_s() + DIAL_TIMEOUT_S
        num_refused = 0
        was_live = False
        while True:
            try:
                stream = await self._connect()
            except (StreamClosed, TimeoutError) as failure:
                # A cut wire times out; a port that refuses twice has no process behind it any more.
                num_refused += isinstance(failure, StreamClosed)
                if num_refused >= MAX_REFUSED:
                    # What was never reached cannot have died of a request.
                    kind = WorkerDied if was_live else WorkerLost
                    return kind(f"worker {name} died")
                if self._clock.now_s() + RETRY_S >= give_up_at:
                    return WorkerLost(f"worker {name} was cut off")
                await asyncio.sleep(RETRY_S)
                continue
            num_refused = 0
            was_live = True
            self._log(events.WORKER_LINK_BACK if self._has_lived else events.WORKER_JOINED)
            self._has_lived = True
            self._set_state(state=SessionState.LIVE)
            if (hung := await self._serve(stream)) is not None:
                return hung
            if not self._leaves_in_order:
                self._log(events.WORKER_LINK_LOST, reason=self._close_reason)
            self._set_state(state=SessionState.RECONNECTING)
            self.num_reconnects += 1
            give_up_at = self._clock.now_s() + RECONNECT_S

    async def _connect(self) -> MessageStream:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            # Even a dial that fails takes a number: a later one must be the newest at the worker.
            number = next(self._stream_numbers)
            stream = NumberedStream(await self._network.dial(self.descriptor.session_address))
            try:
                wanted = self.subscriptions.wanted(self._outbox.queued_runs)
                await stream.send(Hello(self._router_id, wanted, number))
                welcome = await stream.recv()
            except BaseException:  # also when cancelled: nobody else would end this stream
                stream.reset()
                raise
        if (
            not isinstance(welcome, Welcome)
            or welcome.descriptor.incarnation != self.descriptor.incarnation
        ):
            stream.reset()
            raise StreamClosed("another worker lives at this address now")
        self.routes.reconnected()
        return stream

    async def _serve(self, stream: MessageStream) -> WorkerLost | None:
        """Use one stream until it is lost.

        Returns:
            The error, if the worker hung rather than the stream broke.
        """
        self._liveness.connected()
        hung: WorkerLost | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(stream))
                tasks.create_task(self._outbox.write(stream))
                tasks.create_task(self._liveness.watch())
        except* StreamClosed as group:
            self._close_reason = str(group.exceptions[0])
        except* WorkerLost as group:
            hung = WorkerLost(str(group.exceptions[0]))
            # Two tasks may find out at once. A death weighs more: it counts against what ran.
            if any(isinstance(e, WorkerDied) for e in group.exceptions):
                hung = WorkerDied(str(hung))
        finally:
            stream.reset()
        return hung

    async def _read(self, stream: MessageStream) -> None:
        while True:
            message = await stream.recv()
            self._liveness.note_message()
            match message:
                case StepFrame():
                    self.subscriptions.deliver(message)
                case Progress():
                    self._note_progress(message)
                case PeerReport(routes):
                    self.routes.note(routes)
                case _:
                    pass  # a message of a newer version

    def _note_progress(self, message: Progress) -> None:
        """Note what the worker reports of itself.

        Raises:
            WorkerDied: It has work, and no step has advanced for 3 s.
        """
        self.rank_pids = message.rank_pids or self.rank_pids
        self._load.report(message.load, self._clock.now_s())
        self._storage = message.storage
        if message.is_leaving:
            if not self._is_leaving:
                self._log(events.WORKER_LEAVING)
        elif message.is_ready != self._is_ready:
            self._log(events.WORKER_RESUMED if message.is_ready else events.WORKER_PAUSED)
        self._is_leaving = message.is_leaving
        self._set_state(is_ready=message.is_ready)
        # Last, for it may raise: what else the worker reports holds all the same.
        self._liveness.note_progress(message)
