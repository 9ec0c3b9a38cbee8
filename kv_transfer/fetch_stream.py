"""One Fetch stream as messages: numbered on their way out, checked on their way in.

Owns the numbers of both directions and how long a peer may be silent. Does not know what the
messages mean, or which end of a transfer this is.
"""

from __future__ import annotations

import asyncio
import itertools

from core.ports import MessageStream
from kv_transfer import codec
from kv_transfer.frames import Message
from transport.sequenced import Arrivals

HEARTBEAT_S = 0.5
"""Several fit into the shortest lease (1 s), so that one late heartbeat ends no transfer."""


class FetchStream:
    """A `MessageStream` of bytes, spoken in `frames.Message`."""

    def __init__(self, stream: MessageStream, silence_s: float, num_received: int = 0) -> None:
        """Wrap a stream of which the first `num_received` messages were read already.

        Args:
            stream: Carries bytes.
            silence_s: A peer that sends nothing for so long is given up.
            num_received: The accepting end reads Open before it knows whose stream it is.
        """
        self._stream = stream
        self._silence_s = silence_s
        self._numbers = itertools.count()
        self._arrivals = Arrivals(first=num_received)

    async def send(self, message: Message) -> None:
        """Send the next message; one task sends, so that numbers leave in order.

        Raises:
            KVTransferError: No transport carries a message as long.
            StreamClosed: The peer is gone.
        """
        await self._stream.send(codec.encode(next(self._numbers), message))

    async def recv(self) -> Message:
        """Receive the next message that is no repeat.

        Raises:
            KVTransferError: It is damaged or malformed.
            StreamClosed: The stream ended, or a message before this one is missing.
            TimeoutError: The peer was silent for too long.
        """
        while True:
            # Heartbeats come when nothing else does: who is silent is gone, however long a step
            # takes.
            async with asyncio.timeout(self._silence_s):
                data = await self._stream.recv()
            number, message = codec.decode(data)
            if self._arrivals.is_new(number):
                return message

    async def close(self) -> None:
        """Send nothing more; what was sent still arrives."""
        await self._stream.close()

    def reset(self) -> None:
        """Cut the stream, in both directions and at once."""
        self._stream.reset()
