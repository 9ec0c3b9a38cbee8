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
from core.session import Role, WayReport, WorkerDescriptor
from router.placement import Candidate
from router.workers.introductions import Introductions
from router.workers.session import MEASURE_S, LinkState, WorkerLink

REDIAL_S = 1.0
MAX_MISFITS = 1024


class Links:
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
        self._links: dict[WorkerLife, WorkerLink] = {}
        self._tasks: dict[WorkerLife, asyncio.Task[None]] = {}
        self._introductions = Introductions()
        self._changes = Changes()
        self.misfits: frozenset[tuple[Incarnation, Incarnation]] = frozenset()
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
                self._use(self._new_link(descriptor))
                self._tasks[key] = loop.create_task(self._keep(key, descriptor))
        self._changes.note()

    def _members(self) -> dict[WorkerLife, WorkerDescriptor]:
        return {(m.worker_id, m.incarnation): m for m in self._membership.members()}

    def _new_link(self, descriptor: WorkerDescriptor, *, was_lost: bool = False) -> WorkerLink:
        return WorkerLink(
            descriptor,
            self._network,
            self._router_id,
            self._clock,
            self._stream_numbers,
            was_lost=was_lost,
        )

    def _use(self, link: WorkerLink) -> None:
        link.on_standing = self._stands
        self._links[link.key] = link

    async def _keep(self, key: WorkerLife, descriptor: WorkerDescriptor) -> None:
        """Keep a link while the worker is a member; a lost one is dialled again after a pause."""
        try:
            while True:
                with contained(f"the link to worker {descriptor.worker_id}"):
                    await self._links[key].run()
                if key not in self._members():
                    self._links[key].tell_left()
                    return
                await asyncio.sleep(REDIAL_S)
                self._use(self._new_link(descriptor, was_lost=True))
        finally:
            self._tasks.pop(key, None)
            self._links.pop(key, None)
            self._note_misfits(pair for pair in self.misfits if key[1] not in pair)

    def _stands(self, link: WorkerLink) -> None:
        if link.state is LinkState.LIVE:
            self._introductions.joined(link)
        elif link.state is LinkState.LOST:
            self._introductions.left(link)
        self._changes.note()

    # --- what placement reads ---------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Live workers that can take requests, for placement."""
        return [link.candidate for link in self._links.values() if link.is_usable]

    def note_misfit(self, prefill: WorkerDescriptor, decode: WorkerDescriptor) -> None:
        """These two will never understand each other; other pairs go on."""
        pair = (prefill.incarnation, decode.incarnation)
        if len(self.misfits) < MAX_MISFITS:
            self._note_misfits((*self.misfits, pair))

    def _note_misfits(self, pairs: Iterable[tuple[Incarnation, Incarnation]]) -> None:
        self.misfits = frozenset(pairs)
        self._changes.note()

    def is_starting(self) -> bool:
        """True while a worker is expected: one that starts, reconnects or restarts its ranks."""
        return self._membership.is_starting() or any(x.is_back_soon for x in self._links.values())

    def has_lost(self) -> bool:
        """True while a member is out of reach; it is dialled again and may come back."""
        return any(link.state is LinkState.LOST for link in self._links.values())

    def get(self, descriptor: WorkerDescriptor) -> WorkerLink:
        """Find the link of a placed worker.

        Raises:
            WorkerLost: It is gone.
        """
        link = self._links.get((descriptor.worker_id, descriptor.incarnation))
        if link is None or link.state is LinkState.LOST:
            raise WorkerLost(f"worker {descriptor.worker_id} is gone")
        return link

    # --- for status pages -------------------------------------------------------------------------

    def all(self) -> list[WorkerLink]:
        """Every link, lost ones included."""
        return list(self._links.values())

    async def measure(
        self, probe_bytes: int
    ) -> list[tuple[WorkerDescriptor, WorkerDescriptor, WayReport]]:
        """Measure every way from a live prefill worker to a live decode worker, one by one.

        The caller sees to it that nobody else measures meanwhile.

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

    async def close(self) -> None:
        """End every link."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
