"""Streams in memory, with latency and faults.

Owns delivery between nodes: order within a stream, one-way delays, partitions (what is sent waits,
as TCP sends again, and arrives late), cuts, and the hooks by which a test or a fault schedule
loses, repeats, swaps or damages messages. Does not know what the messages mean.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from core.ports import StreamClosed, StreamHandler
from simulation.loop import NODE
from transport.sequenced import Numbered

WINDOW = 256
"""Unread messages of a stream, after which its sender waits, as with TCP's window."""
MAX_TOO_LARGE = 10
"""A sender that repeats what breaks its stream does so for ever; a trial has seen enough then."""
TICK_S = 1e-9


class SimStream:
    """One end of a stream."""

    transport = "sim"

    def __init__(self, hub: Hub, node: str, kind: str) -> None:
        """Half of a pair; `Hub.dial` joins the halves."""
        self.hub = hub
        self.node = node
        self.kind = kind
        self.peer: SimStream
        self.last_arrival = 0.0
        self._inbox: deque[Any] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._is_closed = False
        self._num_unread = 0

    def _notify(self) -> None:
        # Several may wait for one change, reader and senders. Futures, for it happens with every
        # message, and an event would be made anew each time.
        waiters = self._waiters
        self._waiters = []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def send(self, message: Any) -> None:  # noqa: ANN401
        """See `MessageStream`."""
        while self.peer._num_unread >= self.hub.window and not self._is_closed:
            await self.peer._changed()
        if self._is_closed:
            raise StreamClosed("the stream is closed")
        if self.hub.is_too_large(self, message):
            self.reset()
            raise StreamClosed("RESOURCE_EXHAUSTED: the message is over the limit")
        for one in self.hub.pass_on(self, message):
            # Counted when sent: what is on the wire fills the window, too.
            self.peer._num_unread += 1
            self.hub.carry(self, self.peer._deliver, one)

    def _deliver(self, message: Any) -> None:  # noqa: ANN401
        if not self._is_closed:
            self._inbox.append(message)
            self._notify()

    async def recv(self) -> Any:  # noqa: ANN401
        """See `MessageStream`."""
        while not self._inbox:
            if self._is_closed:
                raise StreamClosed("the stream is closed")
            await self._changed()
        self._num_unread -= 1
        message = self._inbox.popleft()
        self._notify()
        if isinstance(message, Exception):  # a fault in the reader's own code, put where it reads
            raise message
        return message

    async def close(self) -> None:
        """See `MessageStream`."""
        self.hub.carry(self, self.peer._end)
        self._end()

    def reset(self) -> None:
        """See `MessageStream`."""
        if self._is_closed:
            return
        # Unlike `close`: what was not read is lost on both ends.
        self._inbox.clear()
        self._end()
        self.hub.carry(self, self.peer._end)

    def _end(self) -> None:
        self._is_closed = True
        self.hub.streams.pop(self, None)
        self._notify()


