"""A carrier process: carries one worker's KV over gloo, NCCL or NIXL, and may be killed for it.

Owns the links to peers (a two-member group each), their arenas of slots, and the threads that send
and receive. Does not know transfers, checksums or pools: it moves messages between the worker's
arena and a peer's. A collective that hangs or a driver that crashes takes this process, not the
worker. Started by `kv_transfer.sidecar.client` as `python -m kv_transfer.sidecar.process CONTROL_FD
LISTEN_FD LIFE_FD KIND HOST SLOT_BYTES`.
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
    MAX_RECORD_BYTES,
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
"""A link without a piece for so long is ended; its streams end with it and are dialled anew."""
MAX_CONNECTIONS = 256
MAX_WAITING = 1024


class _Connection:
    """A pair that works, with its arena and its two threads."""

    def __init__(self, sidecar: _Sidecar, number: int, pair: Pair) -> None:
        self._sidecar, self.number, self._pair = sidecar, number, pair
        self._slot_bytes = sidecar.slot_bytes
        self.fd = create_segment(arena_bytes(self._slot_bytes))
        self._arena = map_segment(self.fd, arena_bytes(self._slot_bytes))
        self._tensor = torch.frombuffer(self._arena, dtype=torch.uint8)
        pair.use(self._tensor)
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

    def say(self, piece: DataHeader, slot: int = -1) -> None:
        """Queue a piece; `slot` holds its payload."""
        try:
            self._outbox.put_nowait((piece, slot))
        except queue.Full:
            self._lose("the peer takes nothing")

    def free(self, slot: int) -> None:
        """The worker has read an inbound slot."""
        self._free.put(slot)

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self.is_lost:
                return
            self.is_lost = True
        self._sidecar.lose(self, reason)
        self._free.put(-1)

    def _write(self) -> None:
        under_way: deque[tuple[Work, int, Any]] = deque()
        try:
            while not self.is_lost:
                try:
                    piece, slot = (
                        self._outbox.get(timeout=HEARTBEAT_S)
                        if not under_way
                        else self._outbox.get_nowait()
                    )
                except queue.Empty:
                    if under_way:
                        self._wait_sent(under_way)
                    else:
                        self._send(DataHeader(MessageKind.PULSE), -1, under_way)
                    continue
                self._send(piece, slot, under_way)
                while len(under_way) >= SLOTS:
                    self._wait_sent(under_way)
        except RuntimeError as error:
            self._lose(str(error))

    def _send(self, piece: DataHeader, slot: int, under_way: deque[tuple[Work, int, Any]]) -> None:
        if slot < 0:
            head = bytearray(PIECE_HEAD_BYTES)
            piece.write(memoryview(head))
            buffer = torch.frombuffer(head, dtype=torch.uint8)
        else:
            piece.write(slot_of(self._arena, slot, self._slot_bytes))
            at = slot * self._slot_bytes
            buffer = self._tensor[at : at + PIECE_HEAD_BYTES + piece.num_bytes]
        under_way.append((self._pair.send(buffer), slot, buffer))

    def _wait_sent(self, under_way: deque[tuple[Work, int, Any]]) -> None:
        work, slot, _ = under_way.popleft()
        work.wait()
        if slot >= 0:
            self._sidecar.tell(ControlMessage(MessageKind.SENT, self.number, slot=slot))

    def _read(self) -> None:
        posted: deque[tuple[Work, int]] = deque()
        try:
            while not self.is_lost:
                while not posted or not self._free.empty():
                    slot = self._free.get()
                    if slot < 0:
                        return
                    at = slot * self._slot_bytes
                    posted.append((self._pair.recv(self._tensor[at : at + self._slot_bytes]), slot))
                work, slot = posted.popleft()
                work.wait()
                piece = DataHeader.read(slot_of(self._arena, slot, self._slot_bytes))
                if piece.what is MessageKind.SEND:
                    self._sidecar.tell(
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
                    self._free.put(slot)
                    self._hear(piece)
        except (RuntimeError, ValueError) as error:
            self._lose(str(error))

    def _hear(self, piece: DataHeader) -> None:
        if piece.what is MessageKind.ACCEPTED:
            self._sidecar.tell(ControlMessage(MessageKind.ACCEPTED, self.number, piece.stream))
            self.say(DataHeader(MessageKind.OPENED, piece.stream))
        elif piece.what in (MessageKind.OPENED, MessageKind.CLOSE, MessageKind.RESET):
            self._sidecar.tell(ControlMessage(piece.what, self.number, piece.stream))


class _Sidecar:
    """The process: the worker's orders in, links out."""

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

    def tell(self, record: ControlMessage, fd: int = -1) -> None:
        """Say something to the worker, whole and in order for each thread."""
        try:
            socket.send_fds(self._control, [record.pack()], [fd] if fd >= 0 else [])
        except OSError:
            os._exit(0)  # the worker is gone

    def run(self, listener: socket.socket) -> None:
        """Serve until the worker lets go."""
        rendezvous = Rendezvous(listener)
        threading.Thread(
            target=self._accept, args=(rendezvous,), name="accept", daemon=True
        ).start()
        self.tell(ControlMessage(MessageKind.READY))
        heartbeat_at = time.monotonic()
        while True:
            readable, _, _ = select.select([self._control], [], [], HEARTBEAT_S)
            if time.monotonic() >= heartbeat_at:  # also while the worker talks without a pause
                self.tell(ControlMessage(MessageKind.PULSE))
                heartbeat_at = time.monotonic() + HEARTBEAT_S
            if not readable:
                continue
            try:
                data = self._control.recv(MAX_RECORD_BYTES)
            except ConnectionError:
                data = b""  # the worker was killed with a record of ours unread
            if not data:
                os._exit(0)
            self._obey(ControlMessage.unpack(data))

    def _obey(self, record: ControlMessage) -> None:
        connection = self._connections.get(record.connection)
        if record.what is MessageKind.DIAL:
            threading.Thread(target=self._dial, args=(record,), name="dial", daemon=True).start()
        elif connection is None:
            return  # it was lost; the worker hears so
        elif record.what is MessageKind.SEND:
            connection.say(
                DataHeader(MessageKind.SEND, record.stream, record.num_bytes, record.is_last),
                record.slot,
            )
        elif record.what is MessageKind.FREE:
            connection.free(record.slot)
        else:
            connection.say(DataHeader(record.what, record.stream))

    def _accept(self, rendezvous: Rendezvous) -> None:
        while True:
            try:
                store = rendezvous.next_request()
            except RuntimeError:
                os._exit(1)  # nobody could be let in any more; the next process starts afresh
            if len(self._connections) < MAX_CONNECTIONS:
                threading.Thread(
                    target=self._accept_pair, args=(store,), name="pair", daemon=True
                ).start()

    def _accept_pair(self, store: Any) -> None:  # noqa: ANN401
        with contextlib.suppress(
            RuntimeError, KVTransferError
        ):  # whoever knocked did not wait, or there is no library
            self._connect(store, 0)

    def _connect(self, store: Any, rank: int) -> _Connection:  # noqa: ANN401
        pair = self._make_pair(store, rank, self._host, SILENCE_S)
        with self._lock:
            self._num_connections += 1
            number = self._num_connections
        connection = _Connection(self, number, pair)
        with self._lock:
            self._connections[number] = connection
        self.tell(ControlMessage(MessageKind.LINKED, connection.number), connection.fd)
        os.close(connection.fd)
        connection.start()
        return connection

    def _dial(self, record: ControlMessage) -> None:
        address = record.text
        with self._lock:
            alone = self._dialling.setdefault(address, threading.Lock())
        try:
            with alone:
                connection = self._by_address.get(address)
                if connection is None or connection.is_lost:
                    connection = self._by_address[address] = self._connect(request_pair(address), 1)
        except (RuntimeError, ValueError, OSError, KVTransferError) as error:
            self.tell(
                ControlMessage(MessageKind.REFUSED, stream=record.stream, text=str(error)[:200])
            )
            return
        # The worker learns of the stream's link before anything can come over it.
        self.tell(ControlMessage(MessageKind.DIAL, connection.number, record.stream))
        connection.say(DataHeader(MessageKind.ACCEPTED, record.stream))

    def lose(self, connection: _Connection, reason: str) -> None:
        """A link has ended."""
        with self._lock:
            self._connections.pop(connection.number, None)
            for address in [a for a, known in self._by_address.items() if known is connection]:
                del self._by_address[address]
        self.tell(ControlMessage(MessageKind.LOST, connection.number, text=reason[:200]))


def main() -> None:
    """Run a carrier to its end."""
    control_fd, listen_fd, life_fd = (int(argument) for argument in sys.argv[1:4])
    kind, host, slot_bytes = sys.argv[4], sys.argv[5], int(sys.argv[6])
    exit_with_parent(life_fd)
    torch.set_num_threads(1)
    _Sidecar(socket.socket(fileno=control_fd), kind, host, slot_bytes).run(
        socket.socket(fileno=listen_fd)
    )


if __name__ == "__main__":
    logs.configure("sidecar")
    main()
