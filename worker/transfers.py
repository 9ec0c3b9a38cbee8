"""Everything of one worker that moves KV: the agents, the role's hand-overs, and prefixes.

Owns the making of these, and whose a transfer is that an agent reports on. Does not know frames,
streams or scheduling.
"""

from __future__ import annotations

from core.errors import InvalidRequest, ServingError
from core.ids import TransferId
from core.session import OfferPrefix
from engine.scheduling.scheduler import Scheduler
from kv_transfer.receive_agent import ReceiveAgent
from kv_transfer.receiver import ReceiverCallbacks
from kv_transfer.send_agent import SendAgent
from kv_transfer.sender import SenderCallbacks
from kv_transfer.threadsafe_callbacks import ThreadsafeReceiverCallbacks, ThreadsafeSenderCallbacks
from worker.attempt import Attempt
from worker.checking import check_offer
from worker.components import Loops, TransferAgents, WorkerComponents
from worker.ports import WorkerAttempts
from worker.prefix_fetches import PrefixFetches
from worker.prefix_offers import PrefixOffers


class Transfers:
    """The transfers of one worker."""

    def __init__(
        self,
        components: WorkerComponents,
        scheduler: Scheduler,
        attempts: WorkerAttempts,
        loops: Loops,
    ) -> None:
        """Make the agents and all that they work for; nothing listens yet."""
        self._attempts = attempts
        self._vocabulary_size = components.vocabulary_size
        self._max_model_len = components.max_model_len
        self._agents = TransferAgents(
            SendAgent(
                components.transfer_network,
                ThreadsafeSenderCallbacks(self._sender_of, loops.to_worker, self._fail),
                components.kv,
                components.layout,
                components.transfer,
                loops.agent_broke,
            ),
            ReceiveAgent(
                components.transfer_network,
                ThreadsafeReceiverCallbacks(
                    self._receiver_of, attempts.route_found, loops.to_worker, self._fail
                ),
                components.kv,
                components.layout,
                components.transfer,
                scheduler.pool.generation,
                components.clock.now_s,
                loops.agent_broke,
            ),
            loops.to_agent,
        )
        self.role = components.role(components, scheduler, attempts, self._agents)
        self.offers = PrefixOffers(components, scheduler.prefixes, self._agents)
        self.fetches = PrefixFetches(components, scheduler, attempts, self._agents)

    @property
    def agents(self) -> tuple[SendAgent, ReceiveAgent]:
        """What moves KV, on a loop of its own."""
        return self._agents.send, self._agents.receive

    async def listen(self) -> str:
        """Serve peers; returns the address to publish. Runs on the agents' loop, as `stop` does."""
        # The other agent only dials.
        return await self._agents.send.listen()

    async def stop(self) -> None:
        """End every transfer and every task."""
        for agent in self.agents:
            await agent.stop()

    def left(self) -> dict[str, int]:
        """Count what is left of transfers; all zero at rest."""
        return {
            "transfers of the role": self.role.num_live,
            "transfers of the agents": sum(agent.num_live for agent in self.agents),
            "offered prefixes": len(self.offers),
            "fetched prefixes": len(self.fetches),
        }

    def begin(self, attempt: Attempt) -> None:
        """Begin the hand-over of an attempt.

        Raises:
            InvalidRequest: Its transfer id is in use; nothing was changed.
        """
        transfer_id = attempt.submit.transfer_id
        if transfer_id in self.offers or transfer_id in self.fetches:
            raise InvalidRequest("transfer_id", "names a transfer that is here already")
        self.role.begin(attempt)

    def begin_fetch(self, attempt: Attempt) -> bool:
        """Fetch the prefix of an attempt; False if there is nothing to wait for."""
        source = attempt.submit.prefix_source
        # Another's transfer of that id would be taken for the fetch, and never end.
        if source is None or self._is_here(source.transfer_id):
            return False
        return self.fetches.begin(attempt)

    def offer_prefix(self, message: OfferPrefix) -> None:
        """Let a peer fetch blocks that are cached here.

        Raises:
            InvalidRequest: The message holds what no offer can; nothing was changed.
        """
        check_offer(message, self._vocabulary_size, self._max_model_len)
        if self._is_here(message.transfer_id):
            raise InvalidRequest("transfer_id", "names a transfer that is here already")
        self.offers.offer(message)

    def _is_here(self, transfer_id: TransferId) -> bool:
        is_prefix = transfer_id in self.offers or transfer_id in self.fetches
        return is_prefix or self.role.has_transfer(transfer_id)

    # --- what agents report -----------------------------------------------------------------------

    def _sender_of(self, transfer_id: TransferId) -> SenderCallbacks:
        role = self.role.sender
        return self.offers if role is None or transfer_id in self.offers else role

    def _receiver_of(self, transfer_id: TransferId) -> ReceiverCallbacks:
        role = self.role.receiver
        return self.fetches if role is None or transfer_id in self.fetches else role

    def _fail(self, transfer_id: TransferId, error: ServingError) -> None:
        """A step of a transfer broke here: end what it belongs to."""
        if transfer_id in self.offers:
            self.offers.transfer_lost(transfer_id, error)
        elif transfer_id in self.fetches:
            self.fetches.transfer_failed(transfer_id, error)
        else:
            self._attempts.fail_transfer(transfer_id, error)
