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
from kv_transfer.sidecar.pairs import PAIRS, MeetingPoint, Pair, Work, knock
from kv_transfer.sidecar.protocol import (
    MAX_RECORD_BYTES,
    PIECE_HEAD_BYTES,
    PULSE_S,
    SLOTS,
    Piece,
    Record,
    What,
    arena_bytes,
    slot_of,
)
from process.parent_death import hang_on
from process.shared_memory import create_segment, map_segment

SILENCE_S = 2.0
"""A link without a piece for so long is ended; its streams end with it and are dialled anew."""
MAX_LINKS = 256
MAX_WAITING = 1024


class _Link:
    """A pair that works, with its arena and its two threads."""

    def __init__(self, carrier: _Carrier, number: int, pair: Pair) -> None:
        self._carrier, self.number, self._pair = carrier, number, pair
        self._slot_bytes = carrier.slot_bytes
        self.fd = create_segment(arena_bytes(self._slot_bytes))
        self._arena = map_segment(self.fd, arena_bytes(self._slot_bytes))
        self._tensor = torch.frombuffer(self._arena, dtype=torch.uint8)
        pair.use(self._tensor)
        self._outbox: queue.Queue[tuple[Piece, int]] = queue.Queue(MAX_WAITING)
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

    def say(self, piece: Piece, slot: int = -1) -> None:
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
        self._carrier.lose(self, reason)
        self._free.put(-1)

    def _write(self) -> None:
        under_way: deque[tuple[Work, int, Any]] = deque()
        try:
            while not self.is_lost:
                try:
                    piece, slot = (
                        self._outbox.get(timeout=PULSE_S)
                        if not under_way
                        else self._outbox.get_nowait()
                    )
                except queue.Empty:
                    if under_way:
                        self._wait_sent(under_way)
                    else:
                        self._send(Piece(What.PULSE), -1, under_way)
                    continue
                self._send(piece, slot, under_way)
                while len(under_way) >= SLOTS:
                    self._wait_sent(under_way)
        except RuntimeError as error:
            self._lose(str(error))

    def _send(self, piece: Piece, slot: int, under_way: deque[tuple[Work, int, Any]]) -> None:
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
            self._carrier.tell(Record(What.SENT, self.number, slot=slot))

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
                piece = Piece.read(slot_of(self._arena, slot, self._slot_bytes))
                if piece.what is What.SEND:
                    self._carrier.tell(
                        Record(
                            What.RECEIVED,
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

    def _hear(self, piece: Piece) -> None:
        if piece.what is What.ACCEPTED:
            self._carrier.tell(Record(What.ACCEPTED, self.number, piece.stream))
            self.say(Piece(What.OPENED, piece.stream))
        elif piece.what in (What.OPENED, What.CLOSE, What.RESET):
            self._carrier.tell(Record(piece.what, self.number, piece.stream))


class _Carrier:
    """The process: the worker's orders in, links out."""

    def __init__(self, control: socket.socket, kind: str, host: str, slot_bytes: int) -> None:
        self._control = control
        self._make_pair = PAIRS[kind]
        self._host = host
        self.slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._links: dict[int, _Link] = {}
        self._by_address: dict[str, _Link] = {}
        self._dialling: dict[str, threading.Lock] = {}
        self._num_links = 0

    def tell(self, record: Record, fd: int = -1) -> None:
        """Say something to the worker, whole and in order for each thread."""
        try:
            socket.send_fds(self._control, [record.pack()], [fd] if fd >= 0 else [])
        except OSError:
            os._exit(0)  # the worker is gone

    def run(self, listener: socket.socket) -> None:
        """Serve until the worker lets go."""
        meeting_point = MeetingPoint(listener)
        threading.Thread(
            target=self._accept, args=(meeting_point,), name="accept", daemon=True
        ).start()
        self.tell(Record(What.READY))
        pulse_at = time.monotonic()
        while True:
            readable, _, _ = select.select([self._control], [], [], PULSE_S)
            if time.monotonic() >= pulse_at:  # also while the worker talks without a pause
                self.tell(Record(What.PULSE))
                pulse_at = time.monotonic() + PULSE_S
            if not readable:
                continue
            try:
                data = self._control.recv(MAX_RECORD_BYTES)
            except ConnectionError:
                data = b""  # the worker was killed with a record of ours unread
            if not data:
                os._exit(0)
            self._obey(Record.unpack(data))

    def _obey(self, record: Record) -> None:
        link = self._links.get(record.link)
        if record.what is What.DIAL:
            threading.Thread(target=self._dial, args=(record,), name="dial", daemon=True).start()
        elif link is None:
            return  # it was lost; the worker hears so
        elif record.what is What.SEND:
            link.say(Piece(What.SEND, record.stream, record.num_bytes, record.is_last), record.slot)
        elif record.what is What.FREE:
            link.free(record.slot)
        else:
            link.say(Piece(record.what, record.stream))

    def _accept(self, meeting_point: MeetingPoint) -> None:
        while True:
            try:
                store = meeting_point.next_knock()
            except RuntimeError:
                os._exit(1)  # nobody could be let in any more; the next process starts afresh
            if len(self._links) < MAX_LINKS:
                threading.Thread(target=self._meet, args=(store,), name="meet", daemon=True).start()

    def _meet(self, store: Any) -> None:  # noqa: ANN401
        with contextlib.suppress(
            RuntimeError, KVTransferError
        ):  # whoever knocked did not wait, or there is no library
            self._link(store, 0)

    def _link(self, store: Any, rank: int) -> _Link:  # noqa: ANN401
        pair = self._make_pair(store, rank, self._host, SILENCE_S)
        with self._lock:
            self._num_links += 1
            number = self._num_links
        link = _Link(self, number, pair)
        with self._lock:
            self._links[number] = link
        self.tell(Record(What.LINKED, link.number), link.fd)
        os.close(link.fd)
        link.start()
        return link

    def _dial(self, record: Record) -> None:
        address = record.text
        with self._lock:
            alone = self._dialling.setdefault(address, threading.Lock())
        try:
            with alone:
                link = self._by_address.get(address)
                if link is None or link.is_lost:
                    link = self._by_address[address] = self._link(knock(address), 1)
        except (RuntimeError, ValueError, OSError, KVTransferError) as error:
            self.tell(Record(What.REFUSED, stream=record.stream, text=str(error)[:200]))
            return
        # The worker learns of the stream's link before anything can come over it.
        self.tell(Record(What.DIAL, link.number, record.stream))
        link.say(Piece(What.ACCEPTED, record.stream))

    def lose(self, link: _Link, reason: str) -> None:
        """A link has ended."""
        with self._lock:
            self._links.pop(link.number, None)
            for address in [a for a, known in self._by_address.items() if known is link]:
                del self._by_address[address]
        self.tell(Record(What.LOST, link.number, text=reason[:200]))


def main() -> None:
    """Run a carrier to its end."""
    control_fd, listen_fd, life_fd = (int(argument) for argument in sys.argv[1:4])
    kind, host, slot_bytes = sys.argv[4], sys.argv[5], int(sys.argv[6])
    hang_on(life_fd)
    torch.set_num_threads(1)
    _Carrier(socket.socket(fileno=control_fd), kind, host, slot_bytes).run(
        socket.socket(fileno=listen_fd)
    )


if __name__ == "__main__":
    logs.configure("carrier")
    main()
