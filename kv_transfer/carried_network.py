"""Transports that torch.distributed carries: the worker's end of its carrier process.

Owns the carrier's life (start, pulse, kill, start again), the streams it carries and the slots they
wait for. Does not know torch, transfers or what messages mean. Called by `kv_transfer.transports`.

    worker ── record, slot ──▶ carrier ══ two-member group ══ carrier ── record, slot ──▶ worker
           one socket each, and one arena of slots a link, in shared memory

The listening socket is the worker's, so its address stays when the carrier is killed; until the next one
is up, streams end, dialling fails, and transfers go another way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.ports import MessageStream, StreamClosed, StreamHandler
from core.segments import map_segment
from kv_transfer.carrier_wire import (
    MAX_RECORD_BYTES,
    PIECE_HEAD_BYTES,
    SLOTS,
    Record,
    What,
    arena_bytes,
    slot_of,
)

DIAL_TIMEOUT_S = {"gloo": 0.7, "nccl": 3.0, "nixl": 3.0}
"""Longest wait for a stream, a new link included: what is slow to begin is begun when workers meet."""
SEND_TIMEOUT_S = 5.0
STILL_S = 2.0
"""A carrier that shows no pulse for so long is killed."""
WATCH_S = 0.5
START_TIMEOUT_S = 30.0
RESTART_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
BACKLOG = 128
SOCKET_BYTES = 1 << 20
NO_SLOT = -1
STDERR = 2
"""Where a carrier's libraries may write: standard output can be somebody's protocol."""
UNREAD_SLOTS = 2
"""Slots that one stream may keep full; what comes beyond is copied out."""
MAX_UNREAD_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of a message, and the slot it lies in."""

    slot: int
    data: memoryview
    is_last: bool


@dataclass(slots=True)
class _Link:
    """A link as the worker sees it."""

    arena: memoryview
    free: asyncio.Queue[int]
    streams: dict[int, CarriedStream] = field(default_factory=dict)
    is_lost: bool = False


class CarriedStream:
    """One end of a transfer's stream. A received message is valid until the next `recv`."""

    def __init__(self, carrier: CarrierClient, link_number: int, link: _Link, number: int) -> None:
        """Made by `CarrierClient`."""
        self.transport = carrier.kind
        self._carrier, self._link_number, self._link, self._number = carrier, link_number, link, number
        self._inbox: asyncio.Queue[_Piece | None] = asyncio.Queue()  # bounded by MAX_UNREAD_BYTES
        self._num_unread_bytes = 0
        self._in_hand = NO_SLOT
        self._is_over = False
        self._has_closed = False

    async def send(self, message: bytes) -> None:
        """See `MessageStream`."""
        view, link = memoryview(message), self._link
        room = self._carrier.slot_bytes - PIECE_HEAD_BYTES
        for at in range(0, max(1, len(view)), room):
            piece = view[at : at + room]
            slot = await self._free_slot()
            slot_of(link.arena, slot, self._carrier.slot_bytes)[PIECE_HEAD_BYTES : PIECE_HEAD_BYTES + len(piece)] = (
                piece
            )
            is_last = at + room >= len(view)
            self._carrier.tell(Record(What.SEND, self._link_number, self._number, slot, len(piece), is_last))

    async def _free_slot(self) -> int:
        if self._is_over or self._has_closed:
            raise StreamClosed("the stream is closed")
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                slot = await self._link.free.get()
        except TimeoutError:
            self.reset()
            raise StreamClosed(f"the peer took nothing for {SEND_TIMEOUT_S:g} s") from None
        if self._is_over or slot == NO_SLOT:
            self._link.free.put_nowait(slot)
            raise StreamClosed("the stream was cut")
        return slot

    async def recv(self) -> memoryview:
        """See `MessageStream`."""
        self._let_go()
        piece = await self._next_piece()
        if piece.is_last:
            self._in_hand = piece.slot
            return piece.data
        return await self._join(piece)

    async def _join(self, piece: _Piece) -> memoryview:
        """Put a message together that is longer than a slot."""
        whole = bytearray(piece.data)
        while not piece.is_last:
            self._carrier.free(self._link_number, piece.slot)
            piece = await self._next_piece()
            whole += piece.data
        self._carrier.free(self._link_number, piece.slot)
        return memoryview(whole)

    async def _next_piece(self) -> _Piece:
        piece = None if self._is_over and self._inbox.empty() else await self._inbox.get()
        if piece is None:
            self._is_over = True
            raise StreamClosed("the peer closed the stream")
        self._num_unread_bytes -= len(piece.data)
        return piece

    def _let_go(self) -> None:
        self._carrier.free(self._link_number, self._in_hand)
        self._in_hand = NO_SLOT

    def arrive(self, slot: int, num_bytes: int, *, is_last: bool) -> None:
        """A piece of a message is in a slot. Whoever is slow to read must not keep the slots of others."""
        data = slot_of(self._link.arena, slot, self._carrier.slot_bytes)
        data = data[PIECE_HEAD_BYTES : PIECE_HEAD_BYTES + num_bytes].toreadonly()
        self._num_unread_bytes += num_bytes
        if self._num_unread_bytes > MAX_UNREAD_BYTES:
            self._carrier.free(self._link_number, slot)
            self.reset()
            return
        if self._inbox.qsize() >= UNREAD_SLOTS:
            data = memoryview(bytes(data))
            self._carrier.free(self._link_number, slot)
            slot = NO_SLOT
        self._inbox.put_nowait(_Piece(slot, data, is_last))

    def end(self) -> None:
        """Nothing more comes."""
        self._inbox.put_nowait(None)

    def cut(self) -> None:
        """Forget what was not read: the stream is over for both directions."""
        self._is_over = True
        self._let_go()
        while not self._inbox.empty():
            piece = self._inbox.get_nowait()
            if piece is not None:
                self._carrier.free(self._link_number, piece.slot)
        self._inbox.put_nowait(None)

    async def close(self) -> None:
        """See `MessageStream`."""
        if not self._has_closed and not self._is_over:
            self._has_closed = True
            self._carrier.tell(Record(What.CLOSE, self._link_number, self._number))

    def reset(self) -> None:
        """See `MessageStream`."""
        if self._number in self._link.streams:
            self._carrier.tell(Record(What.RESET, self._link_number, self._number))
        self.leave()

    def leave(self) -> None:
        """Nobody here uses it any more; what still comes for it is dropped."""
        self._link.streams.pop(self._number, None)
        self.cut()


