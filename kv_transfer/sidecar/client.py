"""The worker's end of one sidecar process: its socket, and the connections and streams it reports.

Owns one process from its start to its death, and what both send each other. Does not know torch,
transfers or what messages mean.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from core.ports import StreamClosed, StreamHandler
from kv_transfer.sidecar.protocol import (
    MAX_CONTROL_BYTES,
    SLOTS,
    ControlMessage,
    MessageKind,
    arena_bytes,
)
from kv_transfer.sidecar.stream import NO_SLOT, SidecarConnection, SidecarStream, lose
from process.shared_memory import map_segment

DIAL_TIMEOUT_S = {"gloo": 0.7, "nccl": 3.0, "nixl": 3.0}
"""Longest wait for a stream, a new connection included: short, since another transport is tried
then. What is slow to connect has its time when workers are introduced, ahead of any request."""
START_TIMEOUT_S = 30.0
SOCKET_BYTES = 1 << 20
"""Room for some thousand control messages: whoever does not read so many has stopped."""
log = logging.getLogger(__name__)
STDERR = 2
"""Where a sidecar's libraries may write: standard output can be somebody's protocol."""


@dataclass(frozen=True, slots=True)
class _Started:
    """A process that was just spawned."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    """Not blocking; one message a datagram."""
    parent_death_fd: int
    """The process ends when this is closed, at the latest with the worker."""


class SidecarClient:
    """One sidecar process, from its start to its death."""

    def __init__(
        self,
        kind: str,
        slot_bytes: int,
        listener: socket.socket,
        host: str,
        on_stream: StreamHandler,
    ) -> None:
        """Spawn the process; `ready` waits for it.

        Args:
            kind: Of pairs.
            slot_bytes: The most that goes in one piece, with its head.
            listener: Where peers request pairs; the process inherits it.
            host: This worker's address.
            on_stream: Serves streams that peers open.

        Raises:
            OSError: No process or descriptors were to be had.
        """
        self.kind = kind
        self.slot_bytes = slot_bytes
        self.is_dead = False
        self.died = asyncio.Event()
        self.heartbeat_at = 0.0
        self._on_stream = on_stream
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connections: dict[int, SidecarConnection] = {}
        self._dialled: dict[int, asyncio.Future[None]] = {}
        self._opening: dict[int, SidecarStream] = {}
        self._num_dialled = 0
        self._tasks: set[asyncio.Task[None]] = set()
        started = _spawn(kind, slot_bytes, listener, host)
        self._process = started.process
        self._socket = started.control
        self._parent_death_fd = started.parent_death_fd
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    async def ready(self) -> None:
        """Wait until it listens.

        Raises:
            StreamClosed: It died, or was not up in time.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                # Shielded: several wait for one future, and a timeout would cancel it for all.
                await asyncio.shield(self._ready)
        except TimeoutError:
            raise StreamClosed(
                f"the {self.kind} sidecar was not up within {START_TIMEOUT_S:g} s"
            ) from None

    @property
    def is_ready(self) -> bool:
        """True while it can be asked for streams."""
        return not self.is_dead and self._ready.done()

    async def dial(self, address: str) -> SidecarStream:
        """Open a stream to a peer's address.

        Raises:
            StreamClosed: It cannot be reached in time; another transport is then tried within a
                second.
        """
        self._num_dialled += 1
        number = self._num_dialled
        future = self._dialled[number] = asyncio.get_running_loop().create_future()
        self.send(ControlMessage(MessageKind.DIAL, stream=number, text=address))
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S[self.kind]):
                await future
            return self._opening.pop(number)
        except TimeoutError:
            raise StreamClosed(
                f"{address} did not answer within {DIAL_TIMEOUT_S[self.kind]:g} s"
            ) from None
        finally:
            del self._dialled[number]
            # Opened too late, or the caller was cancelled: the peer must not serve a stream that
            # nobody reads.
            if abandoned := self._opening.pop(number, None):
                abandoned.reset()

    def send(self, message: ControlMessage) -> None:
        """Send to the process; one that does not read is killed."""
        if self.is_dead:
            return
        try:
            self._socket.send(message.pack())
        except OSError:
            # Also EAGAIN: its buffer is full, so it has read nothing for thousands of messages.
            self.kill()

    def free(self, connection: int, slot: int) -> None:
        """Report an inbound slot as read; `NO_SLOT`: it was emptied before."""
        if slot != NO_SLOT:
            self.send(ControlMessage(MessageKind.FREE, connection, slot=slot))

    def _read(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MAX_CONTROL_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self.kill()
            return
        # Any message shows that it lives.
        self.heartbeat_at = asyncio.get_running_loop().time()
        try:
            self._dispatch(ControlMessage.unpack(data), fds)
        except Exception:
            # Its message makes no sense, or a bug of ours: the loop would log it and read on. The
            # next process begins with clean books, and transfers take another transport meanwhile.
            log.exception("the %s sidecar is ended: its message could not be understood", self.kind)
            self.kill()

    def _dispatch(self, message: ControlMessage, fds: list[int]) -> None:
        connection = self._connections.get(message.connection)
        stream = connection.streams.get(message.stream) if connection else None
        match message.kind:
            case MessageKind.READY:
                self._ready.set_result(None)
            case MessageKind.CONNECTED:
                self._connections[message.connection] = self._new_connection(fds)
            case MessageKind.REFUSED:
                self._settle(message.stream, StreamClosed(message.text))
            case MessageKind.DIAL if connection:
                self._opening[message.stream] = self._new_stream(message, connection)
                if message.stream not in self._dialled:
                    self._opening.pop(message.stream).reset()  # whoever dialled has given up
            case MessageKind.OPENED:
                self._settle(message.stream, None)
            case MessageKind.ACCEPTED if connection:
                self._own(self._serve(self._new_stream(message, connection)))
            case MessageKind.SENT if connection:
                connection.free.put_nowait(message.slot)
            case MessageKind.RECEIVED:
                if stream is None:
                    self.free(message.connection, message.slot)  # its stream was cut
                else:
                    stream.arrive(message.slot, message.num_bytes, is_last=message.is_last)
            case MessageKind.CLOSE if stream:
                stream.end()
            case MessageKind.RESET if connection and stream:
                del connection.streams[message.stream]
                stream.cut()
            case MessageKind.LOST if connection:
                del self._connections[message.connection]
                lose(connection)

    def _new_connection(self, fds: list[int]) -> SidecarConnection:
        fd = fds[0]
        try:
            arena = map_segment(fd, arena_bytes(self.slot_bytes))
        finally:
            os.close(fd)  # the mapping keeps the memory
        # Outbound slots are the worker's to fill; inbound ones are the sidecar's from the start.
        free: asyncio.Queue[int] = asyncio.Queue()  # bounded by its slots
        for slot in range(SLOTS, 2 * SLOTS):
            free.put_nowait(slot)
        return SidecarConnection(arena, free)

    def _new_stream(self, message: ControlMessage, connection: SidecarConnection) -> SidecarStream:
        stream = SidecarStream(self, message.connection, connection, message.stream)
        connection.streams[message.stream] = stream
        return stream

    def _settle(self, number: int, error: StreamClosed | None) -> None:
        # Whoever dialled may have given up, and a sidecar that dies settles every dial.
        future, stream = self._dialled.get(number), self._opening.get(number)
        if future is None or future.done():
            return
        if stream is not None and error is None:
            future.set_result(None)
        else:
            future.set_exception(error or StreamClosed("the stream was lost while it was opened"))

    async def _serve(self, stream: SidecarStream) -> None:
        try:
            await self._on_stream(stream)
        finally:
            # As a gRPC handler's return ends its stream.
            await stream.close()
            stream.leave()

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def kill(self) -> None:
        """End the process, and with it its connections and their streams."""
        if self.is_dead:
            return
        # First: closing the streams below may call `send`.
        self.is_dead = True
        self.died.set()
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        os.close(self._parent_death_fd)
        self._process.kill()
        self._process.wait()  # SIGKILL: it takes no time, and leaves no zombie
        if not self._ready.done():
            self._ready.set_exception(
                StreamClosed(f"the {self.kind} sidecar died while it started")
            )
            self._ready.exception()  # nobody need be waiting
        for number in list(self._dialled):
            self._settle(number, StreamClosed(f"the {self.kind} sidecar died"))
        for connection in self._connections.values():
            lose(connection)
        self._connections.clear()

    async def close(self) -> None:
        """Kill it, and end the handlers of accepted streams."""
        self.kill()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def is_loopback(host: str) -> bool:
    """True if an address is this host's alone."""
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback


def _spawn(kind: str, slot_bytes: int, listener: socket.socket, host: str) -> _Started:
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent_death_read, parent_death_fd = os.pipe()
    fds = (theirs.fileno(), listener.fileno(), parent_death_read)
    module = "kv_transfer.sidecar.process"
    command = [sys.executable, "-m", module, *map(str, fds), kind, host, str(slot_bytes)]
    # A peer's death is logged here, once. A wait on NCCL must end at its timeout, in the process
    # that waits.
    environment = {
        **os.environ,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
    }
    if is_loopback(host):  # left alone, these libraries bind every interface
        environment |= {"NCCL_SOCKET_IFNAME": "lo", "UCX_NET_DEVICES": "lo"}
    try:
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, stdout=STDERR
        )
    except BaseException:
        control.close()
        os.close(parent_death_fd)
        raise
    finally:
        theirs.close()
        os.close(parent_death_read)
    # Never block the loop: a message that does not fit at once means a process that stands still.
    control.setblocking(False)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        control.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
    return _Started(process, control, parent_death_fd)
