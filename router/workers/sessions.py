"""The router's links: one for each live worker, and what all of them together offer.

Owns following the membership, dialling again while a lost worker is a member, the snapshot that
placement reads, waking those who wait for it to change, and making workers known to one another
before a request needs both. Does not know streams or requests.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

from core.changes import Changes
from core.containment import contained
from core.errors import WorkerLost
from core.ids import Incarnation, RouterId, WorkerLife
from core.ports import Clock, Membership, Network
from core.session import Role, RouteReport, WorkerDescriptor
from router.placement import Candidate
from router.workers.introductions import Introductions
from router.workers.session import MEASURE_S, SessionState, WorkerSession

REDIAL_S = 1.0
MAX_MISFITS = 1024


class WorkerSessions:
    """Follows membership: a link per member, dropped when the member is gone."""

    def __init__(
        self, membership: Membership, network: Network, router_id: RouterId, clock: Clock
    ) -> None:
        """Keep the collaborators; `follow` starts."""
        self._membership = membership
        self._network = network
        self._router_id = router_id
        self._clock = clock
        self._stream_numbers = itertools.count()
        self._sessions: dict[WorkerLife, WorkerSession] = {}
        self._tasks: dict[WorkerLife, asyncio.Task[None]] = {}
        self._introductions = Introductions()
        self._changes = Changes()
        self.incompatible_pairs: frozenset[tuple[Incarnation, Incarnation]] = frozenset()
        """(prefill, decode) pairs that found their layouts to differ; of members only."""

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of anything that says who can be placed upon, or is expected.

        Take it before `candidates` and `is_starting`, and wait for it after them.
        """
        return self._changes.next

    def follow(self) -> None:
        """Begin to watch the members."""
        self._membership.watch(self._sync)
        self._sync()

    def _sync(self) -> None:
        loop = asyncio.get_running_loop()
        for key, descriptor in self._members().items():
            if key not in self._tasks:
                self._use(self._new_session(descriptor))
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
            self._router_id,
            self._clock,
            self._stream_numbers,
            was_lost=was_lost,
        )

    def _use(self, session: WorkerSession) -> None:
        session.on_standing = self._stands
        self._sessions[session.key] = session

    async def _keep(self, key: WorkerLife, descriptor: WorkerDescriptor) -> None:
        """Keep a link while the worker is a member; a lost one is dialled again after a pause."""
        try:
            while True:
                with contained(f"the session with worker {descriptor.worker_id}"):
                    await self._sessions[key].run()
                if key not in self._members():
                    self._sessions[key].tell_left()
                    return
                await asyncio.sleep(REDIAL_S)
                self._use(self._new_session(descriptor, was_lost=True))
        finally:
            self._tasks.pop(key, None)
            self._sessions.pop(key, None)
            self._note_incompatible(pair for pair in self.incompatible_pairs if key[1] not in pair)

    def _stands(self, session: WorkerSession) -> None:
        if session.state is SessionState.LIVE:
            self._introductions.joined(session)
        elif session.state is SessionState.LOST:
            self._introductions.left(session)
        self._changes.note()

    # --- what placement reads ---------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Live workers that can take requests, for placement."""
        return [session.candidate for session in self._sessions.values() if session.is_usable]

    def note_incompatible(self, prefill: WorkerDescriptor, decode: WorkerDescriptor) -> None:
        """These two will never understand each other; other pairs go on."""
        pair = (prefill.incarnation, decode.incarnation)
        if len(self.incompatible_pairs) < MAX_MISFITS:
            self._note_incompatible((*self.incompatible_pairs, pair))

    def _note_incompatible(self, pairs: Iterable[tuple[Incarnation, Incarnation]]) -> None:
        self.incompatible_pairs = frozenset(pairs)
        self._changes.note()

    def is_starting(self) -> bool:
        """True while a worker is expected: one that starts, reconnects or restarts its ranks."""
        return self._membership.is_starting() or any(
            x.is_back_soon for x in self._sessions.values()
        )

    def has_lost(self) -> bool:
        """True while a member is out of reach; it is dialled again and may come back."""
        return any(session.state is SessionState.LOST for session in self._sessions.values())

    def get(self, descriptor: WorkerDescriptor) -> WorkerSession:
        """Find the link of a placed worker.

        Raises:
            WorkerLost: It is gone.
        """
        session = self._sessions.get((descriptor.worker_id, descriptor.incarnation))
        if session is None or session.state is SessionState.LOST:
            raise WorkerLost(f"worker {descriptor.worker_id} is gone")
        return session

    # --- for status pages -------------------------------------------------------------------------

    def all(self) -> list[WorkerSession]:
        """Every link, lost ones included."""
        return list(self._sessions.values())

    async def measure(
        self, probe_bytes: int
    ) -> list[tuple[WorkerDescriptor, WorkerDescriptor, RouteReport]]:
        """Measure every way from a live prefill worker to a live decode worker, one by one.

        The caller sees to it that nobody else measures meanwhile.

        Args:
            probe_bytes: Moved over each.

        Returns:
            Sender, receiver and what was found.
        """
        found = []
        live = [
            session for session in self._sessions.values() if session.state is SessionState.LIVE
        ]
        senders = [
            session.descriptor for session in live if session.descriptor.role is Role.PREFILL
        ]
        for session in live:
            if session.descriptor.role is not Role.DECODE:
                continue
            for sender in senders:
                try:
                    route = await session.measure(sender.transfer_address, probe_bytes)
                except TimeoutError:
                    route = RouteReport(
                        sender.transfer_address, error=f"no answer within {MEASURE_S:g} s"
                    )
                found.append((sender, session.descriptor, route))
        return found

    async def close(self) -> None:
        """End every link."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
