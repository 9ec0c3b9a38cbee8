"""A pair over NIXL: one-sided writes into slots the peer has offered, over what UCX finds.

Owns the registration of slots and the numbered notes that offer and announce them. Does not know
streams, messages or processes.

    receiver ── offer k: address, room ──▶ sender
             ◀── the k-th message written there, and a note with its size ──

A late write can only land in a slot of this pair's arena, which dies with the pair, never in a
block of KV. NIXL has nothing to wait on, so its notes are polled for; this process exists to do
that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from core.errors import KVTransferError

SPINS = 100
POLL_S = 0.0002
HEADS, HEAD_BYTES = 64, 64
_OFFER = struct.Struct("<cQQQ")
_WRITTEN = struct.Struct("<cQQ")


class NixlPair:
    """See `kv_transfer.sidecar.pairs.Pair`."""

    def __init__(self, store: Any, rank: int, host: str, silence_s: float) -> None:  # noqa: ANN401
        """Make an agent; `use` meets the peer. `host` is UCX's to choose (UCX_NET_DEVICES).

        Raises:
            KVTransferError: NIXL is not installed.
        """
        del host
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        try:
            from nixl._api import (  # noqa: PLC0415 - an extra
                nixl_agent,
                nixl_agent_config,
                nixl_thread_sync_t,
            )
        except ImportError as error:
            raise KVTransferError(
                f"NIXL is not installed ({error}); pip install 'baton-serve[nixl]'"
            ) from error
        config = nixl_agent_config(
            backends=["UCX"], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self._agent: Any = nixl_agent(secrets.token_hex(8), config)
        self._store, self._rank, self._silence_s = store, rank, silence_s
        self._peer = ""
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._heads = torch.zeros(HEADS, HEAD_BYTES, dtype=torch.uint8)
        self._lock = threading.Lock()
        self._rooms: dict[int, tuple[int, int]] = {}
        self._written: dict[int, int] = {}
        self._num_sent = self._num_offered = 0

    def use(self, arena: torch.Tensor) -> None:
        """See `Pair`."""
        self._arena = arena
        with _own_errors():
            self._agent.register_memory([arena, self._heads])
            self._store.set(f"nixl-{self._rank}", self._agent.get_agent_metadata())
            peer = self._agent.add_remote_agent(self._store.get(f"nixl-{1 - self._rank}"))
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def send(self, buffer: torch.Tensor) -> _Send:
        """See `Pair`: it leaves as soon as the peer has offered room for it."""
        number = self._num_sent
        self._num_sent += 1
        begin = self._arena.data_ptr()
        if not begin <= buffer.data_ptr() < begin + len(self._arena):
            # What is small and lies elsewhere is copied to where NIXL may read.
            head = self._heads[number % HEADS, : len(buffer)]
            head.copy_(buffer)
            buffer = head
        return _Send(self, number, buffer)

    def recv(self, buffer: torch.Tensor) -> _Recv:
        """See `Pair`."""
        number = self._num_offered
        self._num_offered += 1
        with _own_errors():
            self._agent.send_notif(
                self._peer, _OFFER.pack(b"o", number, buffer.data_ptr(), len(buffer))
            )
        return _Recv(self, number)

    def begin(self, number: int, buffer: torch.Tensor) -> Any:  # noqa: ANN401
        """Write the n-th message if there is room for it; returns NIXL's handle, or None."""
        self.poll()
        room = self._rooms.pop(number, None)
        if room is None:
            return None
        address, size = room
        if len(buffer) > size:
            raise RuntimeError(f"the peer offered {size} bytes for a message of {len(buffer)}")
        note = _WRITTEN.pack(b"w", number, len(buffer))
        with _own_errors():
            mine = self._agent.get_xfer_descs([(buffer.data_ptr(), len(buffer), 0)], "DRAM")
            theirs = self._agent.get_xfer_descs([(address, len(buffer), 0)], "DRAM")
            handle = self._agent.initialize_xfer("WRITE", mine, theirs, self._peer, note)
            if self._agent.transfer(handle) == "ERR":
                raise RuntimeError("a NIXL write could not begin")
        return handle

    def is_over(self, handle: Any) -> bool:  # noqa: ANN401
        """Whether a write has ended.

        Raises:
            RuntimeError: It has failed.
        """
        with _own_errors():
            state = self._agent.check_xfer_state(handle)
            if state == "ERR":
                raise RuntimeError("a NIXL write failed; the peer is gone")
            if state == "DONE":
                self._agent.release_xfer_handle(handle)
            return bool(state == "DONE")

    def has_come(self, number: int) -> bool:
        """Whether the n-th message is here."""
        self.poll()
        return self._written.pop(number, None) is not None

    def poll(self) -> None:
        """Take in what the peer has noted."""
        with self._lock, _own_errors():
            for notes in self._agent.get_new_notifs().values():
                for note in notes:
                    if note[:1] == b"o":
                        _, number, address, size = _OFFER.unpack(note)
                        self._rooms[number] = (address, size)
                    else:
                        _, number, size = _WRITTEN.unpack(note)
                        self._written[number] = size

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Poll until something is so.

        Raises:
            RuntimeError: Not within the pair's silence.
        """
        give_up_at = time.monotonic() + self._silence_s
        spins = 0
        while not is_so():
            spins += 1
            if spins > SPINS:
                time.sleep(POLL_S)
                if time.monotonic() > give_up_at:
                    raise RuntimeError(f"nothing from the peer for {self._silence_s:g} s")


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """A pair's failure is a RuntimeError, as torch's is.

    NIXL's exceptions have no base, and a note may be malformed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, struct.error) or type(error).__module__.startswith("nixl"):
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


class _Send:
    """A message on its way."""

    def __init__(self, pair: NixlPair, number: int, buffer: torch.Tensor) -> None:
        self._pair, self._number, self._buffer = pair, number, buffer
        self._handle = pair.begin(number, buffer)

    def _step(self) -> bool:
        if self._handle is None:
            self._handle = self._pair.begin(self._number, self._buffer)
            return False
        return self._pair.is_over(self._handle)

    def wait(self) -> bool:
        self._pair.wait_for(self._step)
        return True


class _Recv:
    """A slot that was offered."""

    def __init__(self, pair: NixlPair, number: int) -> None:
        self._pair, self._number = pair, number

    def wait(self) -> bool:
        self._pair.wait_for(lambda: self._pair.has_come(self._number))
        return True
