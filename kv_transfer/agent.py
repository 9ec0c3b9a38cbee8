"""What the two transfer agents of workers share: one listener, owned tasks, and containment.

Owns the listener on which peers open streams, the tasks of an agent, and how a fault in one
transfer fails that transfer alone. Does not know scheduling, nor what is sent (`SendAgent`) or
received (`ReceiveAgent`).

Only agents touch KV on the wire. In production an agent runs on the loop of an `AgentThread`; in
simulation it shares the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from core.config import TransferConfig
from core.errors import KVTransferError, ServingError
from core.ids import TransferId
from core.ports import MessageStream, Network, StreamClosed
from kv_transfer import codec, frames
from kv_transfer.failures import failure_of
from kv_transfer.probing import PROBE_TIMEOUT_S, answer
from kv_transfer.transitions import Transition

OnFault = Callable[[BaseException], None]
"""Called on the agent's loop when a task of the agent ends by a bug: nobody else notices."""
log = logging.getLogger(__name__)


def log_fault(error: BaseException) -> None:
    """Log what ended a task, where nothing more can be done about it."""
    log.error("a task of the transfer agent ended by a bug", exc_info=error)


class TransferAgent(ABC):
    """All transfers of one worker. Every method runs on the agent's loop."""

    def __init__(self, network: Network, config: TransferConfig, on_fault: OnFault) -> None:
        """Keep the collaborators; `listen` starts it."""
        self._network = network
        self._config = config
        self._on_fault = on_fault
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_unknown = 0
        self.transitions: Counter[Transition] = Counter()

    async def listen(self) -> str:
        """Serve peers; returns the address to publish."""
        return await self._network.listen(self._accept)

    async def stop(self) -> None:
        """End every transfer and every task."""
        self._end_transfers()
        await self._network.close()
        # After the network: its streams end, and with them most tasks.
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    @abstractmethod
    def num_live(self) -> int:
        """Transfers with any state left, tombstones apart; zero at rest."""

    @abstractmethod
    def _end_transfers(self) -> None:
        """The worker is shutting down."""

    @abstractmethod
    def _fail(self, transfer_id: TransferId, error: ServingError) -> None:
        """End this transfer after a fault in it, also if it is unknown here."""

    @abstractmethod
    async def _serve_open(self, stream: MessageStream, opened: frames.Open) -> None:
        """Serve a peer that asks for a transfer, or refuse it."""

    def _note(self, transition: Transition) -> None:
        self.transitions[transition] += 1

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        # Kept, since a loop has only weak references to its tasks.
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_fault(error)

    @contextlib.contextmanager
    def _contained(self, transfer_id: TransferId) -> Iterator[None]:
        """Let a fault in one transfer fail that transfer, and nothing beside it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - logged, and the attempt is made again
            self._fail(transfer_id, failure_of(error, "the transfer"))

    async def _accept(self, stream: MessageStream) -> None:
        """One Fetch stream of a peer, from its first message to its end."""
        try:
            # A peer that opens a stream and sends nothing must not keep a task.
            async with asyncio.timeout(self._config.open_timeout_s):
                number, opened = codec.decode(await stream.recv())
            if isinstance(opened, frames.Probe):
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await answer(stream, opened, self._config.frame_bytes)
                return
            # Numbers begin at 0: anything else is the rest of another stream.
            if number or not isinstance(opened, frames.Open):
                raise KVTransferError(f"a fetch stream began with {type(opened).__name__}")
            await self._serve_open(stream, opened)
        except (StreamClosed, TimeoutError, KVTransferError):
            stream.reset()
        except Exception:
            # One peer's stream; the network that carries it would end it without a log.
            log.exception("a fetch stream broke on a bug")
            stream.reset()

    async def _turn_away(self, stream: MessageStream, message: frames.Message) -> None:
        """Answer why an Open is not served; what is served already goes on."""
        self.num_unknown += 1
        async with asyncio.timeout(self._config.open_timeout_s):
            await stream.send(codec.encode(0, message))
            await stream.close()
