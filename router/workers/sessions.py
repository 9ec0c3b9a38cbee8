"""The router's sessions: one for each member, and the snapshot of them that placement reads.

Owns following the membership, redialling a lost worker while it is a member, waking those who wait
for the snapshot to change, and introducing workers to one another before a request needs both. Does
not know streams or requests.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

from core.change_event import ChangeEvent
from core.containment import contained
from core.errors import WorkerLost
from core.ids import Incarnation, RouterId, WorkerLife
from core.ports import Clock, Membership, Network
from core.session import Role, RouteReport, WorkerDescriptor
from router.candidate import Candidate
from router.workers.introductions import Introductions
from router.workers.routes import MEASURE_S
from router.workers.session import WorkerSession
from router.workers.view import SessionState, WorkerView

REDIAL_S = 1.0
MAX_INCOMPATIBLE_PAIRS = 1024


class WorkerSessions:
    """Follows membership: a session per member, dropped when the member is gone."""

    def __init__(
        self, membership: Membership, network: Network, router_id: RouterId, clock: Clock
    ) -> None:
        """Prepare; `follow` starts."""
        self._membership = membership
        self._network = network
        self.router_id = router_id
        self._clock = clock
        # Of the router, not of a session: a redialled worker compares them over sessions.
        self._stream_numbers = itertools.count()
        self._sessions: dict[WorkerLife, WorkerSession] = {}
        self._tasks: dict[WorkerLife, asyncio.Task[None]] = {}
        self._introductions = Introductions()
        self._changes = ChangeEvent()
        self.incompatible_pairs: frozenset[tuple[Incarnation, Incarnation]] = frozenset()
        """(prefill, decode) pairs of members whose KV layouts differ."""

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of `candidates`, `is_starting` or `has_lost`.

        Take it before you read these, and wait for it after: no change is missed in between.
        """
        return self._changes.next

    def follow(self) -> None:
        """Start a session with every member, now and later."""
        self._membership.watch(self._sync)
        self._sync()

    def _sync(self) -> None:
        loop = asyncio.get_running_loop()
        for key, descriptor in self._members().items():
            if key not in self._tasks:
                self._sessions[key] = self._new_session(descriptor)
                self._tasks[key] = loop.create_task(self._keep(key, descriptor))
        self._changes.note()

    def _members(self) -> dict[WorkerLife, WorkerDescriptor]:
        return {(m.worker_id, m.incarnation): m for m in self._membership.members()}

    def _new_session(
        self, descriptor: WorkerDescriptor, *, was_lost: bool = False
    ) -> WorkerSession:
        return WorkerSession(
            descriptor,
            self._network,
            self.router_id,
            self._clock,
            self._stream_numbers,
            self._note_state,
            was_lost=was_lost,
        )

    async def _keep(self, key: WorkerLife, descriptor: WorkerDescriptor) -> None:
        """Keep a session while the worker is a member; redial a lost one after a pause."""
        try:
            while True:
                with contained(f"the session with worker {descriptor.worker_id}"):
                    await self._sessions[key].run()
                if key not in self._members():
                    self._sessions[key].log_left()
                    return
                # A fresh session: requests of the old one have been told that they lost their
                # worker.
                await asyncio.sleep(REDIAL_S)
                self._sessions[key] = self._new_session(descriptor, was_lost=True)
        finally:
            self._tasks.pop(key, None)
            self._sessions.pop(key, None)
            # A worker that comes back has another incarnation, perhaps with another layout.
            self._note_incompatible(pair for pair in self.incompatible_pairs if key[1] not in pair)

    def _note_state(self, session: WorkerSession) -> None:
        if session.state is SessionState.LIVE:
            self._introductions.joined(session.descriptor, session.routes)
        elif session.state is SessionState.LOST:
            self._introductions.left(session.descriptor)
        self._changes.note()

    # --- what placement reads ---------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Workers that can take requests, for placement."""
        return [session.candidate for session in self._sessions.values() if session.is_usable]

    def live_roles(self) -> set[Role]:
        """Roles of which a worker can take requests."""
        return {candidate.descriptor.role for candidate in self.candidates()}

    def note_incompatible(self, prefill: WorkerDescriptor, decode: WorkerDescriptor) -> None:
        """Remember that the KV layouts of these two differ; other pairs are unaffected."""
        pair = (prefill.incarnation, decode.incarnation)
        if len(self.incompatible_pairs) < MAX_INCOMPATIBLE_PAIRS:
            self._note_incompatible((*self.incompatible_pairs, pair))

    def _note_incompatible(self, pairs: Iterable[tuple[Incarnation, Incarnation]]) -> None:
        self.incompatible_pairs = frozenset(pairs)
        self._changes.note()

    def is_starting(self) -> bool:
        """True while a worker starts, reconnects or restarts its ranks."""
        is_any_back_soon = any(session.is_back_soon for session in self._sessions.values())
        return self._membership.is_starting() or is_any_back_soon

    def has_lost(self) -> bool:
        """True while a member is out of reach; it is redialled and may come back."""
        return any(session.state is SessionState.LOST for session in self._sessions.values())

    def get(self, descriptor: WorkerDescriptor) -> WorkerSession:
        """Find the session of a placed worker.

        Raises:
            WorkerLost: It is gone.
        """
        session = self._sessions.get((descriptor.worker_id, descriptor.incarnation))
        if session is None or session.state is SessionState.LOST:
            raise WorkerLost(f"worker {descriptor.worker_id} is gone")
        return session

    # --- for status pages -------------------------------------------------------------------------

    def all(self) -> list[WorkerSession]:
        """Every session, lost ones included."""
        return list(self._sessions.values())

    def views(self) -> list[WorkerView]:
        """Every worker that this router knows, lost ones included."""
        return [session.view() for session in self._sessions.values()]

    async def measure(
        self, probe_bytes: int
    ) -> list[tuple[WorkerDescriptor, WorkerDescriptor, RouteReport]]:
        """Measure every route from a live prefill worker to a live decode worker, one by one.

        The caller ensures that no other measurement runs meanwhile.

        Args:
            probe_bytes: Moved over each route.

        Returns:
            Sender, receiver and the report.
        """
        live = [x for x in self._sessions.values() if x.state is SessionState.LIVE]
        senders = [x.descriptor for x in live if x.descriptor.role is Role.PREFILL]
        receivers = [x for x in live if x.descriptor.role is Role.DECODE]
        found = []
        for receiver in receivers:
            # One by one: two at a time would share the wire, and neither figure would be the
            # route's.
            for sender in senders:
                address = sender.transfer_address
                try:
                    route = await receiver.routes.measure(address, probe_bytes)
                except TimeoutError:
                    route = RouteReport(address, error=f"no answer within {MEASURE_S:g} s")
                found.append((sender, receiver.descriptor, route))
        return found

    async def close(self) -> None:
        """End every session."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