class CarrierClient:
    """One carrier process, from its start to its death."""

    def __init__(self, kind: str, slot_bytes: int) -> None:
        """Nothing runs yet."""
        self.kind, self.slot_bytes = kind, slot_bytes
        self.is_dead = False
        self.beat_at = 0.0
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._links: dict[int, _Link] = {}
        self._dialled: dict[int, asyncio.Future[None]] = {}
        self._opening: dict[int, CarriedStream] = {}
        self._num_dialled = 0
        self.died = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._life_fd = -1
        self.on_stream: StreamHandler | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The process to kill in a test of faults."""
        return self._process.pid if self._process else None

    def start(self, listener: socket.socket, host: str) -> None:
        """Spawn the process; `ready` waits for it."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life_read, self._life_fd = os.pipe()
        fds = (theirs.fileno(), listener.fileno(), life_read)
        command = [sys.executable, "-m", "kv_transfer.carrier", *map(str, fds), self.kind, host, str(self.slot_bytes)]
        # A peer's death is said by us, once; a wait on NCCL must end at its timeout, in the process that waits.
        environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_NCCL_BLOCKING_WAIT": "1"}
        if _is_loopback(host):
            environment |= {
                "NCCL_SOCKET_IFNAME": "lo",
                "UCX_NET_DEVICES": "lo",
            }  # they bind every interface if left alone
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
            raise StreamClosed(f"the {self.kind} carrier was not up within {START_TIMEOUT_S:g} s") from None

    @property
    def is_ready(self) -> bool:
        """True while it can be asked for streams."""
        return not self.is_dead and self._ready.done()

    async def dial(self, address: str) -> CarriedStream:
        """Open a stream to a peer's address.

        Raises:
            StreamClosed: It cannot be reached in time; another transport is then tried within a second.
        """
        self._num_dialled += 1
        number = self._num_dialled
        future = self._dialled[number] = asyncio.get_running_loop().create_future()
        self.tell(Record(What.DIAL, stream=number, text=address))
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S[self.kind]):
                await future
            return self._opening.pop(number)
        except TimeoutError:
            raise StreamClosed(f"{address} did not answer within {DIAL_TIMEOUT_S[self.kind]:g} s") from None
        finally:
            del self._dialled[number]
            if abandoned := self._opening.pop(number, None):
                abandoned.reset()

    def tell(self, record: Record) -> None:
        """Say something to the process; one that does not listen is killed."""
        if self._socket is None or self.is_dead:
            return
        try:
            self._socket.send(record.pack())
        except OSError:
            self.kill()

    def free(self, link: int, slot: int) -> None:
        """An inbound slot was read; none: it had been emptied before."""
        if slot != NO_SLOT:
            self.tell(Record(What.FREE, link, slot=slot))

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
        self.beat_at = asyncio.get_running_loop().time()
        self._obey(Record.unpack(data), fds)

    def _obey(self, record: Record, fds: list[int]) -> None:
        link = self._links.get(record.link)
        stream = link.streams.get(record.stream) if link else None
        match record.what:
            case What.READY:
                self._ready.set_result(None)
            case What.LINKED:
                self._links[record.link] = self._new_link(fds)
            case What.REFUSED:
                self._settle(record.stream, StreamClosed(record.text))
            case What.DIAL if link:
                self._opening[record.stream] = self._new_stream(record, link)
                if record.stream not in self._dialled:
                    self._opening.pop(record.stream).reset()  # whoever dialled has given up
            case What.OPENED:
                self._settle(record.stream, None)
            case What.ACCEPTED if link and self.on_stream is not None:
                self._own(self._serve(self._new_stream(record, link)))
            case What.SENT if link:
                link.free.put_nowait(record.slot)
            case What.RECEIVED:
                if stream is None:
                    self.free(record.link, record.slot)  # its stream was cut
                else:
                    stream.arrive(record.slot, record.num_bytes, is_last=record.is_last)
            case What.CLOSE if stream:
                stream.end()
            case What.RESET if link and stream:
                del link.streams[record.stream]
                stream.cut()
            case What.LOST if link:
                del self._links[record.link]
                _lose(link)

    def _new_link(self, fds: list[int]) -> _Link:
        fd = fds[0]
        try:
            arena = map_segment(fd, arena_bytes(self.slot_bytes))
        finally:
            os.close(fd)
        free: asyncio.Queue[int] = asyncio.Queue()  # bounded by its slots
        for slot in range(SLOTS, 2 * SLOTS):
            free.put_nowait(slot)
        return _Link(arena, free)

    def _new_stream(self, record: Record, link: _Link) -> CarriedStream:
        stream = link.streams[record.stream] = CarriedStream(self, record.link, link, record.stream)
        return stream

    def _settle(self, number: int, error: StreamClosed | None) -> None:
        future, stream = self._dialled.get(number), self._opening.get(number)
        if future is None or future.done():
            return
        if stream is not None and error is None:
            future.set_result(None)
        else:
            future.set_exception(error or StreamClosed("the stream was lost while it was opened"))

    async def _serve(self, stream: CarriedStream) -> None:
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
            self._ready.set_exception(StreamClosed(f"the {self.kind} carrier died while it started"))
            self._ready.exception()  # nobody need be waiting
        for number in list(self._dialled):
            self._settle(number, StreamClosed(f"the {self.kind} carrier died"))
        for link in self._links.values():
            _lose(link)
        self._links.clear()

    async def close(self) -> None:
        """Kill it, and end the handlers of accepted streams."""
        self.kill()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _lose(link: _Link) -> None:
    link.is_lost = True
    for stream in link.streams.values():
        stream.cut()
    link.streams.clear()
    link.free.put_nowait(NO_SLOT)  # whoever waits for a slot hears of it, one after the other


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback


