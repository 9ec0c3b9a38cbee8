"""Prefill's side of a hand-over.

Owns, per transfer: how many blocks of each layer are computed and published, the sub-attempt, and
the pins on source blocks that the agent may be reading. Does not know frames or streams.

    begin ─▶ announced (Starting) ─▶ Reserved ─▶ computed, layers published ─▶ Commit ─▶ Ack ─▶ end
               └─ above the watermark the computing may begin before Reserved ─┘
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from core.errors import Cancelled, InvalidRequest, InvariantViolation, ServingError
from core.ids import TransferId
from core.plan import StepPlan
from core.session import ConnectPeers, Role, Task
from engine.scheduling.events import Announced, BlocksReserved, HandoverEvent, Preempted, Started
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Handover, Sequence, Status
from kv_transfer.sender import Blocks, Offer, SenderCallbacks
from worker.attempt import Attempt
from worker.components import TransferAgents, WorkerComponents
from worker.ports import WorkerAttempts
from worker.sequences import add_sequence


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer out of this worker."""

    attempt: Attempt
    sequence: Sequence
    handover: Handover
    """The sequence's."""
    num_computed: list[int]
    """Complete leading blocks of each layer."""
    num_published: list[int]
    """Those that the agent may send."""
    sub_attempt: int = 0
    pins: dict[int, list[int]] = field(default_factory=dict)
    """By sub-attempt: blocks that the agent may still read."""


