"""The stream of one outgoing transfer: moves what its `Sender` decides.

Owns the two tasks of the stream, the wait for a frame to fill, and heartbeats while there is
nothing to send. Does not know why anything is sent.
"""

from __future__ import annotations

import asyncio
import contextlib

from core.config import TransferConfig
from core.kv_layout import KVLayout
from core.ports import KVBytes, MappedStream, MessageStream, StreamClosed
from kv_transfer import frames
from kv_transfer.failures import failure_of
from kv_transfer.fetch_stream import HEARTBEAT_S, FetchStream
from kv_transfer.sender import Offer, Sender, SenderCallbacks
from kv_transfer.transitions import Note

COALESCE_S = 0.002
"""Shorter than a layer of a long chunk, so that it adds little to the hand-over; long enough for
the layers of a short one to share a frame, whose cost is per message."""


class SendStream:
    """A sender, and the one stream over which its receiver fetches."""

    def __init__(
        self,
        offer: Offer,
        callbacks: SenderCallbacks,
        kv: KVBytes,
        layout: KVLayout,
        config: TransferConfig,
        note: Note,
    ) -> None:
        """Offer the transfer; `serve` follows when its receiver opens a stream."""
        self._wake = asyncio.Event()
        self._silence_s = config.lease_s
        self.has_stream = False
        """True once a receiver has opened its stream: it opens one, and nobody else may."""
        self.sender = Sender(
            offer,
            callbacks,
            kv,
            layout,
            config.frame_bytes,
            note,
            self._wake.set,
            asyncio.get_running_loop().time(),
        )

    async def serve(self, stream: MessageStream, opened: frames.Open) -> None:
        """Carry the one stream, whose number 0 was `opened`, to its end; raises nothing."""
        self.has_stream = True
        fetch = FetchStream(stream, self._silence_s, num_received=1)
        try:
            mapped_pool = stream.pool_name if isinstance(stream, MappedStream) else None
            self.sender.open(opened, mapped_pool)
        except Exception as error:  # noqa: BLE001 - whatever broke here fails this transfer, logged
            self.sender.refuse(failure_of(error, "the handshake with the decode worker"))
            # A peer that reads nothing must not keep this task for ever.
            with contextlib.suppress(StreamClosed, TimeoutError):
                async with asyncio.timeout(self._silence_s):
                    await self._write(fetch)
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(fetch))
                # The writer sees the end of a transfer and closes the stream; a reader would wait
                # for the peer to close it, too.
                await self._write(fetch)
                reader.cancel()
        except Exception as error:  # noqa: BLE001 - whatever broke here fails this transfer, logged
            self.sender.lose(failure_of(error, "the decode worker's fetch stream", self._silence_s))
            fetch.reset()
        finally:
            self.sender.close()

    async def _read(self, fetch: FetchStream) -> None:
        while not self.sender.is_closed:
            message = await fetch.recv()
            self.sender.receive(message, asyncio.get_running_loop().time())

    async def _write(self, fetch: FetchStream) -> None:
        sender = self.sender
        while True:
            # Before any frame: a Restart must come before the first frame of its sub-attempt.
            while (control := sender.take_control()) is not None:
                await fetch.send(control)
            if sender.is_closed:
                await fetch.close()
                return
            if sender.has_fragments:
                await self._coalesce()
                if sender.has_control or sender.is_closed:
                    continue
            message = sender.take_kv()
            if message is not None:
                await fetch.send(message)
                continue
            # Nothing was awaited since the sender was found idle, so no wake-up is lost here.
            self._wake.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                await fetch.send(frames.Heartbeat())

    async def _coalesce(self) -> None:
        """Wait a moment for more fragments, unless waiting would gain nothing."""
        if self.sender.is_frame_due:
            return
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COALESCE_S):
                while not self.sender.is_frame_due:
                    await self._wake.wait()
                    self._wake.clear()
