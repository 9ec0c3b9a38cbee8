"""The source's side of a fetch: cached blocks of a prompt that a peer is sent.

Owns, per transfer, the pinned blocks. Does not know who decided on the fetch, frames or streams.

    OfferPrefix ─▶ matched by tokens, pinned, offered, Starting ─▶ Reserved ─▶ all published, Commit
                      └─ nothing here: declined at once                            └─▶ Ack, unpinned

All is computed already, so nothing waits for a step. The lease is that of any transfer.
"""

from __future__ import annotations

from core.errors import ServingError
from core.ids import TransferId
from core.session import OfferPrefix
from engine.scheduling.prefix_blocks import PrefixBlocks
from kv_transfer.sender import Blocks, Offer
from worker.components import TransferAgents, WorkerComponents


class PrefixOffers:
    """The prefixes that one worker lets others fetch."""

    def __init__(
        self, components: WorkerComponents, prefixes: PrefixBlocks, agents: TransferAgents
    ) -> None:
        """Offer nothing yet."""
        self._prefixes = prefixes
        self._kv = components.kv
        self._layout = components.layout
        self._exports_kv = components.exports_kv
        self._agent = agents.send
        self._post = agents.post
        self._pinned: dict[TransferId, list[int]] = {}
        self.num_declined = 0
        """Offers that were asked for, of which nothing was cached."""
        self.num_sent = 0

    def __len__(self) -> int:
        """Offers with any state left; zero at rest."""
        return len(self._pinned)

    def __contains__(self, transfer_id: TransferId) -> bool:
        return transfer_id in self._pinned

    def offer(self, message: OfferPrefix) -> None:
        """Offer what is cached here of a prefix, under a new id; decline if nothing is."""
        transfer_id = message.transfer_id
        blocks: list[int] = []
        if self._exports_kv:
            # By tokens: what an index says, or a name, is no reason to send anybody's KV.
            blocks = self._prefixes.pin(self._prefixes.prefix(message.token_ids, message.scope))
        if not blocks:
            self.num_declined += 1
            self._post(self._agent.decline, transfer_id)
            return
        self._pinned[transfer_id] = blocks
        self._post(
            self._agent.offer,
            Offer(
                transfer_id,
                message.receiver_id,
                message.receiver_incarnation,
                self._kv.generation,
            ),
        )
        num_tokens = len(blocks) * self._layout.block_size_tokens
        self._post(self._agent.start, transfer_id, num_tokens)

    # --- called by the agent, on the worker's loop ------------------------------------------------

    def transfer_reserved(self, transfer_id: TransferId, have_blocks: int) -> None:
        """The peer is ready: all there is goes out at once."""
        blocks = self._pinned.get(transfer_id)
        if blocks is None:
            return
        wanted = tuple(blocks[have_blocks:])
        num_tokens = len(wanted) * self._layout.block_size_tokens
        if wanted:
            for layer in range(self._layout.num_layers):
                layer_blocks = Blocks(layer, have_blocks, wanted, num_tokens)
                self._post(self._agent.publish, transfer_id, 0, layer_blocks)
        self._post(self._agent.commit, transfer_id, 0, {}, frozenset())

    def transfer_sent(self, transfer_id: TransferId) -> None:
        """The peer has it; `transfer_drained` follows."""
        self.num_sent += 1

    def transfer_lost(self, transfer_id: TransferId, error: ServingError) -> None:
        """The peer will not get it; it computes instead. `transfer_drained` is the answer."""
        self._post(self._agent.end_send, transfer_id, error)

    def transfer_drained(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """Nothing is read any more."""
        self._prefixes.unpin(self._pinned.pop(transfer_id, []))
