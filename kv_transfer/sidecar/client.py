"""The worker's end of one carrier process: its socket, the links and streams it reports.

Owns one process from its start to its death, and what both say to one another. Does not know torch,
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
from typing import Any

from core.ports import StreamClosed, StreamHandler
from kv_transfer.sidecar.protocol import (
    MAX_RECORD_BYTES,
    SLOTS,
    ControlMessage,
    MessageKind,
    arena_bytes,
)
from kv_transfer.sidecar.stream import NO_SLOT, Connection, SidecarStream, lose
from process.shared_memory import map_segment

DIAL_TIMEOUT_S = {"gloo": 0.7, "nccl": 3.0, "nixl": 3.0}
"""Longest wait for a stream, a new link included:
what is slow to begin is begun when workers meet."""
START_TIMEOUT_S = 30.0
SOCKET_BYTES = 1 << 20
log = logging.getLogger(__name__)
STDERR = 2
"""Where a carrier's libraries may write: standard output can be somebody's protocol."""


class SidecarClient:
    """One carrier process, from its start to its death."""

    def __init__(self, kind: str, slot_bytes: int) -> None:
        """Nothing runs yet."""
        self.kind, self.slot_bytes = kind, slot_bytes
        self.is_dead = False
        self.heartbeat_at = 0.0
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connections: dict[int, Connection] = {}
        self._dialled: dict[int, asyncio.Future[None]] = {}
        self._opening: dict[int, SidecarStream] = {}
        self._num_dialled = 0
        self.died = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._life_fd = -1
        self.on_stream: StreamHandler | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, listener: socket.socket, host: str) -> None:
        """Spawn the process; `ready` waits for it."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life_read, self._life_fd = os.pipe()
        fds = (theirs.fileno(), listener.fileno(), life_read)
        command = [
            sys.executable,
            "-m",
            "kv_transfer.sidecar.process",
            *map(str, fds),
            self.kind,
            host,
            str(self.slot_bytes),
        ]
        # A peer's death is said by us, once; a wait on NCCL must end at its timeout, in the process
        # that waits.
        environment = {
            **os.environ,
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCH_NCCL_BLOCKING_WAIT": "1",
        }
        if is_loopback(host):  # left alone they bind every interface
            environment |= {"NCCL_SOCKET_IFNAME": "lo", "UCX_NET_DEVICES": "lo"}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, stdout=STDERR
            )
        finally:
            theirs.close()
            os.close(life_read)
        mine.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            mine.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        self._socket = mine
        asyncio.get_running_loop().add_reader(mine, self._read)

    async def ready(self) -> None:
        """Wait until it listens.

        Raises:
            StreamClosed: It died, or was not up in time.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.shield(self._ready)  # others wait for it too
        except TimeoutError:
            raise StreamClosed(
                f"the {self.kind} carrier was not up within {START_TIMEOUT_S:g} s"
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
        self.tell(ControlMessage(MessageKind.DIAL, stream=number, text=address))
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
            if abandoned := self._opening.pop(number, None):
                abandoned.reset()

    def tell(self, record: ControlMessage) -> None:
        """Say something to the process; one that does not listen is killed."""
        if self._socket is None or self.is_dead:
            return
        try:
            self._socket.send(record.pack())
        except OSError:
            self.kill()

    def free(self, connection: int, slot: int) -> None:
        """An inbound slot was read; none: it had been emptied before."""
        if slot != NO_SLOT:
            self.tell(ControlMessage(MessageKind.FREE, connection, slot=slot))

    def _read(self) -> None:
        control = self._socket
        if control is None:
            return
        try:
            data, fds, _, _ = socket.recv_fds(control, MAX_RECORD_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self.kill()
            return
        self.heartbeat_at = asyncio.get_running_loop().time()
        try:
            self._obey(ControlMessage.unpack(data), fds)
        except Exception:
            # What it says makes no sense, or a bug of ours: the loop would log it and read on. The
            # next one begins with clean books, and transfers go another way meanwhile.
            log.exception("the %s carrier is ended: its record could not be obeyed", self.kind)
            self.kill()

    def _obey(self, record: ControlMessage, fds: list[int]) -> None:
        connection = self._connections.get(record.connection)
        stream = connection.streams.get(record.stream) if connection else None
        match record.what:
            case MessageKind.READY:
                self._ready.set_result(None)
            case MessageKind.LINKED:
                self._connections[record.connection] = self._new_connection(fds)
            case MessageKind.REFUSED:
                self._settle(record.stream, StreamClosed(record.text))
            case MessageKind.DIAL if connection:
                self._opening[record.stream] = self._new_stream(record, connection)
                if record.stream not in self._dialled:
                    self._opening.pop(record.stream).reset()  # whoever dialled has given up
            case MessageKind.OPENED:
                self._settle(record.stream, None)
            case MessageKind.ACCEPTED if connection and self.on_stream is not None:
                self._own(self._serve(self._new_stream(record, connection)))
            case MessageKind.SENT if connection:
                connection.free.put_nowait(record.slot)
            case MessageKind.RECEIVED:
                if stream is None:
                    self.free(record.connection, record.slot)  # its stream was cut
                else:
                    stream.arrive(record.slot, record.num_bytes, is_last=record.is_last)
            case MessageKind.CLOSE if stream:
                stream.end()
            case MessageKind.RESET if connection and stream:
                del connection.streams[record.stream]
                stream.cut()
            case MessageKind.LOST if connection:
                del self._connections[record.connection]
                lose(connection)

    def _new_connection(self, fds: list[int]) -> Connection:
        fd = fds[0]
        try:
            arena = map_segment(fd, arena_bytes(self.slot_bytes))
        finally:
            os.close(fd)
        free: asyncio.Queue[int] = asyncio.Queue()  # bounded by its slots
        for slot in range(SLOTS, 2 * SLOTS):
            free.put_nowait(slot)
        return Connection(arena, free)

    def _new_stream(self, record: ControlMessage, connection: Connection) -> SidecarStream:
        stream = connection.streams[record.stream] = SidecarStream(
            self, record.connection, connection, record.stream
        )
        return stream

    def _settle(self, number: int, error: StreamClosed | None) -> None:
        future, stream = self._dialled.get(number), self._opening.get(number)
        if future is None or future.done():
            return
        if stream is not None and error is None:
            future.set_result(None)
        else:
            future.set_exception(error or StreamClosed("the stream was lost while it was opened"))

    async def _serve(self, stream: SidecarStream) -> None:
        try:
            if self.on_stream is not None:
                await self.on_stream(stream)
        finally:
            await stream.close()
            stream.leave()

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def kill(self) -> None:
        """End the process and everything it carried."""
        if self.is_dead:
            return
        self.is_dead = True
        self.died.set()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            os.close(self._life_fd)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if not self._ready.done():
            self._ready.set_exception(
                StreamClosed(f"the {self.kind} carrier died while it started")
            )
            self._ready.exception()  # nobody need be waiting
        for number in list(self._dialled):
            self._settle(number, StreamClosed(f"the {self.kind} carrier died"))
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
