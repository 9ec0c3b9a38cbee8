"""A pair over NIXL: one-sided writes into slots the peer has offered, over what UCX finds.

Owns the registration of slots and the numbered notes that offer and announce them. Does not know
streams, messages or processes.

    receiver ── offer k: address, room ──▶ sender
             ◀── the k-th message written there, and a note with its size ──

A late write can only land in a slot of this pair's arena, which dies with the pair, never in a
block of KV. NIXL has nothing to wait on, so its notes are polled: this process exists to do that.
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
"""Polls without a pause: a message that is nearly here is not worth a sleep."""
POLL_S = 0.0002
HEADS = 64
HEAD_BYTES = 64
"""Of messages without payload; far more than can be in flight, so that none is written over."""
_OFFER = struct.Struct("<cQQQ")
_WRITTEN = struct.Struct("<cQQ")


class NixlPair:
    """See `kv_transfer.sidecar.pairs.Pair`."""

    def __init__(
        self,
        store: Any,  # noqa: ANN401
        rank: int,
        host: str,
        silence_s: float,
        arena: torch.Tensor,
    ) -> None:
        """Register the arena and connect, see `GlooPair`.

        `host` is UCX's to choose (UCX_NET_DEVICES).

        Raises:
            KVTransferError: NIXL is not installed.
            RuntimeError: The peer did not come.
        """
        del host
        # Its own log would mix with ours, line by line, on standard error.
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
        self._silence_s = silence_s
        self._arena = arena
        self._heads = torch.zeros(HEADS, HEAD_BYTES, dtype=torch.uint8)
        # Both threads of a connection poll, and either may be given the other's notes.
        self._lock = threading.Lock()
        self._offers: dict[int, tuple[int, int]] = {}
        self._written: dict[int, int] = {}
        self._num_sent = 0
        self._num_offered = 0
        with _own_errors():
            # Registered first: the metadata that the peer gets describes what it may write to.
            self._agent.register_memory([arena, self._heads])
            store.set(f"nixl-{rank}", self._agent.get_agent_metadata())
            peer = self._agent.add_remote_agent(store.get(f"nixl-{1 - rank}"))
        self._peer: str = peer.decode() if isinstance(peer, bytes) else peer

    def send(self, buffer: torch.Tensor) -> _Send:
        """See `Pair`: it leaves as soon as the peer has offered a slot for it."""
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
        """Write the n-th message if a slot is offered for it; returns NIXL's handle, or None."""
        self.poll()
        offer = self._offers.pop(number, None)
        if offer is None:
            return None
        address, size = offer
        # Slots are equal on both sides of one cluster; a peer with another config is refused.
        if len(buffer) > size:
            raise RuntimeError(f"the peer offered {size} bytes for a message of {len(buffer)}")
        note = _WRITTEN.pack(b"w", number, len(buffer))
        with _own_errors():
            mine = self._agent.get_xfer_descs([(buffer.data_ptr(), len(buffer), 0)], "DRAM")
            theirs = self._agent.get_xfer_descs([(address, len(buffer), 0)], "DRAM")
            # The note goes with the write, and is seen only when the bytes are there.
            handle = self._agent.initialize_xfer("WRITE", mine, theirs, self._peer, note)
            if self._agent.transfer(handle) == "ERR":
                raise RuntimeError("a NIXL write could not begin")
        return handle

    def is_over(self, handle: Any) -> bool:  # noqa: ANN401
        """True once a write has ended.

        Raises:
            RuntimeError: It has failed.
        """
        with _own_errors():
            state = self._agent.check_xfer_state(handle)
            if state == "ERR":
                raise RuntimeError("a NIXL write failed; the peer is gone")
            # Released by the one call that sees its end: NIXL keeps it until then.
            if state == "DONE":
                self._agent.release_xfer_handle(handle)
            return bool(state == "DONE")

    def has_come(self, number: int) -> bool:
        """True if the n-th message is here."""
        self.poll()
        return self._written.pop(number, None) is not None

    def poll(self) -> None:
        """Collect the peer's notes."""
        with self._lock, _own_errors():
            for notes in self._agent.get_new_notifs().values():
                for note in notes:
                    if note[:1] == b"o":
                        _, number, address, size = _OFFER.unpack(note)
                        self._offers[number] = (address, size)
                    else:
                        _, number, size = _WRITTEN.unpack(note)
                        self._written[number] = size

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Poll until a condition holds.

        Raises:
            RuntimeError: Not within the time that a peer may be silent.
        """
        give_up_at = time.monotonic() + self._silence_s
        spins = 0
        while not is_so():
            # At first without a pause: a small message takes microseconds, and a sleep a
            # scheduler's tick.
            spins += 1
            if spins > SPINS:
                time.sleep(POLL_S)
                if time.monotonic() > give_up_at:
                    raise RuntimeError(f"nothing from the peer for {self._silence_s:g} s")


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Turn NIXL's failures into RuntimeError, which torch raises when a pair fails.

    Its exceptions have no common base, and a note may be malformed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, struct.error) or type(error).__module__.startswith("nixl"):
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


class _Send:
    """A message in flight."""

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