@functools.cache
def _here() -> str:
    """Name of this host's network: loopback addresses mean the same only within one."""
    boot_id, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    name = f"{boot_id.read_text()}{network.readlink()}" if boot_id.exists() else socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:16]


class CarriedNetwork:
    """The `Network` port over carriers, one after the other. Make and use it on one loop."""

    def __init__(self, kind: str, host: str, message_bytes: int) -> None:
        """Name the kind of pairs, the address to bind, and the size of messages that go in one piece."""
        self._kind, self._host = kind, host
        self._slot_bytes = -(-(message_bytes + PIECE_HEAD_BYTES) // 4096) * 4096
        self._listener: socket.socket | None = None
        self._on_stream: StreamHandler | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.client: CarrierClient | None = None
        self.num_started = 0

    async def listen(self, on_stream: StreamHandler) -> str:
        """See `Network`. The carrier is up on return, or will be tried again: other ways are there meanwhile."""
        self._on_stream = on_stream
        self._listener = socket.create_server((self._host, 0), backlog=BACKLOG)
        self._spawn()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        if self.client is not None:
            with contextlib.suppress(StreamClosed):
                await self.client.ready()
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}/{_here() if _is_loopback(host) else ''}"

    def _spawn(self) -> None:
        if self._listener is not None:
            self.client = CarrierClient(self._kind, self._slot_bytes)
            self.client.on_stream = self._on_stream
            self.client.start(self._listener, self._host)
            self.num_started += 1

    async def _keep(self) -> None:
        """Kill a carrier that stands still, start one for one that died."""
        pause_s = RESTART_PAUSE_S
        while (client := self.client) is not None:
            try:
                await client.ready()
                pause_s = RESTART_PAUSE_S
            except StreamClosed:
                client.kill()
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
            num_still, before = 0, -1.0
            # Only watches of its own are counted: a worker that was stopped itself blames nobody.
            while not client.is_dead and num_still * WATCH_S < STILL_S:
                num_still, before = num_still + 1 if client.beat_at == before else 0, client.beat_at
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WATCH_S):
                        await client.died.wait()
            await client.close()
            await asyncio.sleep(pause_s)
            with contextlib.suppress(OSError):  # no process to be had: the next turn tries again
                self._spawn()

    async def dial(self, address: str) -> MessageStream:
        """See `Network`; `listen` comes first."""
        client = self.client
        if client is None or not client.is_ready:
            raise StreamClosed(f"the {self._kind} carrier is not up")
        where, _, here = address.partition("/")
        if here and here != _here():
            raise StreamClosed(f"{where} is the loopback of another host")
        return await client.dial(where)

    async def close(self) -> None:
        """See `Network`."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.client is not None:
            await self.client.close()
        if self._listener is not None:
            self._listener.close()
