"""Streams in memory, with latency and faults.

Owns delivery: order within a stream is kept, everything else may be delayed, cut, damaged or lost
with its stream. Does not know what the messages mean. Called by `simulation.cluster`.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from core.ports import StreamClosed, StreamHandler

WINDOW = 256


class SimStream:
    """One end of a stream."""

    def __init__(self, hub: Hub, node: str, kind: str) -> None:
        """Half of a pair; `hub.pair` joins the halves."""
        self.hub, self.node, self.kind = hub, node, kind
        self.peer: SimStream
        self._inbox: deque[Any] = deque()
        self._changed = asyncio.Event()
        self._is_closed = False
        self._last_arrival = 0.0
        self._num_unread = 0

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def send(self, message: Any) -> None:  # noqa: ANN401
        """See `MessageStream`."""
        while self.peer._num_unread >= WINDOW and not self._is_closed:
            await self.peer._changed.wait()
        if self._is_closed:
            raise StreamClosed("the stream is closed")
        message = self.hub.tamper(self, message)
        if message is None:
            return
        self.peer._num_unread += 1
        self._schedule(self.peer._deliver, message)

    def _schedule(self, call: Callable[..., None], *args: object) -> None:
        loop = asyncio.get_running_loop()
        arrival = max(loop.time() + self.hub.latency_s(), self._last_arrival)
        self._last_arrival = arrival
        loop.call_at(arrival, call, *args)

    def _deliver(self, message: Any) -> None:  # noqa: ANN401
        if not self._is_closed:
            self._inbox.append(message)
            self._notify()

    async def recv(self) -> Any:  # noqa: ANN401
        """See `MessageStream`."""
        while not self._inbox:
            if self._is_closed:
                raise StreamClosed("the stream is closed")
            await self._changed.wait()
        self._num_unread -= 1
        message = self._inbox.popleft()
        self._notify()
        return message

    async def close(self) -> None:
        """See `MessageStream`."""
        self._schedule(self.peer._end)
        self._end()

    def reset(self) -> None:
        """See `MessageStream`."""
        if self._is_closed:
            return
        self._inbox.clear()
        self._end()
        asyncio.get_running_loop().call_later(self.hub.latency_s(), self.peer._end)

    def _end(self) -> None:
        self._is_closed = True
        self.hub.streams.pop(self, None)
        self._notify()


class Hub:
    """The simulated wire between all nodes."""

    def __init__(self, rng: random.Random, latency_s: tuple[float, float]) -> None:
        """Start without nodes or faults."""
        self._rng, self._latency_s = rng, latency_s
        self._listeners: dict[str, tuple[str, str, StreamHandler]] = {}
        self._next_port = 0
        self.streams: dict[SimStream, None] = {}
        self.tasks: dict[str, dict[asyncio.Task[None], None]] = {}
        self.num_resets = 0
        self.tamper: Callable[[SimStream, Any], Any] = lambda stream, message: message

    def latency_s(self) -> float:
        """Draw a one-way delay."""
        return self._rng.uniform(*self._latency_s)

    def listen(self, node: str, kind: str, on_stream: StreamHandler) -> str:
        """Open a port on a node."""
        self._next_port += 1
        address = f"{node}:{self._next_port}"
        self._listeners[address] = (node, kind, on_stream)
        return address

    async def dial(self, node: str, address: str) -> SimStream:
        """Connect a node to an address."""
        await asyncio.sleep(self.latency_s())
        listener = self._listeners.get(address)
        if listener is None:
            raise StreamClosed(f"nobody listens at {address}")
        server_node, kind, on_stream = listener
        client, server = SimStream(self, node, kind), SimStream(self, server_node, kind)
        client.peer, server.peer = server, client
        self.streams[client] = self.streams[server] = None
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(_serve(on_stream, server))
        tasks = self.tasks.setdefault(server_node, {})
        tasks[task] = None
        task.add_done_callback(lambda done: tasks.pop(done, None))
        return client

    def reset(self, kind: str, node: str | None = None) -> int:
        """Cut live streams of a kind, all or those that touch a node.

        Returns:
            How many were cut, so that a test can see the fault bite.
        """
        hit = [s for s in list(self.streams) if s.kind == kind and node in (None, s.node, s.peer.node)]
        for stream in hit:
            stream.reset()
        self.num_resets += len(hit)
        return len(hit)

    def kill(self, node: str) -> None:
        """A node's process is gone: ports closed, streams reset, handlers cancelled."""
        for address in [a for a, (n, _, _) in self._listeners.items() if n == node]:
            del self._listeners[address]
        for stream in [s for s in list(self.streams) if s.node == node]:
            stream.reset()
        for task in list(self.tasks.pop(node, {})):
            task.cancel()


async def _serve(on_stream: StreamHandler, server: SimStream) -> None:
    await on_stream(server)


class SimNetwork:
    """The `Network` port of one node for one kind of stream."""

    def __init__(self, hub: Hub, node: str, kind: str) -> None:
        """Join a node to the hub."""
        self._hub, self._node, self._kind = hub, node, kind

    async def dial(self, address: str) -> SimStream:
        """See `Network`."""
        return await self._hub.dial(self._node, address)

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`."""
        return self._hub.listen(self._node, self._kind, on_stream)

    async def close(self) -> None:
        """See `Network`."""
        self._hub.kill(self._node)
