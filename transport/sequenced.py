"""Messages of a stream, numbered, so that lost, repeated or swapped ones show at once.

Owns the rule: a repeat is dropped, a gap ends the stream, and its user reconnects and asks for what
is missing. Transports promise order, but a bug or a proxy may break the promise; otherwise a lost
Submit or Cancel would show only at a deadline. Does not know what messages mean.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from core.ports import MessageStream, StreamClosed


@dataclass(frozen=True, slots=True)
class Numbered:
    """A message and its place in its stream, from 0."""

    number: int
    message: Any


class Arrivals:
    """The numbers of one direction of a stream."""

    def __init__(self, first: int = 0) -> None:
        """Expect number `first`."""
        self._next = first
        self.num_repeats = 0

    def is_new(self, number: int) -> bool:
        """Return True for the expected number, False for a repeat, which is to be dropped.

        Raises:
            StreamClosed: A message before it is missing.
        """
        if number < self._next:
            self.num_repeats += 1
            return False
        # Going on would hide a lost Submit or Cancel; the reconnect's Hello makes up for either.
        if number > self._next:
            raise StreamClosed(f"message {self._next} of the stream is missing, {number} came")
        self._next += 1
        return True


class NumberedStream:
    """A `MessageStream` that numbers what it sends and checks what it receives."""

    def __init__(self, inner: MessageStream) -> None:
        """Begin both directions at 0."""
        self._inner = inner
        self._arrivals = Arrivals()
        self._num_sent = 0
        self.transport = inner.transport
        self._turn = asyncio.Lock()

    async def send(self, message: Any) -> None:  # noqa: ANN401
        """Send the next number; concurrent senders take turns, so that numbers stay in order."""
        # Numbered inside the turn: a sender that waits must not hold a number that is due.
        async with self._turn:
            number = self._num_sent
            self._num_sent += 1
            await self._inner.send(Numbered(number, message))

    async def recv(self) -> Any:  # noqa: ANN401
        """Receive the next message that is no repeat."""
        while True:
            numbered = await self._inner.recv()
            if self._arrivals.is_new(numbered.number):
                return numbered.message

    async def close(self) -> None:
        """Close the inner stream."""
        await self._inner.close()

    def reset(self) -> None:
        """Reset the inner stream."""
        self._inner.reset()
