"""The stream of one incoming transfer: dials, and moves what its `Receiver` decides.

Owns the tasks of the stream, its time limits and heartbeats. Does not know what is received.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from core.errors import KVTransferError
from core.kv_layout import KVLayout
from core.ports import KVBytes, MappedStream, MessageStream, Network, StreamClosed
from kv_transfer.failures import failure_of
from kv_transfer.fetch_stream import HEARTBEAT_S, FetchStream
from kv_transfer.receiver import FetchOrder, Receiver, ReceiverCallbacks
from kv_transfer.transitions import Note, Transition


class ReceiveStream:
    """A receiver, and the stream over which it fetches."""

    def __init__(
        self,
        order: FetchOrder,
        callbacks: ReceiverCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        silence_s: float,
        generation_of: Callable[[int], int],
        note: Note,
        copy_threads: int = 1,
    ) -> None:
        """Nothing is dialled yet; `run` does."""
        self._callbacks = callbacks
        self._silence_s = silence_s
        self._wake = asyncio.Event()
        self._note = note
        self.receiver = Receiver(
            order, callbacks, kv, layout, generation_of, note, self._wake.set, copy_threads
        )

    async def run(self, network: Network, open_timeout_s: float) -> None:
        """Fetch; whatever happens, nothing is raised, and `transfer_closed` is reported last."""
        receiver = self.receiver
        stream: MessageStream | None = None
        try:
            try:
                async with asyncio.timeout(open_timeout_s):
                    stream = await network.dial(receiver.order.address)
                    # Given up meanwhile: opened now, it would live on with nobody to end it.
                    if receiver.is_closed:
                        return
                    fetch = FetchStream(stream, self._silence_s)
                    segments = stream.peer_segments if isinstance(stream, MappedStream) else None
                    await fetch.send(receiver.open(stream.transport, segments))
            except (StreamClosed, TimeoutError):
                self._note(Transition.RECEIVER_UNREACHED)
                raise KVTransferError(
                    "the prefill worker could not be reached for the KV"
                ) from None
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(fetch))
                heartbeats = tasks.create_task(self._heartbeat())
                # The writer sees the end of a transfer and closes the stream; a reader would wait
                # for the peer to close it, too.
                await self._write(fetch)
                reader.cancel()
                heartbeats.cancel()
        except Exception as error:  # noqa: BLE001 - whatever broke here fails this transfer, logged
            receiver.fail(failure_of(error, "the prefill worker's stream", self._silence_s))
        finally:
            receiver.end()
            # Also after a good end: close() left the other direction open.
            if stream is not None:
                stream.reset()
            # Last: from here on the worker gives the blocks to others.
            self._callbacks.transfer_closed(receiver.order.transfer_id)

    async def _read(self, fetch: FetchStream) -> None:
        while not self.receiver.is_closed:
            self.receiver.receive(await fetch.recv())

    async def _heartbeat(self) -> None:
        # Also while frames come in: only messages from this end renew the sender's lease.
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.receiver.heartbeat()

    async def _write(self, fetch: FetchStream) -> None:
        receiver = self.receiver
        while True:
            while (reply := receiver.take_reply()) is not None:
                await fetch.send(reply)
            if receiver.is_closed:
                await fetch.close()
                return
            # Nothing was awaited since the queue was found empty, so no wake-up is lost here.
            self._wake.clear()
            await self._wake.wait()