class PrefillRole:
    """The prefill role of one worker."""

    pool = Role.PREFILL
    task = Task.PREFILL

    receiver = None
    """Hand-overs go out from here; none comes in."""

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
        self._outgoing: dict[TransferId, Outgoing] = {}
        self._by_key: dict[int, Outgoing] = {}
        self._draining: dict[TransferId, dict[int, list[int]]] = {}
        """Pins of ended transfers, by sub-attempt."""
        self.agent = agents.send

    @property
    def sender(self) -> SenderCallbacks:
        """What the agent reports of hand-overs comes here."""
        return self

    @property
    def num_live(self) -> int:
        """Transfers with any state left; zero at rest."""
        return len(self._outgoing) + len(self._draining)

    # --- called by the worker ---------------------------------------------------------------------

    def has_transfer(self, transfer_id: TransferId) -> bool:
        """Return True while anything is left of a hand-over."""
        return transfer_id in self._outgoing or transfer_id in self._draining

    def begin(self, attempt: Attempt) -> None:
        """Queue the prompt and expect the peer's Fetch."""
        submit = attempt.submit
        num_layers = self._layout.num_layers
        if self.has_transfer(submit.transfer_id):
            raise InvalidRequest("transfer_id", "names a transfer that is here already")
        handover = Handover(submit.peer_id)
        sequence = add_sequence(
            self._scheduler, attempt, attempt.open_choices, self._clock.now_s(), handover
        )
        outgoing = Outgoing(attempt, sequence, handover, [0] * num_layers, [0] * num_layers)
        self._outgoing[submit.transfer_id] = outgoing
        self._by_key[sequence.key] = outgoing
        offer = Offer(
            submit.transfer_id, submit.peer_id, submit.peer_incarnation, self._kv.generation
        )
        # Posted before anything about it can be: the agent takes its calls in order.
        self._post(self.agent.offer, offer)
        self._attempts.enter(attempt)

    def end(self, attempt: Attempt, error: ServingError | None) -> None:
        """Close the transfer; blocks the agent may be reading stay pinned until it has drained."""
        transfer_id = attempt.submit.transfer_id
        outgoing = self._outgoing.get(transfer_id)
        # An attempt that was refused for its transfer id must not end the transfer that has it.
        if outgoing is None or outgoing.attempt is not attempt:
            return
        del self._outgoing[transfer_id]
        del self._by_key[outgoing.sequence.key]
        outgoing.pins[outgoing.sub_attempt] = self._scheduler.tables.pin(outgoing.sequence)
        self._draining[transfer_id] = outgoing.pins
        self._post(self.agent.end_send, transfer_id, error or Cancelled("the request ended"))

    def layer_done(self, plan: StepPlan, layer: int) -> None:
        """Publish what this step completed in one layer."""
        size = self._layout.block_size_tokens
        for item in plan.items:
            outgoing = self._by_key.get(item.sequence_key)
            if outgoing is None or outgoing.sequence.status is not Status.RUNNING:
                continue
            # A block that is not full yet leaves with the prompt's last chunk alone: until then
            # the next chunk writes to it.
            end = item.start + len(item.token_ids)
            is_last = end == outgoing.sequence.num_tokens
            outgoing.num_computed[layer] = self._layout.blocks_for(end) if is_last else end // size
            self._publish(outgoing, layer)

    def prompt_computed(self, sequence: Sequence) -> None:
        """First tokens are drawn: send what is left, then commit, if the partner is there."""
        outgoing = self._by_key[sequence.key]
        blocks = self._layout.blocks_for(sequence.num_tokens)
        outgoing.num_computed = [blocks] * self._layout.num_layers
        if self._commit_if_ready(outgoing):
            return
        # With every first token final there is nothing to hand over, partner or not.
        if len(self._final(outgoing)) == len(sequence.choices):
            self._commit(outgoing)

    def connect_peers(self, message: ConnectPeers) -> None:
        """KV leaves this worker; whoever wants it dials."""

    def renew(self, attempts: list[Attempt]) -> None:
        """The owning router is alive: leases go on."""
        ids = [a.submit.transfer_id for a in attempts if a.submit.transfer_id in self._outgoing]
        if ids:
            self._post(self.agent.renew, ids)

    # --- events of the scheduler ------------------------------------------------------------------

    def take(self, event: HandoverEvent) -> None:
        """Act on a hand-over's event."""
        match event:
            case Announced(sequence):
                self._announce(sequence)
            case Started(sequence):
                self._started(sequence)
            case Preempted(sequence, pins):
                self._preempted(sequence, list(pins))
            case BlocksReserved():
                raise InvariantViolation("a prefill worker reserved blocks for an arrival")

    def _announce(self, sequence: Sequence) -> None:
        outgoing = self._by_key[sequence.key]
        self._post(self.agent.start, outgoing.attempt.submit.transfer_id, sequence.num_tokens)

    def _started(self, sequence: Sequence) -> None:
        """Blocks found in the prefix cache are complete: they go out before the first chunk."""
        # The attempt may have ended since the plan that this event is of.
        outgoing = self._by_key.get(sequence.key)
        if outgoing is None:
            return
        hits = sequence.num_computed_tokens // self._layout.block_size_tokens
        for layer in range(self._layout.num_layers):
            outgoing.num_computed[layer] = hits
            self._publish(outgoing, layer)

    def _preempted(self, sequence: Sequence, pins: list[int]) -> None:
        """Its blocks are gone: start a new sub-attempt, keep pinned what may be in flight."""
        # As above; nobody will drain these pins, so they end here.
        outgoing = self._by_key.get(sequence.key)
        if outgoing is None:
            self._scheduler.tables.unpin(pins)
            return
        num_layers = self._layout.num_layers
        # Without pins nothing was published: the partner need not start again.
        if pins:
            outgoing.pins[outgoing.sub_attempt] = pins
            outgoing.sub_attempt += 1
            self._post(
                self.agent.restart, outgoing.attempt.submit.transfer_id, outgoing.sub_attempt
            )
        outgoing.num_computed = [0] * num_layers
        outgoing.num_published = [0] * num_layers

    # --- publishing -------------------------------------------------------------------------------

    def _publish(self, outgoing: Outgoing, layer: int) -> None:
        handover = outgoing.handover
        if not handover.is_partnered:
            return
        # The partner has the blocks before `first_block` in its own cache.
        first = max(outgoing.num_published[layer], handover.first_block)
        last = outgoing.num_computed[layer]
        if first >= last:
            return
        outgoing.num_published[layer] = last
        # From now on a preemption has to pin the blocks: the agent may be reading them.
        handover.is_read = True
        sequence = outgoing.sequence
        size = self._layout.block_size_tokens
        num_tokens = min(last * size, sequence.num_tokens) - first * size
        blocks = Blocks(layer, first, tuple(sequence.block_table[first:last]), num_tokens)
        self._post(
            self.agent.publish, outgoing.attempt.submit.transfer_id, outgoing.sub_attempt, blocks
        )

    def _final(self, outgoing: Outgoing) -> frozenset[int]:
        sequence = outgoing.sequence
        position = sequence.num_output_tokens
        return frozenset(
            c
            for c, t in outgoing.handover.first_tokens.items()
            if sequence.finish_after(t.token_id, position + 1) is not None
        )

    def _commit_if_ready(self, outgoing: Outgoing) -> bool:
        handover = outgoing.handover
        if not handover.is_partnered or not handover.first_tokens:
            return False
        for layer in range(self._layout.num_layers):
            self._publish(outgoing, layer)
        self._commit(outgoing)
        return True

    def _commit(self, outgoing: Outgoing) -> None:
        final = self._final(outgoing)
        outgoing.handover.is_read = True
        tokens = outgoing.handover.first_tokens
        transfer_id = outgoing.attempt.submit.transfer_id
        self._post(self.agent.commit, transfer_id, outgoing.sub_attempt, tokens, final)
        # Nobody will decode, so no Ack needs to be awaited.
        if len(final) == len(tokens):
            self._attempts.end(outgoing.attempt, None)

    # --- called by the agent, on the worker's loop ------------------------------------------------

    def transfer_reserved(self, transfer_id: TransferId, have_blocks: int) -> None:
        """The partner is ready: publish what is computed, let the rest start."""
        outgoing = self._outgoing.get(transfer_id)
        if outgoing is None:
            return
        sequence = outgoing.sequence
        self._scheduler.partnered(sequence, have_blocks)
        self._attempts.deliver(self._scheduler.take_events())
        if sequence.status is Status.HOLDING:
            self._commit_if_ready(outgoing)
        elif sequence.status is Status.RUNNING:
            # What was computed ahead of the partner has waited for this.
            for layer in range(self._layout.num_layers):
                self._publish(outgoing, layer)
        self._attempts.wake()

    def transfer_sent(self, transfer_id: TransferId) -> None:
        """Ack: the blocks become cache, the attempt ends here."""
        outgoing = self._outgoing.get(transfer_id)
        if outgoing is not None:
            timings = self._attempts.phase_timings(outgoing.attempt, outgoing.sequence)
            outgoing.attempt.timings = replace(
                timings, cached_tokens=outgoing.sequence.num_prefix_hit_tokens
            )
            self._attempts.end(outgoing.attempt, None)

    def transfer_lost(self, transfer_id: TransferId, error: ServingError) -> None:
        """The transfer cannot succeed: the attempt is over here."""
        outgoing = self._outgoing.get(transfer_id)
        if outgoing is not None:
            self._attempts.end(outgoing.attempt, error)

    def transfer_drained(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """Nothing up to this sub-attempt is read any more: drop its pins, not later ones'."""
        outgoing = self._outgoing.get(transfer_id)
        # The agent may report after the attempt has ended: its pins outlive it in `_draining`.
        pins = self._draining.get(transfer_id, {}) if outgoing is None else outgoing.pins
        for drained in [number for number in pins if number <= sub_attempt]:
            self._scheduler.tables.unpin(pins.pop(drained))
        if not pins:
            self._draining.pop(transfer_id, None)
        self._attempts.wake()
