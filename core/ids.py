"""Identifiers, each its own type so that the checker catches a swap.

Owns the id types, the making of random ones, and with it the source of randomness. Does not know
what they name.
"""

from __future__ import annotations

import hashlib
import random
from typing import NewType

RequestId = NewType("RequestId", str)
RunId = NewType("RunId", RequestId)
"""What workers call one run of a request, and no other run ever."""
WorkerId = NewType("WorkerId", str)
RouterId = NewType("RouterId", str)
TransferId = NewType("TransferId", bytes)
Epoch = NewType("Epoch", int)
Incarnation = NewType("Incarnation", int)
"""Drawn at each start of a worker."""
WorkerLife = tuple[WorkerId, Incarnation]
"""One life of one worker."""

TRANSFER_ID_BYTES = 16
MAX_REQUEST_ID_CHARACTERS = 128
"""Of an id that a client chooses."""
MAX_RUN_ID_CHARACTERS = 160
"""Of a run's id, the request's and 13 characters more, and of any other on a session."""


class Ids:
    """Source of random ids. Production seeds it from the system, a simulation from its seed."""

    def __init__(self, rng: random.Random | None = None) -> None:
        """Keep the generator; without one, ids come from the operating system."""
        self._rng = rng or random.SystemRandom()

    def request(self) -> RequestId:
        """Return a fresh request id, 96 random bits."""
        return RequestId(f"req-{self._rng.getrandbits(96):024x}")

    def run(self, request_id: RequestId) -> RunId:
        """Return a fresh run id: clients may use a request id more than once."""
        return RunId(RequestId(f"{request_id}~{self._rng.getrandbits(48):012x}"))

    def router(self) -> RouterId:
        """Return a fresh router id."""
        return RouterId(f"router-{self._rng.getrandbits(48):012x}")

    def worker(self, role: str) -> WorkerId:
        """Return a fresh worker id that shows its role."""
        return WorkerId(f"{role}-{self._rng.getrandbits(32):08x}")

    def transfer(self) -> TransferId:
        """Return an unguessable 128-bit transfer id."""
        return TransferId(self._rng.getrandbits(128).to_bytes(TRANSFER_ID_BYTES, "big"))

    def incarnation(self) -> Incarnation:
        """Return the number of one worker start; unequal to any other with overwhelming odds."""
        # Never 0, which stands for no worker.
        return Incarnation(self._rng.getrandbits(63) | 1)

    def spread(self, value: float, share: float) -> float:
        """Return a number up to so large a share below or above `value`, all equally likely."""
        return value * self._rng.uniform(1 - share, 1 + share)


def seed_of(request_id: RequestId, key: bytes, tenant: str = "") -> int:
    """Derive the sampling seed of a request that named none: a keyed hash, so the same anywhere.

    Equal ids of two tenants give unequal seeds: nobody can repeat another's answer.
    """
    name = f"{tenant}\n{request_id}" if tenant else request_id
    digest = hashlib.blake2b(name.encode(), key=key, digest_size=8).digest()
    # 63 bits: a seed is a signed 64-bit number on every wire.
    return int.from_bytes(digest, "big") >> 1
