"""The router's end of its sessions, one link per live worker.

Owns connecting, the reconnect within 2 s, the beat, the hung-worker watch, the routing of frames to
attempts, and making workers known to one another before a request needs both. Does not know requests'
stories. Called by the orchestrator (subscribe, send) and by membership changes (`follow`).

    DIALLING ─Welcome─▶ LIVE ─stream lost─▶ RECONNECTING ─Welcome─▶ LIVE
                          │ hung 3 s            │ 2 s                  (what was unsent comes again)
                          └────────▶ LOST ◀─────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from core.errors import WorkerDied, WorkerLost
from core.ids import RequestId, RouterId, WorkerId
from core.numbered import NumberedStream
from core.ports import Clock, Membership, MessageStream, Network, StreamClosed
from core.session import (
    AttemptEnded,
    Cancel,
    Credit,
    Hello,
    Load,
    Meet,
    Met,
    Progress,
    Role,
    RouterBeat,
    StepFrame,
    Submit,
    TokenDelta,
    ToWorker,
    Wanted,
    WayReport,
    Welcome,
    WorkerDescriptor,
)
from router.placement import Candidate

BEAT_S = 0.5
RECONNECT_S = 2.0
HUNG_S = 3.0
DIAL_TIMEOUT_S = 2.0
RETRY_S = 0.1
MAX_REFUSED = 2
REDIAL_S = 1.0
MAX_OUTGOING = 4096
MEASURE_S = 15.0


class LinkState(Enum):
    """Where a link stands."""

    DIALLING = auto()
    LIVE = auto()
    RECONNECTING = auto()
    LOST = auto()


class Subscriber(Protocol):
    """An attempt that listens to a worker."""

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


class WorkerLink:
    """One worker, as this router sees it."""

    def __init__(
        self, descriptor: WorkerDescriptor, network: Network, router_id: RouterId, clock: Clock
    ) -> None:
        """Nothing is dialled yet; `run` does."""
        self.descriptor = descriptor
        self.state = LinkState.DIALLING
        self.load = Load()
        self.rank_pids = descriptor.rank_pids
        self.is_ready = True
        self.pending: dict[RequestId, int] = {}
        self.ways: dict[str, WayReport] = {}
        """How KV comes to this worker, by the address of who sends it."""
        self._introduced: set[str] = set()
        self._measured: dict[str, asyncio.Future[WayReport]] = {}
        self.num_reconnects = 0
        self.num_stale = 0
        self.on_state: Callable[[], None] = lambda: None
        self._network, self._router_id, self._clock = network, router_id, clock
        self._subscribers: dict[RequestId, Subscriber] = {}
        self._outgoing: list[ToWorker] = []
        self._wake = asyncio.Event()
        self._counters = (0, 0)
        self._moved_at = 0.0
        self._heard_at = 0.0

    # --- asked by the orchestrator --------------------------------------------------------------------

    def subscribe(self, request_id: RequestId, subscriber: Subscriber, num_tokens: int) -> None:
        """Hear of a request; `num_tokens` count as this worker's load until `forget`."""
        self._subscribers[request_id] = subscriber
        self.pending[request_id] = num_tokens

    def forget(self, request_id: RequestId, epoch: int) -> None:
        """Stop hearing of a request and let the worker forget it too. Never waits."""
        if self._subscribers.pop(request_id, None) is None:
            return
        self.pending.pop(request_id, None)
        if self.state is not LinkState.LOST:
            self._push(Cancel(request_id, epoch))  # type: ignore[arg-type]

    def send(self, message: Submit | Credit) -> None:
        """Queue a command.

        Raises:
            WorkerLost: The worker is gone, or does not read.
        """
        if self.state is LinkState.LOST or len(self._outgoing) >= MAX_OUTGOING:
            raise WorkerLost(f"worker {self.descriptor.worker_id} is {self.state.name.lower()}")
        self._push(message)

    def introduce(self, addresses: list[str]) -> None:
        """Let the worker open the ways to peers it has not heard of, and forget those that are gone."""
        fresh = [address for address in addresses if address not in self._introduced]
        self._introduced = set(addresses)
        self.ways = {
            address: way for address, way in self.ways.items() if address in self._introduced
        }
        if fresh:
            self._push(Meet(tuple(fresh)))

    async def measure(self, address: str, probe_bytes: int) -> WayReport:
        """Let the worker measure the way from a peer; one at a time.

        Raises:
            TimeoutError: It did not answer.
        """
        found: asyncio.Future[WayReport] = asyncio.get_running_loop().create_future()
        self._measured[address] = found
        self._push(Meet((address,), probe_bytes))
        try:
            async with asyncio.timeout(MEASURE_S):
                return await found
        finally:
            del self._measured[address]

    def _note_ways(self, ways: tuple[WayReport, ...]) -> None:
        for way in ways:
            if way.gb_per_s or way.error or way.address not in self.ways:
                self.ways[way.address] = (
                    way  # what was only opened again says less than what was measured
                )
            found = self._measured.get(way.address)
            if found is not None and not found.done() and (way.gb_per_s or way.error):
                found.set_result(way)

    def _push(self, message: ToWorker) -> None:
        self._outgoing.append(message)
        self._wake.set()

    @property
    def num_subscribers(self) -> int:
        """Requests that listen; zero at rest."""
        return len(self._subscribers)

    # --- life -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, and stay connected until the worker is lost."""
        name = self.descriptor.worker_id
        give_up_at = self._clock.now_s() + DIAL_TIMEOUT_S
        num_refused = 0
        error: WorkerLost = WorkerLost(f"worker {name} was cut off")
        while True:
            try:
                stream = await self._connect()
            except (StreamClosed, TimeoutError) as failure:
                # A cut wire times out; a port that refuses twice has no process behind it any more.
                num_refused += isinstance(failure, StreamClosed)
                if num_refused >= MAX_REFUSED:
                    error = WorkerDied(f"worker {name} died")
                    break
                if self._clock.now_s() + RETRY_S >= give_up_at:
                    break
                await asyncio.sleep(RETRY_S)
                continue
            num_refused = 0
            self._enter(LinkState.LIVE)
            hung = await self._serve(stream)
            if hung is not None:
                error = hung
                break
            self._enter(LinkState.RECONNECTING)
            self.num_reconnects += 1
            give_up_at = self._clock.now_s() + RECONNECT_S
        self._lose(error)

    def _enter(self, state: LinkState) -> None:
        self.state = state
        self.on_state()

    def _lose(self, error: WorkerLost) -> None:
        self._enter(LinkState.LOST)
        subscribers, self._subscribers = self._subscribers, {}
        self.pending.clear()
        self._outgoing.clear()
        for subscriber in subscribers.values():
            subscriber.on_lost(self.descriptor.worker_id, error)

    async def _connect(self) -> MessageStream:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            stream = NumberedStream(await self._network.dial(self.descriptor.session_address))
            # Submits that were queued but never sent stay in `_outgoing`; the rest is asked for again.
            unsent = {m.request.request_id for m in self._outgoing if isinstance(m, Submit)}
            wanted = tuple(s.wanted() for r, s in self._subscribers.items() if r not in unsent)
            await stream.send(Hello(self._router_id, wanted))
            welcome = await stream.recv()
        if (
            not isinstance(welcome, Welcome)
            or welcome.descriptor.incarnation != self.descriptor.incarnation
        ):
            stream.reset()
            raise StreamClosed("another worker lives at this address now")
        return stream

    async def _serve(self, stream: MessageStream) -> WorkerLost | None:
        """Carry one stream until it is lost.

        Returns:
            What the worker died of, if it hung rather than the stream broke.
        """
        self._moved_at = self._heard_at = self._clock.now_s()
        hung: WorkerLost | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(stream))
                tasks.create_task(self._write(stream))
                tasks.create_task(self._watch())
        except* StreamClosed:
            pass
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
            self._heard_at = self._clock.now_s()
            match message:
                case StepFrame():
                    self._dispatch(message)
                case Progress():
                    self._note_progress(message)
                case Met(ways):
                    self._note_ways(ways)
                case _:
                    pass  # a message of a newer version

    def _dispatch(self, frame: StepFrame) -> None:
        worker_id = self.descriptor.worker_id
        for delta in frame.deltas:
            subscriber = self._subscribers.get(delta.request_id)
            if subscriber is None or subscriber.wanted().epoch != delta.epoch:
                self.num_stale += 1
            else:
                subscriber.on_delta(worker_id, delta)
        for ended in frame.ended:
            subscriber = self._subscribers.get(ended.request_id)
            if subscriber is None or subscriber.wanted().epoch != ended.epoch:
                self.num_stale += 1
            else:
                subscriber.on_ended(worker_id, ended)

    def _note_progress(self, message: Progress) -> None:
        counters = (message.steps, message.layers_done)
        if counters != self._counters or not message.work_in_hand:
            self._counters, self._moved_at = counters, self._clock.now_s()
        self.load, self.is_ready = message.load, message.is_ready
        self.rank_pids = message.rank_pids or self.rank_pids

    async def _write(self, stream: MessageStream) -> None:
        while True:
            while self._outgoing:
                await stream.send(self._outgoing[0])
                self._outgoing.pop(0)
            self._wake.clear()
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                self._outgoing.append(RouterBeat())

    async def _watch(self) -> None:
        """Raise when the worker has work in hand and nothing moves, or says nothing at all.

        Only time in which this process was awake counts: one that was stopped or starved itself has
        not listened, and must not take every worker for dead when it wakes.
        """
        while True:
            asleep_from = self._clock.now_s()
            await asyncio.sleep(BEAT_S)
            now_s = self._clock.now_s()
            overslept_s = now_s - asleep_from - BEAT_S
            if overslept_s > BEAT_S:
                self._heard_at += overslept_s
                self._moved_at += overslept_s
            if now_s - self._heard_at > HUNG_S:
                raise WorkerLost(f"worker {self.descriptor.worker_id} was silent for {HUNG_S:g} s")
            if now_s - self._moved_at > HUNG_S:
                raise WorkerDied(f"worker {self.descriptor.worker_id} is stuck in a step")


