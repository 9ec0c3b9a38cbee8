"""The ranks of one host add up and exchange through memory they share.

Owns the slots, one pair a rank, and the words that number the messages in them. The arithmetic
is that of `engine.model.collectives`: terms in the order of ranks. Does not know models.

A message through gloo's loopback sockets takes 200 microseconds and a layer needs two; this takes
what a copy takes. Slots are used by turns: who posts message n has read n - 1, so slot n - 2 is
free.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.collectives import WAIT_S, GroupBroken, add_in_order

SPIN_S = 50e-6
NAP_S = 1.0
WORD_BYTES = 64
"""A cache line each, so that ranks do not fight over one."""
_SYS_FUTEX = 202
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 0, 1, 2**31 - 1
# Python has no futex; through ctypes the wait leaves the interpreter to other threads.
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class SharedGroup:
    """`Collectives` over shared memory."""

    def __init__(self, rank: int, size: int, words: memoryview, slots: memoryview) -> None:
        """Join; the memory is zeroed and everybody's.

        Args:
            rank: This rank.
            size: Ranks of the group.
            words: uint8 [a page]: the number of each rank's last message, a cache line each.
            slots: uint8 [any]: two slots a rank.
        """
        self.rank = rank
        self.size = size
        self._words = words.cast("I")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(words))
        self._slot_bytes = len(slots) // (2 * size)
        self._slots = torch.frombuffer(slots, dtype=torch.uint8).view(2, size, self._slot_bytes)
        self._serial = 0
        self._nap = _Timespec(int(NAP_S), 0)

    def sum(self, x: Tensor, rows: int) -> Tensor:
        """See `Collectives`."""
        return add_in_order(x, rows, self._gather(x[:rows]))

    def exchange(self, x: Tensor, owners: Sequence[int], widths: Sequence[int]) -> Tensor:
        """See `Collectives`; as many rows at a time as a slot holds."""
        at_once = max(1, self._slot_bytes // (4 * max(widths)))
        taken = []
        for first in range(0, len(owners), at_once):
            mine = [
                row
                for row, owner in enumerate(owners[first : first + at_once])
                if owner == self.rank
            ]
            # Everybody sees every row and keeps its own: one message in place of one to each.
            parts = self._gather(x[first : first + at_once], widths)
            taken.append(torch.cat([part[mine] for part in parts], dim=1))
        return torch.cat(taken)

    def _gather(self, x: Tensor, widths: Sequence[int] | None = None) -> list[Tensor]:
        """Every rank's x; views into slots that hold until the next message but one."""
        rows, width = x.shape
        self._serial += 1
        slots = self._slots[self._serial % 2]
        # The data, then its number: x86 lets nobody see two stores in the other order.
        _as(slots[self.rank], x.dtype, rows, width).copy_(x)
        self._post()
        self._wait_for_all()
        return [
            _as(slots[rank], x.dtype, rows, width if widths is None else widths[rank])
            for rank in range(self.size)
        ]

    def _post(self) -> None:
        self._words[self.rank * WORD_BYTES // 4] = self._serial & 0xFFFFFFFF
        address = ctypes.c_void_p(self._address + self.rank * WORD_BYTES)
        # Always: to find out whether anybody sleeps would need a word more, and a fence.
        _libc.syscall(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYBODY, None, None, 0)

    def _wait_for_all(self) -> None:
        for rank in range(self.size):
            self._wait_for(rank, self._serial & 0xFFFFFFFF)

    def _wait_for(self, rank: int, wanted: int) -> None:
        """Spin for a moment, then sleep in the kernel until the rank's word changes.

        Raises:
            GroupBroken: Nothing came in time.
        """
        at = rank * WORD_BYTES // 4
        # Ranks finish within microseconds of one another, and a sleep takes tens of them.
        spin_until = time.perf_counter() + SPIN_S
        while not _is_there(seen := self._words[at], wanted):
            now = time.perf_counter()
            if now < spin_until:
                continue
            if now > spin_until + WAIT_S:
                raise GroupBroken(f"rank {rank} has sent nothing for {WAIT_S:g} s")
            address = ctypes.c_void_p(self._address + rank * WORD_BYTES)
            # The kernel sleeps only if the word is still `seen`, so no wake is missed.
            _libc.syscall(_SYS_FUTEX, address, _FUTEX_WAIT, seen, ctypes.byref(self._nap), None, 0)


def _as(slot: Tensor, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    return slot[: rows * width * dtype.itemsize].view(dtype).view(rows, width)


def _is_there(word: int, wanted: int) -> bool:
    """A rank may be one message ahead; numbers wrap."""
    return (word - wanted) & 0xFFFFFFFF < 2
