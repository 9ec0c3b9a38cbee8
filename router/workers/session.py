"""The router's end of its session with one worker.

Owns connecting, the reconnect within 2 s, the beat, the watch over a hung or silent worker, and the
routing of frames to attempts. A fault in what an attempt is told ends that attempt; a fault of the
link itself ends the link, and whoever listened hears it. Does not know requests' stories, other
workers or who places requests.

    DIALLING ─Welcome─▶ LIVE ─stream lost─▶ RECONNECTING ─Welcome─▶ LIVE
                          │ hung 3 s            │ 2 s                  (what was unsent comes again)
                          └────────▶ LOST ◀─────┘
                                      └─ dialled anew each second while it is a member ─▶ LIVE
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum, auto
from typing import Protocol

from core import events
from core.awake import AwakeClock
from core.containment import contained
from core.errors import ServingError, WorkerDied, WorkerLost
from core.ids import Epoch, RequestId, RouterId, WorkerId, WorkerLife
from core.ports import Clock, MessageStream, Network, StreamClosed
from core.session import (
    AttemptEnded,
    Cancel,
    ConnectPeers,
    Credit,
    Hello,
    Load,
    PeerReport,
    Progress,
    RouteReport,
    RouterHeartbeat,
    StepFrame,
    Submit,
    TokenDelta,
    ToWorker,
    Wanted,
    Welcome,
    WorkerDescriptor,
)
from router.placement import Candidate
from transport.sequenced import NumberedStream

HEARTBEAT_S = 0.5
RECONNECT_S = 2.0
HUNG_S = 3.0
DIAL_TIMEOUT_S = 2.0
RETRY_S = 0.1
MAX_REFUSED = 2
MAX_OUTGOING = 4096
MEASURE_S = 15.0


class SessionState(Enum):
    """Where a link stands."""

    DIALLING = auto()
    LIVE = auto()
    RECONNECTING = auto()
    LOST = auto()


class Subscriber(Protocol):
    """An attempt that listens to a worker."""

    @property
    def epoch(self) -> Epoch:
        """The attempt's number; news of others are not for it."""
        ...

    def wanted(self) -> Wanted:
        """What is still missing, for a reconnect."""
        ...

    def on_delta(self, worker_id: WorkerId, delta: TokenDelta) -> None:
        """New tokens."""
        ...

    def on_ended(self, worker_id: WorkerId, ended: AttemptEnded) -> None:
        """The worker's part is over."""
        ...

    def on_lost(self, worker_id: WorkerId, error: WorkerLost) -> None:
        """The worker is gone."""
        ...

    def fail(self, error: ServingError) -> None:
        """One of these three failed: end the attempt, once."""
        ...