class Hub:
    """The simulated wire between all nodes."""

    def __init__(
        self,
        rng: random.Random,
        latency_s: tuple[float, float],
        max_message_bytes: int | None = None,
        size_of: Callable[[Any], int] = len,
    ) -> None:
        """Start without nodes or faults.

        Args:
            rng: Draws latencies.
            latency_s: Shortest and longest, one way.
            max_message_bytes: Of a session's message; a larger one breaks its stream, as gRPC's
                limit does. None: no limit.
            size_of: Estimates a session's message.
        """
        self._rng = rng
        self._latency_s = latency_s
        self._listeners: dict[str, tuple[str, str, StreamHandler, contextvars.Context]] = {}
        self._next_port = 0
        self._blocked: dict[tuple[str, str], int] = {}
        self._stalled: dict[
            tuple[str, str], list[tuple[SimStream, Callable[..., None], tuple[Any, ...]]]
        ] = {}
        self._resent = asyncio.Event()
        # No node's context: a message on the wire arrives although its sender was killed.
        self._wire = contextvars.copy_context()
        # Dictionaries for sets: their order is that of insertion, and not of addresses.
        self.streams: dict[SimStream, None] = {}
        self.tasks: dict[str, dict[asyncio.Task[None], None]] = {}
        self.window = WINDOW
        self.num_resets = 0
        self.max_message_bytes = max_message_bytes
        self._size_of = size_of
        self.too_large: list[str] = []
        self.tamper: Callable[[SimStream, Any], Any] = _unchanged
        """A scenario's hook: sees each message without its number; None loses it."""
        self.mangle: Callable[[SimStream, Any], list[Any]] = _alone
        """The fault schedule's hook: sees each message as it is on the wire."""
        self.extra_delay_s: Callable[[SimStream], float] = _no_delay

    def latency_s(self) -> float:
        """Draw a one-way delay."""
        return self._rng.uniform(*self._latency_s)

    def pass_on(self, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
        """Apply the hooks to one message."""
        if self.tamper is _unchanged:
            return self.mangle(stream, message)
        if isinstance(message, Numbered):
            inner = self.tamper(stream, message.message)
            message = None if inner is None else Numbered(message.number, inner)
        else:
            message = self.tamper(stream, message)
        return [] if message is None else self.mangle(stream, message)

    def is_too_large(self, stream: SimStream, message: Any) -> bool:  # noqa: ANN401
        """Compare a session's message with the limit."""
        limit = self.max_message_bytes
        if limit is None or stream.kind != "session" or len(self.too_large) >= MAX_TOO_LARGE:
            return False
        size = self._size_of(message)
        if size > limit:
            fact = f"{stream.node} sent a message of {size} bytes, the limit is {limit}"
            self.too_large.append(fact)
        return size > limit

    def carry(
        self,
        stream: SimStream,
        call: Callable[..., None],
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Deliver to the other side of a stream, in order, now or when the route is free."""
        route = (stream.node, stream.peer.node)
        if route in self._blocked:
            self._stalled.setdefault(route, []).append((stream, call, args))
            return
        loop = asyncio.get_running_loop()
        # A heap does not keep the order of equal times, so times must differ.
        at = max(
            loop.time() + self.latency_s() + self.extra_delay_s(stream),
            stream.last_arrival + TICK_S,
        )
        stream.last_arrival = at
        loop.call_at(at, call, *args, context=self._wire)

    # --- faults -----------------------------------------------------------------------------------

    def block(self, source: str, target: str) -> None:
        """Let nothing through in one direction until `unblock`; blocks of several faults add up."""
        self._blocked[source, target] = self._blocked.get((source, target), 0) + 1

    def unblock(self, source: str, target: str) -> int:
        """Take one block away; with the last one, what waited is delivered.

        Returns:
            How many messages had been waiting, so that the fault is seen to bite.
        """
        route = (source, target)
        left = self._blocked.get(route, 1) - 1
        if left:
            self._blocked[route] = left
            return len(self._stalled.get(route, []))
        self._blocked.pop(route, None)
        stalled = self._stalled.pop(route, [])
        # With fresh latencies but in order: as TCP sends again what was lost.
        for stream, call, args in stalled:
            self.carry(stream, call, *args)
        self._resent.set()
        self._resent = asyncio.Event()
        return len(stalled)

    def reset(self, kind: str, node: str | None = None) -> int:
        """Cut live streams of a kind, all or those that touch a node.

        Returns:
            How many were cut, so that a test can see the fault bite.
        """
        hit = [
            s for s in list(self.streams) if s.kind == kind and node in (None, s.node, s.peer.node)
        ]
        for stream in hit:
            stream.reset()
        self.num_resets += len(hit)
        return len(hit)

    # --- nodes ------------------------------------------------------------------------------------

    def listen(self, node: str, kind: str, on_stream: StreamHandler) -> str:
        """Open a port on a node; its handlers run as that node."""
        self._next_port += 1
        address = f"{node}:{self._next_port}"
        self._listeners[address] = (node, kind, on_stream, contextvars.copy_context())
        return address

    async def dial(self, node: str, address: str) -> SimStream:
        """Connect a node to an address."""
        await asyncio.sleep(self.latency_s())
        target = address.partition(":")[0]
        # A handshake needs both directions.
        while (node, target) in self._blocked or (target, node) in self._blocked:
            await self._resent.wait()
        listener = self._listeners.get(address)
        if listener is None:
            raise StreamClosed(f"nobody listens at {address}")
        # The handler runs as the node that listens, so it stops when that node does.
        server_node, kind, on_stream, context = listener
        client, server = SimStream(self, node, kind), SimStream(self, server_node, kind)
        client.peer, server.peer = server, client
        self.streams[client] = self.streams[server] = None
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(
            _serve(on_stream, server), context=context.copy()
        )
        tasks = self.tasks.setdefault(server_node, {})
        tasks[task] = None
        task.add_done_callback(lambda done: tasks.pop(done, None), context=self._wire)
        return client

    def close(self, node: str) -> None:
        """A node closes its ports and ends its streams and handlers in good order."""
        self._close_ports(node)
        for task in list(self.tasks.pop(node, {})):
            task.cancel()

    def crash(self, node: str) -> None:
        """A node's process is gone: ports closed, streams reset by its kernel."""
        self._close_ports(node)
        self.tasks.pop(node, None)

    def _close_ports(self, node: str) -> None:
        for address in [a for a, listener in self._listeners.items() if listener[0] == node]:
            del self._listeners[address]
        for stream in [s for s in list(self.streams) if s.node == node]:
            stream.reset()


def _unchanged(stream: SimStream, message: Any) -> Any:  # noqa: ANN401
    del stream
    return message


def _alone(stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
    del stream
    return [message]


def _no_delay(stream: SimStream) -> float:
    del stream
    return 0.0


async def _serve(on_stream: StreamHandler, server: SimStream) -> None:
    """Run a handler; when it returns or fails its stream ends, as gRPC has it."""
    try:
        await on_stream(server)
    finally:
        server.reset()


class SimNetwork:
    """The `Network` port of one node for one kind of stream."""

    def __init__(self, hub: Hub, node: str, kind: str) -> None:
        """Join a node to the hub."""
        self._hub = hub
        self._node = node
        self._kind = kind
        self.max_message_bytes = hub.max_message_bytes if kind == "session" else None

    async def dial(self, address: str) -> SimStream:
        """See `Network`."""
        return await self._hub.dial(self._node, address)

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`."""
        return self._hub.listen(self._node, self._kind, on_stream)

    async def close(self) -> None:
        """See `Network`."""
        self._hub.close(self._node)


def on_node(node: str) -> contextvars.Context:
    """Make a context whose tasks and timers belong to a node."""
    context = contextvars.copy_context()
    context.run(NODE.set, node)
    return context
