"""A sidecar process: moves one worker's KV over gloo, NCCL or NIXL, and may be killed for it.

Owns the connections to peers (a two-member group each), their arenas of slots, and the threads that
send and receive. Does not know transfers, checksums or pools: it moves messages between the
worker's arena and a peer's. A collective that hangs or a driver that crashes takes this process,
not the worker. Started by `kv_transfer.sidecar.client` as `python -m kv_transfer.sidecar.process
CONTROL_FD LISTEN_FD PARENT_DEATH_FD KIND HOST SLOT_BYTES`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import sys
import threading
import time
from collections import deque
from typing import Any

import torch

from core import logs
from core.errors import KVTransferError
from kv_transfer.sidecar.pairs import PAIRS, Pair, Rendezvous, Work, request_pair
from kv_transfer.sidecar.protocol import (
    HEARTBEAT_S,
    MAX_CONTROL_BYTES,
    PIECE_HEAD_BYTES,
    SLOTS,
    ControlMessage,
    DataHeader,
    MessageKind,
    arena_bytes,
    slot_of,
)
from process.parent_death import exit_with_parent
from process.shared_memory import create_segment, map_segment

SILENCE_S = 2.0
"""A connection without a piece for so long is ended; its streams end with it and are dialled anew.
Heartbeats come eight times as often, so that a busy peer is not taken for a dead one."""
MAX_CONNECTIONS = 256
MAX_WAITING = 1024
"""Pieces queued for one peer. Those with payload are bounded by slots; the rest ends or opens
streams, and a peer that takes none of so many has stopped."""
_InFlight = deque[tuple[Work, int, torch.Tensor]]
"""Sends, the slot that is free after each (-1: none), and the memory that must stay until then."""


class _Connection:
    """A pair, its arena and its two threads."""

    def __init__(
        self, sidecar: _Sidecar, number: int, pair: Pair, arena: memoryview, tensor: torch.Tensor
    ) -> None:
        self._sidecar = sidecar
        self.number = number
        self._pair = pair
        self._slot_bytes = sidecar.slot_bytes
        self._arena = arena
        self._tensor = tensor
        self._outbox: queue.Queue[tuple[DataHeader, int]] = queue.Queue(MAX_WAITING)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(SLOTS):
            self._free.put(slot)
        self._lock = threading.Lock()
        self.is_lost = False

    def start(self) -> None:
        """Begin to send and to receive."""
        for target in (self._read, self._write):
            threading.Thread(
                target=target, name=f"{target.__name__}-{self.number}", daemon=True
            ).start()

    def send(self, piece: DataHeader, slot: int = -1) -> None:
        """Queue a piece; `slot` holds its payload."""
        # Never waits: this may be the thread that reads from the worker.
        try:
            self._outbox.put_nowait((piece, slot))
        except queue.Full:
            self._lose("the peer takes nothing")

    def free(self, slot: int) -> None:
        """The worker has read an inbound slot."""
        self._free.put(slot)

    def _lose(self, reason: str) -> None:
        # Reader, writer and sender may all find out at once; the worker must get one message.
        with self._lock:
            if self.is_lost:
                return
            self.is_lost = True
        self._sidecar.lose(self, reason)
        self._free.put(-1)  # the reader may wait for a slot, which nobody frees any more

    def _write(self) -> None:
        in_flight: _InFlight = deque()
        try:
            while not self.is_lost:
                try:
                    # With sends in flight the next wait is for the oldest of them, whose slot the
                    # worker may need; only an idle connection waits for pieces.
                    piece, slot = (
                        self._outbox.get_nowait()
                        if in_flight
                        else self._outbox.get(timeout=HEARTBEAT_S)
                    )
                except queue.Empty:
                    if in_flight:
                        self._wait_sent(in_flight)
                    else:
                        self._begin(DataHeader(MessageKind.HEARTBEAT), -1, in_flight)
                    continue
                self._begin(piece, slot, in_flight)
                while len(in_flight) >= SLOTS:
                    self._wait_sent(in_flight)
        except RuntimeError as error:
            self._lose(str(error))

    def _begin(self, piece: DataHeader, slot: int, in_flight: _InFlight) -> None:
        # Heads without payload take no slot: a heartbeat must go out when all slots are in flight.
        if slot < 0:
            head = bytearray(PIECE_HEAD_BYTES)
            piece.write(memoryview(head))
            buffer = torch.frombuffer(head, dtype=torch.uint8)
        else:
            piece.write(slot_of(self._arena, slot, self._slot_bytes))
            at = slot * self._slot_bytes
            buffer = self._tensor[at : at + PIECE_HEAD_BYTES + piece.num_bytes]
        in_flight.append((self._pair.send(buffer), slot, buffer))

    def _wait_sent(self, in_flight: _InFlight) -> None:
        work, slot, _ = in_flight.popleft()
        work.wait()
        if slot >= 0:
            self._sidecar.send(ControlMessage(MessageKind.SENT, self.number, slot=slot))

    def _read(self) -> None:
        posted: deque[tuple[Work, int]] = deque()
        try:
            while not self.is_lost:
                # As many receives are posted as there are free slots, so that pieces of a burst
                # follow one another; without any, wait for the worker to read one.
                while not posted or not self._free.empty():
                    slot = self._free.get()
                    if slot < 0:
                        return
                    at = slot * self._slot_bytes
                    posted.append((self._pair.recv(self._tensor[at : at + self._slot_bytes]), slot))
                work, slot = posted.popleft()
                work.wait()
                # After `wait`: only now are all its bytes in the slot.
                piece = DataHeader.read(slot_of(self._arena, slot, self._slot_bytes))
                if piece.kind is MessageKind.SEND:
                    self._sidecar.send(
                        ControlMessage(
                            MessageKind.RECEIVED,
                            self.number,
                            piece.stream,
                            slot,
                            piece.num_bytes,
                            piece.is_last,
                        )
                    )
                else:
                    # Without payload: the slot is free again before anything is done about it.
                    self._free.put(slot)
                    self._dispatch(piece)
        except (RuntimeError, ValueError) as error:
            self._lose(str(error))

    def _dispatch(self, piece: DataHeader) -> None:
        if piece.kind is MessageKind.ACCEPTED:
            self._sidecar.send(ControlMessage(MessageKind.ACCEPTED, self.number, piece.stream))
            self.send(DataHeader(MessageKind.OPENED, piece.stream))
        elif piece.kind in (MessageKind.OPENED, MessageKind.CLOSE, MessageKind.RESET):
            self._sidecar.send(ControlMessage(piece.kind, self.number, piece.stream))


class _Sidecar:
    """The process: control messages of the worker in, connections to peers out."""

    def __init__(self, control: socket.socket, kind: str, host: str, slot_bytes: int) -> None:
        self._control = control
        self._make_pair = PAIRS[kind]
        self._host = host
        self.slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._by_address: dict[str, _Connection] = {}
        self._dialling: dict[str, threading.Lock] = {}
        self._num_connections = 0

    def send(self, message: ControlMessage, fd: int = -1) -> None:
        """Send to the worker: one datagram, so whole from any thread, and in order for each."""
        try:
            socket.send_fds(self._control, [message.pack()], [fd] if fd >= 0 else [])
        except OSError:
            os._exit(0)  # the worker is gone; threads that wait on a peer would keep the process

    def run(self, listener: socket.socket) -> None:
        """Serve until the worker closes its end."""
        rendezvous = Rendezvous(listener)
        threading.Thread(
            target=self._accept, args=(rendezvous,), name="accept", daemon=True
        ).start()
        self.send(ControlMessage(MessageKind.READY))
        heartbeat_at = time.monotonic()
        while True:
            readable, _, _ = select.select([self._control], [], [], HEARTBEAT_S)
            if time.monotonic() >= heartbeat_at:  # also while the worker sends without a pause
                self.send(ControlMessage(MessageKind.HEARTBEAT))
                heartbeat_at = time.monotonic() + HEARTBEAT_S
            if not readable:
                continue
            try:
                data = self._control.recv(MAX_CONTROL_BYTES)
            except ConnectionError:
                data = b""  # the worker was killed with a message of ours unread
            if not data:
                os._exit(0)
            self._dispatch(ControlMessage.unpack(data))

    def _dispatch(self, message: ControlMessage) -> None:
        connection = self._connections.get(message.connection)
        if message.kind is MessageKind.DIAL:
            # To connect waits for the peer, and this thread answers to the worker.
            threading.Thread(target=self._dial, args=(message,), name="dial", daemon=True).start()
        elif connection is None:
            return  # it was lost, and LOST is on its way to the worker
        elif message.kind is MessageKind.SEND:
            connection.send(
                DataHeader(MessageKind.SEND, message.stream, message.num_bytes, message.is_last),
                message.slot,
            )
        elif message.kind is MessageKind.FREE:
            connection.free(message.slot)
        else:
            connection.send(DataHeader(message.kind, message.stream))

    def _accept(self, rendezvous: Rendezvous) -> None:
        while True:
            try:
                store = rendezvous.next_request()
            except RuntimeError:
                os._exit(1)  # nobody could connect any more; the next process starts afresh
            # Each takes an arena and two threads; a peer without one goes another route.
            if len(self._connections) < MAX_CONNECTIONS:
                threading.Thread(
                    target=self._accept_pair, args=(store,), name="pair", daemon=True
                ).start()

    def _accept_pair(self, store: Any) -> None:  # noqa: ANN401
        # The peer may be gone, or there is no library: it dials again, or goes another route.
        with contextlib.suppress(RuntimeError, KVTransferError):
            self._connect(store, 0)

    def _connect(self, store: Any, rank: int) -> _Connection:  # noqa: ANN401
        size = arena_bytes(self.slot_bytes)
        fd = create_segment(size)
        try:
            arena = map_segment(fd, size)
            tensor = torch.frombuffer(arena, dtype=torch.uint8)
            pair = self._make_pair(store, rank, self._host, SILENCE_S, tensor)
            with self._lock:
                self._num_connections += 1
                connection = _Connection(self, self._num_connections, pair, arena, tensor)
                self._connections[connection.number] = connection
            # Before its threads start: the worker must know a connection when pieces arrive on it.
            self.send(ControlMessage(MessageKind.CONNECTED, connection.number), fd)
        finally:
            os.close(fd)
        connection.start()
        return connection

    def _dial(self, message: ControlMessage) -> None:
        address = message.text
        with self._lock:
            alone = self._dialling.setdefault(address, threading.Lock())
        try:
            # Streams to one peer share a connection: of several that dial at once, one makes it.
            with alone:
                connection = self._by_address.get(address)
                if connection is None or connection.is_lost:
                    connection = self._by_address[address] = self._connect(request_pair(address), 1)
        # A malformed address, nobody there, no descriptors or no library: the dial fails, and the
        # process goes on.
        except (RuntimeError, ValueError, OSError, KVTransferError) as error:
            self.send(
                ControlMessage(MessageKind.REFUSED, stream=message.stream, text=str(error)[:200])
            )
            return
        # First to the worker: it must know the stream's connection when anything comes over it.
        self.send(ControlMessage(MessageKind.DIAL, connection.number, message.stream))
        connection.send(DataHeader(MessageKind.ACCEPTED, message.stream))

    def lose(self, connection: _Connection, reason: str) -> None:
        """Drop a connection that has ended, and report it to the worker."""
        # By identity: the address may have a newer connection already.
        with self._lock:
            self._connections.pop(connection.number, None)
            for address in [a for a, known in self._by_address.items() if known is connection]:
                del self._by_address[address]
        self.send(ControlMessage(MessageKind.LOST, connection.number, text=reason[:200]))


def main() -> None:
    """Run a sidecar to its end."""
    control_fd, listen_fd, parent_death_fd = (int(argument) for argument in sys.argv[1:4])
    kind = sys.argv[4]
    host = sys.argv[5]
    slot_bytes = int(sys.argv[6])
    exit_with_parent(parent_death_fd)
    torch.set_num_threads(1)  # it copies, and the cores beside it compute
    _Sidecar(socket.socket(fileno=control_fd), kind, host, slot_bytes).run(
        socket.socket(fileno=listen_fd)
    )


if __name__ == "__main__":
    logs.configure("sidecar")
    main()