class Links:
    """Follows membership: a link per member, dropped when the member or the link is gone."""

    def __init__(
        self, membership: Membership, network: Network, router_id: RouterId, clock: Clock
    ) -> None:
        """Keep the collaborators; `follow` starts."""
        self._membership, self._network, self._router_id, self._clock = (
            membership,
            network,
            router_id,
            clock,
        )
        self._links: dict[tuple[WorkerId, int], WorkerLink] = {}
        self._tasks: dict[tuple[WorkerId, int], asyncio.Task[None]] = {}
        self.changed = asyncio.Event()
        self.on_change: Callable[[], None] = lambda: None

    def follow(self) -> None:
        """Begin to watch the members."""
        self._membership.watch(self._sync)
        self._sync()

    def _sync(self) -> None:
        for key, descriptor in self._members().items():
            if key not in self._tasks:
                self._links[key] = self._new_link(descriptor)
                self._tasks[key] = asyncio.get_running_loop().create_task(
                    self._run(key, descriptor)
                )
        self._note_change()

    def _new_link(self, descriptor: WorkerDescriptor) -> WorkerLink:
        link = WorkerLink(descriptor, self._network, self._router_id, self._clock)
        link.on_state = self._note_change
        return link

    def _members(self) -> dict[tuple[WorkerId, int], WorkerDescriptor]:
        return {(m.worker_id, m.incarnation): m for m in self._membership.members()}

    async def _run(self, key: tuple[WorkerId, int], descriptor: WorkerDescriptor) -> None:
        """Keep a link while the worker is a member; a lost one is dialled again after a pause."""
        try:
            while True:
                await self._links[key].run()
                if key not in self._members():
                    return
                await asyncio.sleep(REDIAL_S)
                self._links[key] = self._new_link(descriptor)
        finally:
            self._tasks.pop(key, None)
            self._links.pop(key, None)
            self._note_change()

    def _note_change(self) -> None:
        self._introduce()
        self.changed.set()
        self.changed = asyncio.Event()
        self.on_change()

    def _introduce(self) -> None:
        """No request is the first to meet a pair: connections, mappings and groups are made when a worker joins."""
        live = [link for link in self._links.values() if link.state is LinkState.LIVE]
        senders = [
            link.descriptor.transfer_address
            for link in live
            if link.descriptor.role is Role.PREFILL
        ]
        for link in live:
            if link.descriptor.role is Role.DECODE:
                link.introduce(senders)

    async def measure(
        self, probe_bytes: int
    ) -> list[tuple[WorkerDescriptor, WorkerDescriptor, WayReport]]:
        """Measure every way from a live prefill worker to a live decode worker, one after the other.

        Args:
            probe_bytes: Moved over each.

        Returns:
            Sender, receiver and what was found.
        """
        found = []
        live = [link for link in self._links.values() if link.state is LinkState.LIVE]
        senders = [link.descriptor for link in live if link.descriptor.role is Role.PREFILL]
        for link in live:
            if link.descriptor.role is not Role.DECODE:
                continue
            for sender in senders:
                try:
                    way = await link.measure(sender.transfer_address, probe_bytes)
                except TimeoutError:
                    way = WayReport(
                        sender.transfer_address, error=f"no answer within {MEASURE_S:g} s"
                    )
                found.append((sender, link.descriptor, way))
        return found

    def get(self, descriptor: WorkerDescriptor) -> WorkerLink:
        """Find the link of a placed worker.

        Raises:
            WorkerLost: It is gone.
        """
        link = self._links.get((descriptor.worker_id, descriptor.incarnation))
        if link is None or link.state is LinkState.LOST:
            raise WorkerLost(f"worker {descriptor.worker_id} is gone")
        return link

    def all(self) -> list[WorkerLink]:
        """Every link, lost ones included."""
        return list(self._links.values())

    def candidates(self) -> list[Candidate]:
        """Live workers that can take requests, for placement."""
        return [
            Candidate(link.descriptor, link.load, sum(link.pending.values()), len(link.pending))
            for link in self._links.values()
            if link.state in (LinkState.DIALLING, LinkState.LIVE) and link.is_ready
        ]

    def is_starting(self) -> bool:
        """True while a worker is expected: one that starts, reconnects or restarts its ranks."""
        is_back_soon = any(
            x.state is LinkState.RECONNECTING or not x.is_ready for x in self._links.values()
        )
        return is_back_soon or self._membership.is_starting()

    async def close(self) -> None:
        """End every link."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
