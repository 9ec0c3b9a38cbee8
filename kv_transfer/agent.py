"""The transfer agent of a worker: every transfer it sends or receives, on a loop of its own.

Owns the Fetch listener, the tables of live transfers, parked opens, tombstones and leases. It is
the only one to touch KV on the wire. Does not know scheduling. In production the agent's loop runs
in a thread of its own (`AgentThread`); in simulation both loops are one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from core.config import TransferConfig
from core.errors import InvariantViolation, KVTransferError, ServingError, to_wire
from core.ids import TransferId
from core.kv_layout import KVLayout
from core.ports import KVBytes, MessageStream, Network, StreamClosed
from core.session import RouteReport
from core.types import Logprob
from kv_transfer import frames
from kv_transfer.copying import warm
from kv_transfer.failures import failure_of
from kv_transfer.parking import ParkingLot
from kv_transfer.probing import answer, probe
from kv_transfer.receiver import FetchOrder, Receiver, ReceiverCallbacks, Reservation
from kv_transfer.sender import LAST_SUB_ATTEMPT, Blocks, Offer, Sender, SenderCallbacks
from kv_transfer.transitions import Transition

T = TypeVar("T")
TOMBSTONE_S = 10.0
HEARTBEAT_S = 0.5
MAX_MEETINGS = 512
PROBE_TIMEOUT_S = 5.0
_TAKEN = KVTransferError("this transfer has a stream already; a receiver opens one")
log = logging.getLogger(__name__)


class TransferAgent:
    """All transfers of one worker. Every method runs on the agent's loop."""

    def __init__(
        self,
        network: Network,
        callbacks: SenderCallbacks | ReceiverCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        config: TransferConfig,
        generation_of: Callable[[int], int],
        now_s: Callable[[], float] | None = None,
    ) -> None:
        """Keep the collaborators; `listen` starts it.

        Args:
            network: Carries raw bytes.
            callbacks: The worker's role: a prefill worker sends, a decode worker receives.
            kv: The pool's bytes.
            layout: What a block looks like.
            config: Sizes and times.
            generation_of: Current generation of a block, to fence late writes.
            now_s: A finer clock than the loop's, for measuring; None: the loop's.
        """
        self._network, self._callbacks, self._kv, self._layout = network, callbacks, kv, layout
        self._config, self._generation_of = config, generation_of
        self._now_s = now_s or (lambda: asyncio.get_running_loop().time())
        self._probing: asyncio.Semaphore = asyncio.Semaphore()
        self._num_probes = 0
        self._senders: dict[TransferId, Sender] = {}
        self._receivers: dict[TransferId, Receiver] = {}
        self._tombstones: dict[TransferId, float] = {}
        self._parked = ParkingLot()
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_unknown = 0
        self.num_late_frames = 0
        self.num_resent = 0
        self.num_sent_bytes = 0
        self.transitions: Counter[Transition] = Counter()
        self.on_fault: Callable[[BaseException], None] = _report
        """Told, on this loop, when a task of the agent's ends by a bug: nobody else notices."""

    async def listen(self) -> str:
        """Serve Fetch and watch the leases; returns the address to publish."""
        address = await self._network.listen(self._accept)
        self._own(self._watch_leases())
        return address

    async def stop(self) -> None:
        """End every transfer and every task."""
        for sender in list(self._senders.values()):
            sender.end(KVTransferError("the prefill worker is shutting down"))
        for receiver in list(self._receivers.values()):
            receiver.end()
        await self._network.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def num_live(self) -> int:
        """Transfers with any state left, tombstones apart; zero at rest."""
        return len(self._senders) + len(self._receivers) + len(self._parked)

    @property
    def _sender_callbacks(self) -> SenderCallbacks:
        if not isinstance(self._callbacks, SenderCallbacks):
            raise InvariantViolation("this worker's role sends no KV")
        return self._callbacks

    @property
    def _receiver_callbacks(self) -> ReceiverCallbacks:
        if not isinstance(self._callbacks, ReceiverCallbacks):
            raise InvariantViolation("this worker's role receives no KV")
        return self._callbacks

    def _note(self, transition: Transition) -> None:
        self.transitions[transition] += 1

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.on_fault(error)

    @contextlib.contextmanager
    def _contained(self, transfer_id: TransferId) -> Iterator[None]:
        """Let a fault in one transfer's business fail that transfer, and nothing beside it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - logged, and the attempt is made again
            self._fail(transfer_id, failure_of(error, "the transfer"))

    def _fail(self, transfer_id: TransferId, error: ServingError) -> None:
        if sender := self._senders.get(transfer_id):
            sender.fail(error)
            self._forget_sender(sender)
        elif receiver := self._receivers.get(transfer_id):
            receiver.fail(error)
        elif isinstance(self._callbacks, SenderCallbacks):
            self._callbacks.transfer_lost(transfer_id, error)
        else:
            self._callbacks.transfer_failed(transfer_id, error)

    # --- sending ----------------------------------------------------------------------------------

    def offer(self, offer: Offer) -> None:
        """Expect a peer's Open; the lease begins now."""
        with self._contained(offer.transfer_id):
            sender = Sender(
                offer, self._sender_callbacks, self._kv, self._layout, self._config, self._note
            )
            self._note(Transition.SENDER_OFFERED)
            self._senders[offer.transfer_id] = sender
            self._parked.offered(offer.transfer_id)

    def start(self, transfer_id: TransferId, num_tokens: int) -> None:
        """Ask the partner to reserve."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.start(num_tokens)

    def publish(self, transfer_id: TransferId, sub_attempt: int, blocks: Blocks) -> None:
        """Let blocks go out."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.publish(sub_attempt, blocks)

    def commit(
        self,
        transfer_id: TransferId,
        sub_attempt: int,
        first_tokens: dict[int, Logprob],
        final: frozenset[int],
    ) -> None:
        """Everything was published."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.commit(sub_attempt, first_tokens, final)
                if len(final) == len(first_tokens):
                    self._end_sender(sender, None)

    def restart(self, transfer_id: TransferId, sub_attempt: int) -> None:
        """The sequence was preempted."""
        with self._contained(transfer_id):
            if sender := self._sender(transfer_id):
                sender.restart(sub_attempt)
            else:
                self._sender_callbacks.transfer_drained(transfer_id, sub_attempt - 1)

    def end_send(self, transfer_id: TransferId, error: ServingError | None) -> None:
        """Give a transfer up; `transfer_drained` is the answer, also for an unknown one."""
        with self._contained(transfer_id):
            sender = self._senders.get(transfer_id)
            if sender is None:
                self._sender_callbacks.transfer_drained(transfer_id, LAST_SUB_ATTEMPT)
            else:
                self._end_sender(sender, error)

    def renew(self, transfer_ids: list[TransferId]) -> None:
        """The owning router is alive: its leases go on."""
        now_s = asyncio.get_running_loop().time()
        for transfer_id in transfer_ids:
            if sender := self._senders.get(transfer_id):
                sender.last_traffic_at = now_s

    def _sender(self, transfer_id: TransferId) -> Sender | None:
        sender = self._senders.get(transfer_id)
        if sender is None:
            self.num_unknown += 1
        return sender

    def _end_sender(self, sender: Sender, error: ServingError | None) -> None:
        sender.end(error)
        self._forget_sender(sender)

    def _forget_sender(self, sender: Sender) -> None:
        if self._senders.pop(sender.offer.transfer_id, None) is not None:
            self.num_sent_bytes += sender.num_bytes
            self._bury(sender.offer.transfer_id)

    def _bury(self, transfer_id: TransferId) -> None:
        self._tombstones[transfer_id] = asyncio.get_running_loop().time() + TOMBSTONE_S

    async def _accept(self, stream: MessageStream) -> None:
        """One Fetch stream of a peer, from Open to its end."""
        try:
            async with asyncio.timeout(self._config.open_timeout_s):
                number, opened = frames.decode(await stream.recv())
            if isinstance(opened, frames.Probe):
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await answer(stream, opened, self._config.frame_bytes)
                return
            if number or not isinstance(opened, frames.Open):
                raise KVTransferError(f"a fetch stream began with {type(opened).__name__}")
            sender = await self._find_offer(opened)
            if sender is None:
                self.num_unknown += 1
                self._note(Transition.SENDER_NOT_FOUND)
                await self._turn_away(stream, frames.NotFound())
            elif sender.has_stream:
                self.num_unknown += 1
                await self._turn_away(stream, frames.Failed(*to_wire(_TAKEN)))
            else:
                await self._serve(sender, stream, opened)
        except (StreamClosed, TimeoutError, KVTransferError):
            stream.reset()
        except Exception:
            # One peer's stream; the network that carries it would only end it, and say nothing.
            log.exception("a fetch stream broke on a bug")
            stream.reset()

    async def _serve(self, sender: Sender, stream: MessageStream, opened: frames.Open) -> None:
        try:
            await sender.serve(stream, opened)
        finally:
            self._forget_sender(sender)

    async def _turn_away(self, stream: MessageStream, message: frames.Message) -> None:
        """Say why an Open is not served; whatever is served goes on."""
        async with asyncio.timeout(self._config.open_timeout_s):
            await stream.send(frames.encode(0, message))
            await stream.close()

    async def _find_offer(self, opened: frames.Open) -> Sender | None:
        """Match an Open with its offer, waiting a while for a Submit that is still on its way."""
        transfer_id, peer = opened.transfer_id, opened.receiver_id
        if (
            transfer_id not in self._senders
            and transfer_id not in self._tombstones
            and self._parked.has_room(peer)
        ):
            self._note(Transition.SENDER_PARKED)
            await self._parked.wait(transfer_id, peer, self._config.park_s)
        sender = self._senders.get(transfer_id)
        if sender is None:
            return None
        named = (sender.offer.receiver_id, sender.offer.receiver_incarnation)
        return sender if named == (opened.receiver_id, opened.receiver_incarnation) else None

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now_s = asyncio.get_running_loop().time()
            for sender in list(self._senders.values()):
                if now_s - sender.last_traffic_at > self._config.lease_s:
                    with self._contained(sender.offer.transfer_id):
                        sender.expire()
                        self._forget_sender(sender)
            for transfer_id, until in list(self._tombstones.items()):
                if now_s >= until:
                    del self._tombstones[transfer_id]

    # --- receiving --------------------------------------------------------------------------------

    def fetch(self, order: FetchOrder) -> None:
        """Open a Fetch stream; the host hears `transfer_starting` when the sender is ready."""
        with self._contained(order.transfer_id):
            receiver = Receiver(
                order,
                self._receiver_callbacks,
                self._kv,
                self._layout,
                self._config.lease_s,
                self._generation_of,
                self._note,
                self._config.copy_threads,
            )
            self._note(Transition.RECEIVER_FETCHING)
            self._receivers[order.transfer_id] = receiver
            self._own(self._receive(receiver))

    def probe_peer(self, address: str, probe_bytes: int) -> None:
        """Try the way to a peer; the host hears `route_found`.

        More than a few hundred at once are not tried.
        """
        if self._num_probes < MAX_MEETINGS:
            self._num_probes += 1
            self._own(self._probe_peer(address, probe_bytes))

    async def _probe_peer(self, address: str, probe_bytes: int) -> None:
        try:
            async with (
                self._probing,
                asyncio.timeout(PROBE_TIMEOUT_S),
            ):  # one by one, or they would measure one another
                route = await probe(
                    self._network, address, probe_bytes, self._config.frame_bytes, self._now_s
                )
        except TimeoutError:
            route = RouteReport(address, error=f"no answer within {PROBE_TIMEOUT_S:g} s")
        except Exception as error:  # noqa: BLE001 - a way that breaks is no way; logged
            route = RouteReport(address, error=failure_of(error, "the probe").message)
        finally:
            self._num_probes -= 1
        self._receiver_callbacks.route_found(route)

    async def _receive(self, receiver: Receiver) -> None:
        try:
            await receiver.run(self._network, self._config.open_timeout_s)
        finally:
            del self._receivers[receiver.order.transfer_id]
            self.num_late_frames += receiver.num_late_frames
            self.num_resent += receiver.num_resent

    def reserved(self, transfer_id: TransferId, reservation: Reservation) -> None:
        """Blocks are reserved: frames may come."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.reserved(reservation)

    def refuse(self, transfer_id: TransferId, error: ServingError) -> None:
        """No room."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.refuse(error)

    def ack(self, transfer_id: TransferId) -> None:
        """Attached."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.ack()

    def end_fetch(self, transfer_id: TransferId) -> None:
        """Stop writing; `transfer_closed` is the answer, also for an unknown one."""
        with self._contained(transfer_id):
            if receiver := self._receivers.get(transfer_id):
                receiver.end()
            else:
                self._receiver_callbacks.transfer_closed(transfer_id)


def _report(error: BaseException) -> None:
    log.error("a task of the transfer agent ended by a bug", exc_info=error)


class AgentThread:
    """Runs an agent's loop in a thread, so that payload copies never delay a step."""

    def __init__(self) -> None:
        """Start the thread; its loop is ready on return."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="transfer-agent", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        warm()
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the agent's loop and wait for it here."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def stop(self) -> None:
        """End the loop and the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)
        self.loop.close()
