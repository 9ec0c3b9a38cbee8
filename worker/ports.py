"""What a worker asks of its role and of its ranks, and a role of its worker.

Owns the protocols. Does not know who fulfils them.
"""

from __future__ import annotations

from typing import Protocol

from core.errors import ServingError
from core.ids import TransferId
from core.plan import StepPlan
from core.ports import Runner
from core.session import ConnectPeers, RouteReport, Task, WorkerTiming
from engine.scheduling.events import HandoverEvent, SchedulerEvent
from engine.scheduling.sequence import Sequence
from kv_transfer.agent import TransferAgent
from kv_transfer.receiver import ReceiverCallbacks
from kv_transfer.sender import SenderCallbacks
from worker.attempt import Attempt


class WorkerRole(Protocol):
    """What a role adds: its side of a hand-over."""

    task: Task

    @property
    def agent(self) -> TransferAgent:
        """What moves the KV of its hand-overs, on a loop of its own."""
        ...

    @property
    def sender(self) -> SenderCallbacks | None:
        """Who takes reports of hand-overs that go out; None: none does."""
        ...

    @property
    def receiver(self) -> ReceiverCallbacks | None:
        """Who takes reports of hand-overs that come in; None: none does."""
        ...

    @property
    def num_live(self) -> int:
        """Transfers with any state left; zero at rest."""
        ...

    def has_transfer(self, transfer_id: TransferId) -> bool:
        """Return True while anything is left of a hand-over."""
        ...

    def begin(self, attempt: Attempt) -> None:
        """Begin an attempt that names a transfer."""
        ...

    def end(self, attempt: Attempt, error: ServingError | None) -> None:
        """The attempt is over: close its transfer and give its blocks back, now or when drained."""
        ...

    def layer_done(self, plan: StepPlan, layer: int) -> None:
        """A layer of the running step is complete."""
        ...

    def take(self, event: HandoverEvent) -> None:
        """Act on a hand-over's event."""
        ...

    def prompt_computed(self, sequence: Sequence) -> None:
        """All KV and the first tokens are there."""
        ...

    def renew(self, attempts: list[Attempt]) -> None:
        """The owning router is alive."""
        ...

    def connect_peers(self, message: ConnectPeers) -> None:
        """Connect to peers that may send KV here; `AttemptTable.route_found` takes each result."""
        ...


class WorkerAttempts(Protocol):
    """What a role asks of the worker that it belongs to."""

    def wake(self) -> None:
        """Something changed that may allow a step."""
        ...

    def end(self, attempt: Attempt, error: ServingError | None) -> None:
        """End an attempt, once."""
        ...

    def deliver(self, events: list[SchedulerEvent]) -> None:
        """Take the scheduler's events."""
        ...

    def enter(self, attempt: Attempt) -> None:
        """Queue an attempt's sequences; a prefix that a peer is to send is fetched before.

        Whatever becomes of the fetch, `queue` follows.
        """
        ...

    def queue(self, attempt: Attempt) -> None:
        """Queue an attempt's sequences; what storage tiers hold of a prompt is loaded before.

        A sequence whose blocks fail to come, or come late, is queued all the same.
        """
        ...

    def phase_timings(self, attempt: Attempt, sequence: Sequence) -> WorkerTiming:
        """What a sequence of an attempt has cost so far."""
        ...

    def route_found(self, route: RouteReport) -> None:
        """A peer was probed."""
        ...

    def fail_transfer(self, transfer_id: TransferId, error: ServingError) -> None:
        """End the attempt that a transfer belongs to: a step of it broke here."""
        ...


class RestartableRunner(Runner, Protocol):
    """A runner whose rank group can be replaced after its death."""

    @property
    def layers_done(self) -> int:
        """Layers finished so far, also in the middle of a step; a restart does not set it back."""
        ...

    async def lost(self) -> None:
        """Return when the group has died between two steps; death in a step ends `execute`."""
        ...

    async def restart(self) -> None:
        """Start a fresh rank group; its KV pool is empty."""
        ...

    def rank_pids(self) -> tuple[int, ...]:
        """Process ids of the ranks."""
        ...
