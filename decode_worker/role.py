"""Decode's side of a hand-over.

Owns, per transfer: the arriving sequence, its place in the queue for free blocks, and the pins on
blocks that the agent may be writing. Does not know frames or streams.

    begin (Fetch opened, nothing held) ─▶ Starting ─▶ reserved, all or none ─▶ arrived ─▶ attached
                                              └─ waits its turn for blocks, at most reserve_wait_s
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, replace

from core.containment import contained
from core.errors import (
    InvalidRequest,
    InvariantViolation,
    KVTransferError,
    PoolExhausted,
    ServingError,
)
from core.ids import TransferId
from core.plan import StepPlan
from core.session import ConnectPeers, Role, Task
from core.types import Logprob
from engine.scheduling.events import BlocksReserved, HandoverEvent
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, Status
from kv_transfer.receiver import Arrival, FetchOrder, ReceiverCallbacks
from kv_transfer.reserved_blocks import Reservation
from worker.attempt import Attempt
from worker.checking import check_first_tokens
from worker.components import TransferAgents, WorkerComponents
from worker.ports import WorkerAttempts
from worker.sequences import add_sequence


@dataclass(slots=True, eq=False)
class Incoming:
    """One transfer into this worker."""

    attempt: Attempt
    sequence: Sequence
    give_up: asyncio.TimerHandle | None = None
    pool_generation: int | None = None
    """Of the pool in which blocks are reserved; None: nothing is reserved yet."""


class DecodeRole:
    """The decode role of one worker."""

    pool = Role.DECODE
    task = Task.DECODE

    sender = None
    """Hand-overs come in here; none goes out."""

    def __init__(
        self,
        components: WorkerComponents,
        scheduler: Scheduler,
        attempts: WorkerAttempts,
        agents: TransferAgents,
    ) -> None:
        """Join a worker."""
        self._scheduler = scheduler
        self._attempts = attempts
        self._kv = components.kv
        self._layout = components.layout
        self._clock = components.clock
        self._post = agents.post
        self._vocabulary_size = components.vocabulary_size
        self._reserve_wait_s = components.transfer.reserve_wait_s
        self._worker_id = components.worker_id
        self._incarnation = components.incarnation
        self._incoming: dict[TransferId, Incoming] = {}
        self._reserving: dict[int, TransferId] = {}
        """Transfers in line for blocks, by the sequence's key."""
        self._closing: dict[TransferId, list[int]] = {}
        """Pins of ended transfers, until the agent writes no more."""
        self.agent = agents.receive

    @property
    def receiver(self) -> ReceiverCallbacks:
        """What the agent reports of hand-overs comes here."""
        return self

    @property
    def num_live(self) -> int:
        """Transfers with any state left; zero at rest."""
        return len(self._incoming) + len(self._closing)

    # --- called by the worker ---------------------------------------------------------------------

    def has_transfer(self, transfer_id: TransferId) -> bool:
        """Return True while anything is left of a hand-over."""
        return transfer_id in self._incoming or transfer_id in self._closing

    def begin(self, attempt: Attempt) -> None:
        """Open the Fetch; nothing is held until the prefill worker is ready."""
        submit = attempt.submit
        if self.has_transfer(submit.transfer_id):
            raise InvalidRequest("transfer_id", "names a transfer that is here already")
        sequence = add_sequence(self._scheduler, attempt, attempt.open_choices, self._clock.now_s())
        self._incoming[submit.transfer_id] = Incoming(attempt, sequence)
        order = FetchOrder(
            submit.transfer_id, submit.peer_address, self._worker_id, self._incarnation
        )
        self._post(self.agent.fetch, order)

    def end(self, attempt: Attempt, error: ServingError | None) -> None:
        """Stop the transfer; blocks the agent may be writing stay pinned until it has closed."""
        transfer_id = attempt.submit.transfer_id
        incoming = self._incoming.get(transfer_id)
        # An attempt that was refused for its transfer id must not end the transfer that has it.
        if incoming is None or incoming.attempt is not attempt:
            return
        del self._incoming[transfer_id]
        self._leave_line(incoming)
        # Pinned before the scheduler frees them: one copy may be under way into these blocks.
        self._closing[transfer_id] = self._scheduler.tables.pin(incoming.sequence)
        self._post(self.agent.end_fetch, transfer_id)

    def layer_done(self, plan: StepPlan, layer: int) -> None:
        """Nothing leaves a decode worker."""

    def take(self, event: HandoverEvent) -> None:
        """Act on an arrival's event."""
        if not isinstance(event, BlocksReserved):
            raise InvariantViolation("a decode worker computed a hand-over")
        self._reserved(event.sequence, event.num_have_blocks)

    def prompt_computed(self, sequence: Sequence) -> None:
        """Decode workers promise no KV to anyone."""
        raise InvariantViolation("a decode worker computed a hand-over")

    def renew(self, attempts: list[Attempt]) -> None:
        """Leases are the sender's."""

    def connect_peers(self, message: ConnectPeers) -> None:
        """KV comes from these peers."""
        for address in message.addresses:
            self._post(self.agent.probe_peer, address, message.probe_bytes)

    # --- called by the agent, on the worker's loop ------------------------------------------------

    def transfer_starting(self, transfer_id: TransferId, num_tokens: int) -> None:
        """Reserve now, or wait in line for blocks."""
        incoming = self._incoming.get(transfer_id)
        if incoming is None:
            return
        # The two workers have the prompt from one router; a difference means a bug or an attack,
        # and KV of another length must not be attached.
        mine = incoming.sequence.num_tokens
        if num_tokens != mine:
            error = KVTransferError(
                f"the prefill worker starts {num_tokens} tokens, the request has {mine}"
            )
            self._attempts.end(incoming.attempt, error)
            return
        if incoming.sequence.status is not Status.NEW:
            error = KVTransferError("the prefill worker started this transfer twice")
            self._attempts.end(incoming.attempt, error)
            return
        self._reserving[incoming.sequence.key] = transfer_id
        self._scheduler.submit_arrival(incoming.sequence)
        self._scheduler.reserve_in_turn(self._clock.now_s())
        self._attempts.deliver(self._scheduler.take_events())
        # Still in line: `_reserved`, called in the line above, has not taken it out.
        if incoming.sequence.key in self._reserving:
            self._give_up_later(transfer_id, incoming)

    def _reserved(self, sequence: Sequence, num_have_blocks: int) -> None:
        """It is this sequence's turn: give the agent the blocks that KV may go to."""
        transfer_id = self._reserving[sequence.key]
        incoming = self._incoming[transfer_id]
        self._leave_line(incoming)
        # Copies: the agent is on another loop, and the sequence's own table changes on this one.
        table = tuple(sequence.block_table)
        # A block that is used again has a new generation: late bytes for the old one are refused.
        generations = tuple(self._scheduler.pool.generation(b) for b in table)
        incoming.pool_generation = self._kv.generation
        reservation = Reservation(table, generations, num_have_blocks, incoming.pool_generation)
        self._post(self.agent.reserved, transfer_id, reservation)

    def _leave_line(self, incoming: Incoming) -> None:
        self._reserving.pop(incoming.sequence.key, None)
        if incoming.give_up is not None:
            incoming.give_up.cancel()

    def _give_up_later(self, transfer_id: TransferId, incoming: Incoming) -> None:
        loop = asyncio.get_running_loop()

        def give_up() -> None:
            fail = functools.partial(self._attempts.end, incoming.attempt)
            with contained("a refusal for want of room", fail):
                self._refuse(transfer_id, incoming)

        incoming.give_up = loop.call_later(self._reserve_wait_s, give_up)

    def _refuse(self, transfer_id: TransferId, incoming: Incoming) -> None:
        """Another worker may have room sooner, but for the head of the line, whose turn it is."""
        if self._scheduler.waiting.ready.first is incoming.sequence:
            self._give_up_later(transfer_id, incoming)
            return
        pool = self._scheduler.pool
        error = PoolExhausted(
            f"no {self._layout.blocks_for(incoming.sequence.num_tokens)} free blocks within "
            f"{self._reserve_wait_s:g} s, {pool.num_available} of {pool.num_blocks} are available; "
            "raise pools.decode.replicas or engine.num_blocks"
        )
        self._post(self.agent.refuse, transfer_id, error)
        self._attempts.end(incoming.attempt, error)

    def transfer_arrived(
        self, transfer_id: TransferId, first_tokens: dict[int, Logprob], arrival: Arrival
    ) -> None:
        """KV is complete and verified: attach, acknowledge, decode."""
        incoming = self._incoming.get(transfer_id)
        if incoming is None or incoming.sequence.status is not Status.ARRIVING:
            return
        attempt = incoming.attempt
        sequence = incoming.sequence
        if incoming.pool_generation != self._kv.generation:
            error = KVTransferError(
                f"the KV arrived in generation {incoming.pool_generation} of the pool, this is "
                f"{self._kv.generation}: the ranks started again, and so must the attempt"
            )
            self._attempts.end(attempt, error)
            return
        if set(first_tokens) != set(sequence.choices):
            error = KVTransferError(
                f"first tokens came for choices {sorted(first_tokens)}, "
                f"not {sorted(sequence.choices)}"
            )
            self._attempts.end(attempt, error)
            return
        try:
            check_first_tokens(first_tokens.values(), self._vocabulary_size)
        except KVTransferError as error:
            self._attempts.end(attempt, error)
            return
        # All bytes are here, so nothing is pinned; the entry stays until the agent has closed.
        del self._incoming[transfer_id]
        self._closing[transfer_id] = []
        events = self._scheduler.attach(sequence, first_tokens, self._clock.now_s())
        attempt.timings = replace(
            self._attempts.phase_timings(attempt, sequence),
            queue_s=0.0,
            prefill_s=0.0,
            # What it holds itself is not sent, but was computed all the same.
            cached_tokens=0,
            kv_bytes=arrival.num_bytes,
            kv_blocks=arrival.num_blocks,
            kv_transport=arrival.transport,
            kv_fragments_resent=arrival.num_resent,
        )
        # The Ack lets prefill drop its blocks, so it goes only once the sequence has its own.
        self._attempts.deliver(events)
        self._post(self.agent.ack, transfer_id)
        self._attempts.wake()

    def transfer_finished(self, transfer_id: TransferId) -> None:
        """Nothing to decode: the first tokens were final, the router has them from prefill."""
        incoming = self._incoming.get(transfer_id)
        if incoming is not None:
            self._attempts.end(incoming.attempt, None)

    def transfer_failed(self, transfer_id: TransferId, error: ServingError) -> None:
        """The transfer cannot succeed: the attempt is over here."""
        incoming = self._incoming.get(transfer_id)
        if incoming is not None:
            self._attempts.end(incoming.attempt, error)

    def transfer_closed(self, transfer_id: TransferId) -> None:
        """Nothing is written any more: drop the pins."""
        self._scheduler.tables.unpin(self._closing.pop(transfer_id, []))
        self._attempts.wake()
