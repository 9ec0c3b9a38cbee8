"""Faults of one message.

Owns the faults that wait for a message, and what each does to it. Does not know what a message
means, beyond its length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from simulation.faults.injection import Injection
from simulation.faults.kinds import Fault, Kind
from simulation.network import SimStream
from simulation.traps import Injected

MIN_FLIPPED_BYTES = 64
"""Shorter messages have no payload, and a flip in one is the same as its loss."""


class WireFaults:
    """Sees every message of a hub; the first that suits an armed fault gets it."""

    def __init__(self, injection: Injection) -> None:
        """Nothing is armed."""
        self.injection = injection
        self.swapped: dict[SimStream, tuple[Fault, Any]] = {}
        """Messages held back until the next one of their stream has passed them."""
        self._armed: list[Fault] = []

    def arm(self, fault: Fault) -> None:
        """Let a fault wait for its message."""
        self._armed.append(fault)

    def disarm(self) -> None:
        """Drop what met no message: the trial checks recovery now."""
        self._armed.clear()

    def mangle(self, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
        """See `Hub.mangle`."""
        if stream in self.swapped:
            fault, earlier = self.swapped.pop(stream)
            self.injection.bite(fault)
            return [message, earlier]
        for fault in self._armed:
            if fault.kind is Kind.FLIP and not _can_be_flipped(message):
                continue
            if fault.pick < 0.5 and stream.kind != "fetch":
                continue  # half of them wait for the hand-over, which has fewer messages
            self._armed.remove(fault)
            return FAULTS[fault.kind](self, fault, stream, message)
        return [message]


Mangle = Callable[[WireFaults, Fault, SimStream, Any], list[Any]]
"""What arrives in the place of a message, in order."""


def _can_be_flipped(message: Any) -> bool:  # noqa: ANN401
    return isinstance(message, bytes) and len(message) > MIN_FLIPPED_BYTES


def _drop(wire: WireFaults, fault: Fault, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
    del stream, message
    wire.injection.bite(fault)
    return []


def _duplicate(wire: WireFaults, fault: Fault, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
    del stream
    wire.injection.bite(fault)
    return [message, message]


def _reorder(wire: WireFaults, fault: Fault, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
    wire.swapped[stream] = (fault, message)  # it bites with the next message, if there is one
    return []


def _delay(wire: WireFaults, fault: Fault, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
    loop = asyncio.get_running_loop()
    nodes = stream.node, stream.peer.node
    stream.last_arrival = loop.time() + fault.for_s  # what follows queues behind it, as in TCP
    wire.injection.mark_ill(*nodes)
    loop.call_later(fault.for_s, wire.injection.mark_ill, *nodes)
    wire.injection.bite(fault)
    return [message]


def _flip(wire: WireFaults, fault: Fault, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
    del stream
    rng = wire.injection.rng
    damaged = bytearray(message)
    # Anywhere, or in the payload alone: one in the head is seen before the payload is.
    first = rng.choice([0, len(damaged) * 3 // 4])
    for _ in range(rng.randint(1, 64)):
        damaged[rng.randrange(first, len(damaged))] ^= 1 << rng.randrange(8)
    # The same bit may have been flipped back.
    wire.injection.bite(fault, has_bitten=bytes(damaged) != message)
    return [bytes(damaged)]


def _read_raises(wire: WireFaults, fault: Fault, stream: SimStream, message: Any) -> list[Any]:  # noqa: ANN401
    del stream, message
    wire.injection.bite(fault)
    return [Injected("injected: reading")]


FAULTS: dict[Kind, Mangle] = {
    Kind.DROP: _drop,
    Kind.DELAY: _delay,
    Kind.DUPLICATE: _duplicate,
    Kind.REORDER: _reorder,
    Kind.FLIP: _flip,
    Kind.READ_RAISES: _read_raises,
}