class WorkerSession:
    """One worker, as this router sees it."""

    def __init__(
        self,
        descriptor: WorkerDescriptor,
        network: Network,
        router_id: RouterId,
        clock: Clock,
        stream_numbers: Iterator[int],
        *,
        was_lost: bool = False,
    ) -> None:
        """Nothing is dialled yet; `run` does.

        Args:
            descriptor: The worker.
            network: Carries the session.
            router_id: Who the worker hears from.
            clock: Of this process.
            stream_numbers: Rise over all streams of this router, so that the worker can tell the
                newest.
            was_lost: Such a worker has to answer before it is placed upon again.
        """
        self.descriptor = descriptor
        self.rank_pids = descriptor.rank_pids
        self.routes: dict[str, RouteReport] = {}
        """How KV comes to this worker, by the address of who sends it."""
        self.num_reconnects = 0
        self.num_stale = 0
        self.on_standing: Callable[[WorkerSession], None] = lambda session: None
        """Told after each change of `state` or `is_ready`."""
        self._network, self._router_id, self._clock = network, router_id, clock
        self._stream_numbers = stream_numbers
        self._awake = AwakeClock(clock)
        self._state = SessionState.LOST if was_lost else SessionState.DIALLING
        self._is_ready = True
        self._load = Load()
        self._candidate: Candidate | None = None
        self._subscribers: dict[RequestId, Subscriber] = {}
        self._unanswered: dict[RequestId, int] = {}
        self._num_unanswered_tokens = 0
        self._outgoing: deque[ToWorker] = deque()
        self._introduced: dict[str, None] = {}
        self._unmet: dict[str, None] = {}
        self._measured: dict[str, asyncio.Future[RouteReport]] = {}
        self._wake = asyncio.Event()
        self._counters: tuple[int, int] | None = None
        self._has_lived = was_lost
        self._parting = ""
        self._is_leaving = False
        self._moved_at = self._heard_at = 0.0

    @property
    def key(self) -> WorkerLife:
        """One life of one worker."""
        return self.descriptor.worker_id, self.descriptor.incarnation

    # --- what placement reads ---------------------------------------------------------------------

    @property
    def state(self) -> SessionState:
        """Where the link stands."""
        return self._state

    @property
    def is_ready(self) -> bool:
        """False while the worker drains or restarts its ranks."""
        return self._is_ready

    @property
    def load(self) -> Load:
        """As the worker said last."""
        return self._load

    @property
    def is_usable(self) -> bool:
        """True if requests may be placed here."""
        return self._is_ready and self._state in (SessionState.DIALLING, SessionState.LIVE)

    @property
    def is_back_soon(self) -> bool:
        """True if it is not usable now but is likely to be soon, or when its ranks are up."""
        is_connected = self._state in (SessionState.DIALLING, SessionState.LIVE)
        return self._state is SessionState.RECONNECTING or (is_connected and not self._is_ready)

    @property
    def candidate(self) -> Candidate:
        """The worker as placement compares it."""
        if self._candidate is None:
            self._candidate = Candidate(
                self.descriptor, self._load, self._num_unanswered_tokens, len(self._subscribers)
            )
        return self._candidate

    def _tell(self, event: events.Event, **fields: object) -> None:
        d = self.descriptor
        event.tell(
            worker_id=d.worker_id, role=d.role.value, worker_pid=d.pid, node=d.node, **fields
        )

    def tell_left(self) -> None:
        """Say that the worker is no member any more."""
        self._tell(events.WORKER_LEFT)

    def _stand(self, *, state: SessionState | None = None, is_ready: bool | None = None) -> None:
        """Change whether the worker can be placed upon: only here, so that nobody waits unwoken."""
        before = (self._state, self._is_ready)
        self._state = self._state if state is None else state
        self._is_ready = self._is_ready if is_ready is None else is_ready
        if (self._state, self._is_ready) != before:
            with contained("telling how a worker stands"):
                self.on_standing(self)

    # --- asked by the orchestrator ----------------------------------------------------------------

    def subscribe(self, request_id: RequestId, subscriber: Subscriber, num_tokens: int) -> None:
        """Hear of a request; `num_tokens` count as this worker's load until its first word."""
        self._subscribers[request_id] = subscriber
        self._unanswered[request_id] = num_tokens
        self._num_unanswered_tokens += num_tokens
        self._candidate = None

    def forget(self, request_id: RequestId, epoch: int) -> None:
        """Stop hearing of a request and let the worker forget it too. Never waits."""
        if self._subscribers.pop(request_id, None) is None:
            return
        self._answered(request_id)
        self._candidate = None
        if self._state is not SessionState.LOST:
            self._push(Cancel(request_id, epoch))  # type: ignore[arg-type]

    def send(self, message: Submit | Credit) -> None:
        """Queue a command.

        Raises:
            WorkerLost: The worker is gone, or does not read.
        """
        if self._state is SessionState.LOST or len(self._outgoing) >= MAX_OUTGOING:
            raise WorkerLost(f"worker {self.descriptor.worker_id} is {self._state.name.lower()}")
        self._push(message)

    def _push(self, message: ToWorker) -> None:
        self._outgoing.append(message)
        self._wake.set()

    @property
    def num_subscribers(self) -> int:
        """Requests that listen; zero at rest."""
        return len(self._subscribers)

    # --- other workers ----------------------------------------------------------------------------

    def introduce(self, address: str) -> None:
        """Let the worker open the way to a peer that may send KV to it."""
        self._introduced[address] = self._unmet[address] = None
        self._wake.set()

    def forget_peer(self, address: str) -> None:
        """A peer is gone for good."""
        self._introduced.pop(address, None)
        self._unmet.pop(address, None)
        self.routes.pop(address, None)

    async def measure(self, address: str, probe_bytes: int) -> RouteReport:
        """Let the worker measure the way from a peer; one at a time.

        Raises:
            TimeoutError: It did not answer.
        """
        found: asyncio.Future[RouteReport] = asyncio.get_running_loop().create_future()
        self._measured[address] = found
        self._push(ConnectPeers((address,), probe_bytes))
        try:
            async with asyncio.timeout(MEASURE_S):
                return await found
        finally:
            del self._measured[address]

    def _note_routes(self, routes: tuple[RouteReport, ...]) -> None:
        for route in routes:
            has_news = bool(route.gb_per_s or route.error)
            # What was only opened again says less than what was measured.
            if route.address in self._introduced and (has_news or route.address not in self.routes):
                self.routes[route.address] = route
            found = self._measured.get(route.address)
            if found is not None and not found.done() and has_news:
                found.set_result(route)

    # --- life -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and stay connected until the worker is lost; listeners hear of any end."""
        error = WorkerLost(f"the session with worker {self.descriptor.worker_id} failed")
        try:
            error = await self._stay_connected()
            if self._state is not SessionState.LOST and not self._leaves_in_order:
                requests = len(self._subscribers)
                self._tell(events.WORKER_LOST, reason=error.message, requests=requests)
        finally:
            self._lose(error)

    @property
    def _leaves_in_order(self) -> bool:
        """It drains, and no request of ours was left on it: its end harms nobody."""
        return self._is_leaving and not self._subscribers

    async def _stay_connected(self) -> WorkerLost:
        """Return what the worker was lost to."""
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
            self._tell(events.WORKER_LINK_BACK if self._has_lived else events.WORKER_JOINED)
            self._has_lived = True
            self._stand(state=SessionState.LIVE)
            hung = await self._serve(stream)
            if hung is not None:
                return hung
            if not self._leaves_in_order:
                self._tell(events.WORKER_LINK_LOST, reason=self._parting)
            self._stand(state=SessionState.RECONNECTING)
            self.num_reconnects += 1
            give_up_at = self._clock.now_s() + RECONNECT_S

    def _lose(self, error: WorkerLost) -> None:
        self._stand(state=SessionState.LOST)
        subscribers, self._subscribers = self._subscribers, {}
        self._outgoing.clear()
        for subscriber in subscribers.values():
            with contained("telling a request that its worker is gone", subscriber.fail):
                subscriber.on_lost(self.descriptor.worker_id, error)

    async def _connect(self) -> MessageStream:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            number = next(self._stream_numbers)
            stream = NumberedStream(await self._network.dial(self.descriptor.session_address))
            try:
                await stream.send(Hello(self._router_id, self._wanted(), number))
                welcome = await stream.recv()
            except BaseException:
                stream.reset()
                raise
        if (
            not isinstance(welcome, Welcome)
            or welcome.descriptor.incarnation != self.descriptor.incarnation
        ):
            stream.reset()
            raise StreamClosed("another worker lives at this address now")
        # An introduction that was under way when a stream ended may be lost: what was answered was
        # heard.
        self._unmet = {address: None for address in self._introduced if address not in self.routes}
        return stream

    def _wanted(self) -> tuple[Wanted, ...]:
        """All that is listened for; a Submit still queued, perhaps half sent, comes (again)."""
        queued = {m.request.request_id for m in self._outgoing if isinstance(m, Submit)}
        wanted: list[Wanted] = []
        for request_id, subscriber in list(self._subscribers.items()):
            with contained("what a request still wants", subscriber.fail):
                wanted.append(replace(subscriber.wanted(), is_coming=request_id in queued))
        return tuple(wanted)

    async def _serve(self, stream: MessageStream) -> WorkerLost | None:
        """Carry one stream until it is lost.

        Returns:
            What the worker died of, if it hung rather than the stream broke.
        """
        self._awake.tick()
        self._heard_at = self._awake.now_s()
        hung: WorkerLost | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(stream))
                tasks.create_task(self._write(stream))
                tasks.create_task(self._watch())
        except* StreamClosed as group:
            self._parting = str(group.exceptions[0])
        except* WorkerLost as group:
            hung = WorkerLost(str(group.exceptions[0]))
            if any(isinstance(e, WorkerDied) for e in group.exceptions):
                hung = WorkerDied(str(hung))
        finally:
            stream.reset()
        return hung

    async def _read(self, stream: MessageStream) -> None:
        while True:
            message = await stream.recv()
            self._heard_at = self._awake.now_s()
            match message:
                case StepFrame():
                    self._dispatch(message)
                case Progress():
                    self._note_progress(message)
                case PeerReport(routes):
                    self._note_routes(routes)
                case _:
                    pass  # a message of a newer version

    def _dispatch(self, frame: StepFrame) -> None:
        """Tell each attempt what is its; what goes wrong there is its own end and nobody else's."""
        worker_id = self.descriptor.worker_id
        for delta in frame.deltas:
            listener = self._listener(delta)
            if listener is not None:
                with contained("the delivery of tokens", listener.fail):
                    listener.on_delta(worker_id, delta)
        for ended in frame.ended:
            listener = self._listener(ended)
            if listener is not None:
                with contained("the delivery of an attempt's end", listener.fail):
                    listener.on_ended(worker_id, ended)

    def _listener(self, news: TokenDelta | AttemptEnded) -> Subscriber | None:
        subscriber = self._subscribers.get(news.request_id)
        if subscriber is None or subscriber.epoch != news.epoch:
            self.num_stale += 1
            return None
        self._answered(news.request_id)
        return subscriber

    def _answered(self, request_id: RequestId) -> None:
        """The worker's first word: the prompt is computed and stands before nobody any more."""
        num_tokens = self._unanswered.pop(request_id, 0)
        if num_tokens:
            self._num_unanswered_tokens -= num_tokens
            self._candidate = None

    def _note_progress(self, message: Progress) -> None:
        """Take the worker's counters.

        Equal ones with work in hand mean that it stood still all the while, streams or not.

        Raises:
            WorkerDied: It has had work in hand, and none of them has moved, for 3 s.
        """
        counters = (message.steps, message.layers_done)
        if counters != self._counters or not message.work_in_hand:
            self._counters, self._moved_at = counters, self._heard_at
        self.rank_pids = message.rank_pids or self.rank_pids
        if message.load != self._load:
            self._load = message.load
            self._candidate = None
        if message.is_leaving:
            if not self._is_leaving:
                self._tell(events.WORKER_LEAVING)
        elif message.is_ready != self._is_ready:
            self._tell(events.WORKER_RESUMED if message.is_ready else events.WORKER_PAUSED)
        self._is_leaving = message.is_leaving
        self._stand(is_ready=message.is_ready)
        if self._heard_at - self._moved_at > HUNG_S:
            raise WorkerDied(f"worker {self.descriptor.worker_id} is stuck in a step")

    async def _write(self, stream: MessageStream) -> None:
        while True:
            while self._unmet or self._outgoing:
                if self._unmet:
                    addresses = tuple(self._unmet)
                    self._unmet.clear()
                    await stream.send(ConnectPeers(addresses))
                else:
                    await stream.send(self._outgoing[0])
                    self._outgoing.popleft()
            self._wake.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                self._outgoing.append(RouterHeartbeat())

    async def _watch(self) -> None:
        """Raise when the worker says nothing; only time in which this process listened counts."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._awake.tick()
            if self._awake.now_s() - self._heard_at > HUNG_S:
                raise WorkerLost(f"worker {self.descriptor.worker_id} was silent for {HUNG_S:g} s")
