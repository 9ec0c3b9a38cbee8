"""The in-process transport: a sender and a receiver in one process, joined by queues.

Owns bounded queues in both directions. Does not know messages.
"""

from __future__ import annotations

import asyncio
from typing import Any

from core.ports import StreamClosed, StreamHandler

WINDOW = 64
_END = object()


class _QueueStream:
    """One end of a pair."""

    transport = "inproc"

    def __init__(self, inbox: asyncio.Queue[Any], outbox: asyncio.Queue[Any]) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._is_closed = False
        self.peer: _QueueStream

    async def send(self, message: Any) -> None:  # noqa: ANN401
        if self._is_closed or self.peer._is_closed:  # noqa: SLF001 - its other half
            raise StreamClosed("the stream is closed")
        await self._outbox.put(message)

    async def recv(self) -> Any:  # noqa: ANN401
        if self._is_closed:
            raise StreamClosed("the stream is closed")
        message = await self._inbox.get()
        if message is _END:
            self._is_closed = True
            raise StreamClosed("the peer closed the stream")
        return message

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            await self._outbox.put(_END)

    def reset(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            for queue in (self._inbox, self._outbox):
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(_END)


class InProcessNetwork:
    """The `Network` port within one loop; `directory` is shared by the workers that may meet."""

    def __init__(self, directory: dict[str, StreamHandler]) -> None:
        """Join a directory."""
        self._directory = directory
        self._address = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def dial(self, address: str) -> _QueueStream:
        """See `Network`."""
        handler = self._directory.get(address)
        if handler is None:
            raise StreamClosed(f"nobody listens at {address}")
        up: asyncio.Queue[Any] = asyncio.Queue(WINDOW)
        down: asyncio.Queue[Any] = asyncio.Queue(WINDOW)
        client, server = _QueueStream(down, up), _QueueStream(up, down)
        client.peer, server.peer = server, client
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(_serve(handler, server))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return client

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`."""
        self._address = f"inproc-{len(self._directory)}"
        self._directory[self._address] = on_stream
        return self._address

    async def close(self) -> None:
        """See `Network`."""
        self._directory.pop(self._address, None)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _serve(handler: StreamHandler, server: _QueueStream) -> None:
    await handler(server)
