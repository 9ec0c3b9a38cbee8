"""The messages that wait to be sent to one worker.

Owns their order, what a lost stream leaves unsent, and the heartbeat. Does not know what a message
does.
"""

from __future__ import annotations

import asyncio
from collections import deque

from core.ids import RunId
from core.ports import MessageStream
from core.session import ConnectPeers, RouterHeartbeat, Submit, ToWorker

HEARTBEAT_S = 0.5
MAX_OUTGOING = 4096
"""A worker that does not read must not fill this process's memory."""


class Outbox:
    """A queue that outlives the streams it is written to."""

    def __init__(self) -> None:
        """Start empty."""
        self._messages: deque[ToWorker] = deque()
        self._peers: dict[str, None] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def is_full(self) -> bool:
        """True if the worker does not read."""
        return len(self._messages) >= MAX_OUTGOING

    @property
    def queued_runs(self) -> set[RunId]:
        """Runs whose Submit is not sent, or perhaps half."""
        return {m.run_id for m in self._messages if isinstance(m, Submit)}

    def push(self, message: ToWorker) -> None:
        """Queue a message."""
        self._messages.append(message)
        self._wake.set()

    def connect(self, address: str) -> None:
        """Name a peer in the next ConnectPeers, which goes before every other message."""
        self._peers[address] = None
        self._wake.set()

    def withdraw(self, address: str) -> None:
        """Name a peer no more."""
        self._peers.pop(address, None)

    def clear(self) -> None:
        """Drop every message."""
        self._messages.clear()

    async def write(self, stream: MessageStream) -> None:
        """Send what is queued, and a heartbeat when there is nothing, until the stream fails.

        Raises:
            StreamClosed: The stream is lost; what it did not take stays queued.
        """
        while True:
            await self._flush(stream)
            self._wake.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                # Queued like any message: a slow stream then has one heartbeat waiting, not
                # several.
                self._messages.append(RouterHeartbeat())

    async def _flush(self, stream: MessageStream) -> None:
        while self._peers or self._messages:
            # Introductions first: a Submit may name a peer that the worker should know by then.
            if self._peers:
                addresses = tuple(self._peers)
                self._peers.clear()
                await stream.send(ConnectPeers(addresses))
            else:
                # Out of the queue only once it is sent: the next stream sends it again.
                await stream.send(self._messages[0])
                self._messages.popleft()
